// norm_kernels.cpp - the passes of norm_kernels.h. The loops over channels are plain; the compiler vectorises them, for
// the baseline, AVX2 and AVX-512, and the loader picks.
#include "norm_kernels.h"

#include <cstring>

namespace cxrfast {
namespace {

#define CXRFAST_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__)
#define CXRFAST_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define CXRFAST_CLONES
#endif

// Elements of a chunk of the kinds that go through x in order: some hundred chunks a map, each a few cache sizes.
constexpr int64_t kChunkElements = 65536;
// Rows that are added up in float before they go to double: it keeps the conversions off the critical path.
constexpr int64_t kRowsInFloat = 8;
// Channels handled at a time by the summing kinds, so that their sums stay in registers or the first cache.
constexpr int64_t kTile = 64;

struct Bf16 {
  uint16_t bits;
};

CXRFAST_INLINE float to_float(float x) { return x; }
CXRFAST_INLINE float to_float(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
CXRFAST_INLINE void store(float* to, float x) { *to = x; }
CXRFAST_INLINE void store(Bf16* to, float x) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(x != x ? 0x7FC0 : rounded);
}

bool is_pooled(NormKind kind) {
  return kind == NormKind::kPool || kind == NormKind::kPoolBackwardSums || kind == NormKind::kPoolBackward;
}

int64_t rows_per_chunk(const NormJob& job) { return job.C < kChunkElements ? kChunkElements / job.C : 1; }

// ---- kinds that go through x row by row; a row is one pixel's C channels ----

// first = g and second = g * x of one value, or x and x * x when there is no gradient.
template <bool kHasGrad, class T>
CXRFAST_INLINE void sum_rows(const NormJob& job, int64_t begin, int64_t end, double* sums) {
  const int64_t C = job.C;
  const T* x = static_cast<const T*>(job.x);
  const T* grad = static_cast<const T*>(job.grad);
  for (int64_t c0 = 0; c0 < C; c0 += kTile) {
    const int64_t width = C - c0 < kTile ? C - c0 : kTile;
    double first[kTile] = {}, second[kTile] = {};
    for (int64_t row0 = begin; row0 < end; row0 += kRowsInFloat) {
      float some_first[kTile] = {}, some_second[kTile] = {};
      const int64_t stop = row0 + kRowsInFloat < end ? row0 + kRowsInFloat : end;
      for (int64_t row = row0; row < stop; ++row) {
        const T* xs = x + row * C + c0;
        const T* grads = grad + (kHasGrad ? row * C + c0 : 0);
        for (int64_t c = 0; c < width; ++c) {
          const float value = to_float(xs[c]);
          float g = value;
          if constexpr (kHasGrad) {
            const bool dead = value * job.scale[c0 + c] + job.shift[c0 + c] <= 0;
            g = dead ? 0.0f : to_float(grads[c]);
          }
          some_first[c] += g;
          some_second[c] += g * value;
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        first[c] += double(some_first[c]);
        second[c] += double(some_second[c]);
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      sums[c0 + c] = first[c];
      sums[C + c0 + c] = second[c];
    }
  }
}

template <class T>
CXRFAST_INLINE void relu_rows(const NormJob& job, int64_t begin, int64_t end) {
  const int64_t C = job.C;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * C;
    T* out = static_cast<T*>(job.out) + row * C;
    for (int64_t c = 0; c < C; ++c) {
      const float value = to_float(x[c]) * job.scale[c] + job.shift[c];
      store(out + c, value < 0 ? 0.0f : value);  // this way round a NaN passes, and training's guard sees it
    }
  }
}

template <class T>
CXRFAST_INLINE void relu_backward_rows(const NormJob& job, int64_t begin, int64_t end) {
  const int64_t C = job.C;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * C;
    const T* grad = static_cast<const T*>(job.grad) + row * C;
    T* out = static_cast<T*>(job.out) + row * C;
    for (int64_t c = 0; c < C; ++c) {
      const float value = to_float(x[c]);
      const float incoming = to_float(grad[c]);
      const float g = value * job.scale[c] + job.shift[c] <= 0 ? 0.0f : incoming;
      store(out + c, job.coef[c] * g + job.coef[C + c] * value + job.coef[2 * C + c]);
    }
  }
}

// ---- kinds that pool; a chunk is one row of the pooled map ----

// x at the upper left corner of the window of pooled pixel (chunk, column).
template <class T>
CXRFAST_INLINE const T* window(const NormJob& job, int64_t chunk, int64_t column) {
  const int64_t half = job.H / 2;
  const int64_t row = chunk / half * job.H + chunk % half * 2;
  return static_cast<const T*>(job.x) + (row * job.W + column * 2) * job.C;
}

template <class T>
CXRFAST_INLINE void pool_row(const NormJob& job, int64_t chunk) {
  const int64_t C = job.C, width = job.W / 2, below = job.W * C;
  for (int64_t column = 0; column < width; ++column) {
    const T* x = window<T>(job, chunk, column);
    const int64_t at = (chunk * width + column) * C;
    T* out = static_cast<T*>(job.out) + at;
    uint8_t* place = job.place + at;
    const uint8_t* bytes = job.bytes ? job.bytes + at : nullptr;
    for (int64_t c = 0; c < C; ++c) {
      const float scale = job.scale[c], shift = job.shift[c];
      float best = to_float(x[c]) * scale + shift;
      uint8_t where = 0;
      const float others[3] = {to_float(x[C + c]) * scale + shift, to_float(x[below + c]) * scale + shift,
                               to_float(x[below + C + c]) * scale + shift};
      for (int k = 0; k < 3; ++k) {  // the first of equals, as torch has it
        where = others[k] > best ? uint8_t(k + 1) : where;
        best = others[k] > best ? others[k] : best;
      }
      const bool dead = best <= 0;
      store(out + c, dead ? 0.0f : best * job.keep_scale);
      place[c] = dead ? kNowhere : where;
    }
    if (bytes == nullptr) continue;
    for (int64_t c = 0; c < C; ++c) {
      const bool dropped = bytes[c] < job.threshold;
      store(out + c, dropped ? 0.0f : to_float(out[c]));
      place[c] = dropped ? kNowhere : place[c];
    }
  }
}

template <class T>
CXRFAST_INLINE void pool_sums(const NormJob& job, int64_t chunk, double* sums) {
  const int64_t C = job.C, width = job.W / 2, below = job.W * C;
  for (int64_t c = 0; c < 2 * C; ++c) sums[c] = 0;
  for (int64_t column = 0; column < width; ++column) {
    const T* x = window<T>(job, chunk, column);
    const int64_t at = (chunk * width + column) * C;
    const T* grad = static_cast<const T*>(job.grad) + at;
    const uint8_t* place = job.place + at;
    for (int64_t c = 0; c < C; ++c) {
      const float four[4] = {to_float(x[c]), to_float(x[C + c]), to_float(x[below + c]), to_float(x[below + C + c])};
      float value = place[c] == 1 ? four[1] : four[0];
      value = place[c] == 2 ? four[2] : value;
      value = place[c] == 3 ? four[3] : value;
      const float g = place[c] == kNowhere ? 0.0f : to_float(grad[c]) * job.keep_scale;
      sums[c] += double(g);
      sums[C + c] += double(g * value);
    }
  }
}

// One pixel that no window holds: the last row or column of an odd side.
template <class T>
CXRFAST_INLINE void outside(const NormJob& job, int64_t at) {
  const int64_t C = job.C;
  const T* x = static_cast<const T*>(job.x) + at;
  T* out = static_cast<T*>(job.out) + at;
  for (int64_t c = 0; c < C; ++c) store(out + c, job.coef[C + c] * to_float(x[c]) + job.coef[2 * C + c]);
}

template <class T>
CXRFAST_INLINE void pool_backward_row(const NormJob& job, int64_t chunk) {
  const int64_t C = job.C, width = job.W / 2, half = job.H / 2, below = job.W * C;
  for (int64_t column = 0; column < width; ++column) {
    const T* x = window<T>(job, chunk, column);
    const int64_t at = (chunk * width + column) * C;
    T* out = static_cast<T*>(job.out) + (x - static_cast<const T*>(job.x));
    const T* grad = static_cast<const T*>(job.grad) + at;
    const uint8_t* place = job.place + at;
    for (int k = 0; k < 4; ++k) {
      const int64_t corner = (k & 1) * C + (k >> 1) * below;
      for (int64_t c = 0; c < C; ++c) {
        const float incoming = to_float(grad[c]) * job.keep_scale;
        const float g = place[c] == k ? incoming : 0.0f;
        store(out + corner + c, job.coef[c] * g + job.coef[C + c] * to_float(x[corner + c]) + job.coef[2 * C + c]);
      }
    }
  }
  const int64_t row = chunk / half * job.H + chunk % half * 2;
  if (job.W % 2)
    for (int64_t k = 0; k < 2; ++k) outside<T>(job, ((row + k) * job.W + job.W - 1) * C);
  if (job.H % 2 && chunk % half == half - 1)
    for (int64_t column = 0; column < job.W; ++column) outside<T>(job, ((row + 2) * job.W + column) * C);
}

// ---- one chunk ----

template <class T>
CXRFAST_INLINE void run_chunks(const NormJob& job, int64_t begin, int64_t end) {
  const int64_t all = job.N * job.H * job.W, rows = rows_per_chunk(job);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * rows, stop = first + rows < all ? first + rows : all;
    double* sums = job.partial + chunk * 2 * job.C;
    switch (job.kind) {
      case NormKind::kSums:
        sum_rows<false, T>(job, first, stop, sums);
        break;
      case NormKind::kRelu:
        relu_rows<T>(job, first, stop);
        break;
      case NormKind::kReluBackwardSums:
        sum_rows<true, T>(job, first, stop, sums);
        break;
      case NormKind::kReluBackward:
        relu_backward_rows<T>(job, first, stop);
        break;
      case NormKind::kPool:
        pool_row<T>(job, chunk);
        break;
      case NormKind::kPoolBackwardSums:
        pool_sums<T>(job, chunk, sums);
        break;
      case NormKind::kPoolBackward:
        pool_backward_row<T>(job, chunk);
        break;
    }
  }
}

CXRFAST_CLONES void run_float(const NormJob& job, int64_t begin, int64_t end) { run_chunks<float>(job, begin, end); }
CXRFAST_CLONES void run_bf16(const NormJob& job, int64_t begin, int64_t end) { run_chunks<Bf16>(job, begin, end); }

}  // namespace

int64_t norm_chunks(const NormJob& job) {
  if (is_pooled(job.kind)) return job.N * (job.H / 2);
  const int64_t rows = rows_per_chunk(job);
  return (job.N * job.H * job.W + rows - 1) / rows;
}

void norm_run(const NormJob& job, int64_t begin, int64_t end) {
  job.bf16 ? run_bf16(job, begin, end) : run_float(job, begin, end);
}

void norm_finish_sums(const NormJob& job, double* sums) {
  const int64_t chunks = norm_chunks(job);
  for (int64_t c = 0; c < 2 * job.C; ++c) sums[c] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < 2 * job.C; ++c) sums[c] += job.partial[chunk * 2 * job.C + c];
}

}  // namespace cxrfast
