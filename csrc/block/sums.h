// sums.h - what the passes of this folder have in common: values of some channels in registers, and sums over pixels.
#pragma once

#include "lanes.h"

namespace cxrfast {

// What a pass needs of some channels: scale and shift, or coef.
template <int n, int k>
struct Channels {
  using L = Lanes<n>;
  typename L::F values[3][k];

  CXRFAST_INLINE Channels(const float* a, const float* b, const float* c, int64_t first) {
    const float* from[3] = {a, b, c};
    for (int which = 0; which < 3; ++which)
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i)
        if (from[which] != nullptr) L::load(from[which] + first + i * n, values[which][i]);
  }
};

// Sums of some channels: in float over a few pixels, then in double.
template <int n, int k>
struct Sums {
  using L = Lanes<n>;
  typename L::F first[k] = {}, second[k] = {};
  double total_first[k * n] = {}, total_second[k * n] = {};

  CXRFAST_INLINE void add(int i, const typename L::F& a, const typename L::F& b) {
    first[i] += a;
    second[i] += a * b;
  }
  CXRFAST_INLINE void flush() {
    float a[k * n], b[k * n];
#pragma GCC unroll 2
    for (int i = 0; i < k; ++i) {
      L::store(a + i * n, first[i]);
      L::store(b + i * n, second[i]);
      first[i] = second[i] = typename L::F{};
    }
    for (int c = 0; c < k * n; ++c) {
      total_first[c] += double(a[c]);
      total_second[c] += double(b[c]);
    }
  }
  CXRFAST_INLINE void add_to(double* sums, int64_t C, int64_t c0) const {
    for (int c = 0; c < k * n; ++c) {
      sums[c0 + c] += total_first[c];
      sums[C + c0 + c] += total_second[c];
    }
  }
};

// sums (count) from the partial sums of all chunks, in their order.
template <class T>
void finish_sums(const T* partial, int64_t chunks, int64_t count, T* sums) {
  for (int64_t k = 0; k < count; ++k) sums[k] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < count; ++k) sums[k] += partial[chunk * count + k];
}

}  // namespace cxrfast
