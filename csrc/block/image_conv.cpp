// image_conv.cpp - image_conv.h: nine multiply-adds a value, the kernel or its gradient in registers.
#include "image_conv.h"

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "sums.h"

namespace cxrfast {
namespace {

constexpr int64_t kRowsPerChunk = 8;

// The three rows of the image around a row of the result, each with a zero at both ends.
struct Window {
  std::vector<float> rows;
  int64_t stride;

  explicit Window(int64_t W) : rows(size_t(3 * (W + 2))), stride(W + 2) {}

  void fill(const ImageConvJob& job, int64_t row) {
    const int64_t y = row % job.H;
    for (int64_t k = 0; k < 3; ++k) {
      const bool inside = y + k >= 1 && y + k <= job.H;
      float* to = rows.data() + k * stride + 1;
      if (inside)
        std::copy_n(job.image + (row + k - 1) * job.W, job.W, to);
      else
        std::fill_n(to, job.W, 0.0f);
    }
  }
};

// One row of the result, some channels.
struct Forward {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const ImageConvJob& job, const Window& window, int64_t row, double* out) {
    using L = Lanes<n>;
    using F = typename L::F;
    const int64_t C = job.C;
    F kernel[9][k];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap)
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) L::load(job.kernel + tap * C + c0 + i * n, kernel[tap][i]);
    T* to = static_cast<T*>(job.out) + row * job.W * C + c0;
    Sums<n, k> sums;
    for (int64_t pixel = 0; pixel < job.W; ++pixel, to += C) {
      const float* at = window.rows.data() + pixel;
      F value[k] = {};
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap)
#pragma GCC unroll 2
        for (int i = 0; i < k; ++i) value[i] += kernel[tap][i] * at[tap / 3 * window.stride + tap % 3];
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) {
        L::store(to + i * n, value[i]);
        F stored;  // the batch norm is of what was stored, not of what was rounded
        L::load(to + i * n, stored);
        sums.add(i, stored, stored);
      }
    }
    sums.flush();
    sums.add_to(out, C, c0);
  }
};

struct Backward {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const ImageConvJob& job, const Window& window, int64_t row, double* out) {
    using L = Lanes<n>;
    using F = typename L::F;
    const int64_t C = job.C;
    const Channels<n, k> affine(job.scale, job.shift, nullptr, c0);
    const Channels<n, k> coef(job.coef, job.coef + C, job.coef + 2 * C, c0);
    const T* x = static_cast<const T*>(job.x) + row * job.W * C + c0;
    const T* grad = static_cast<const T*>(job.grad) + row * job.W * C + c0;
    F taps[9][k] = {};
    for (int64_t pixel = 0; pixel < job.W; ++pixel, x += C, grad += C) {
      const float* at = window.rows.data() + pixel;
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) {
        F value, g;
        L::load(x + i * n, value);
        L::load(grad + i * n, g);
        const F y = value * affine.values[0][i] + affine.values[1][i];
        g = y <= 0 ? F{} : g;
        g = coef.values[0][i] * g + (coef.values[1][i] * value + coef.values[2][i]);
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) taps[tap][i] += g * at[tap / 3 * window.stride + tap % 3];
      }
    }
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap)
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) {
        float values[n];
        L::store(values, taps[tap][i]);
        for (int c = 0; c < n; ++c) out[tap * C + c0 + i * n + c] += double(values[c]);
      }
  }
};

template <int n, class T>
CXRFAST_INLINE void run_chunks_of(const ImageConvJob& job, int64_t begin, int64_t end) {
  const int64_t rows = job.N * job.H, size = image_conv_sums(job);
  Window window(job.W);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = job.partial + chunk * size;
    std::fill_n(sums, size, 0.0);
    const int64_t stop = std::min(rows, (chunk + 1) * kRowsPerChunk);
    for (int64_t row = chunk * kRowsPerChunk; row < stop; ++row) {
      window.fill(job, row);
      // nine sums of two vectors are too many for the sixteen registers of all but AVX-512
      if (job.backward)
        over_channels<Backward, n, n == 16, T, const ImageConvJob&, const Window&>(job.C, job, window, row, sums);
      else
        over_channels<Forward, n, n == 16, T, const ImageConvJob&, const Window&>(job.C, job, window, row, sums);
    }
  }
}

struct Chunks {
  template <int n>
  static CXRFAST_INLINE void run(const ImageConvJob& job, int64_t begin, int64_t end) {
    job.bf16 ? run_chunks_of<n, Bf16>(job, begin, end) : run_chunks_of<n, float>(job, begin, end);
  }
};

}  // namespace

int64_t image_conv_sums(const ImageConvJob& job) { return (job.backward ? 9 : 2) * job.C; }

int64_t image_conv_chunks(const ImageConvJob& job) { return (job.N * job.H + kRowsPerChunk - 1) / kRowsPerChunk; }

void image_conv_run(const ImageConvJob& job, int64_t begin, int64_t end) { run_at_best_level<Chunks>(job, begin, end); }

}  // namespace cxrfast
