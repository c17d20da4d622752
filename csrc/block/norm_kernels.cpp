// norm_kernels.cpp - the passes of norm_kernels.h. Channels are handled a few vectors at a time, all pixels of a chunk
// for those before the next: what belongs to a channel then stays in registers.
#include "norm_kernels.h"

#include <algorithm>

#include "lanes.h"
#include "sums.h"

namespace cxrfast {
namespace {

// Elements of a chunk of the kinds that go through x in order: some hundred chunks a map, each a part of the second
// cache, because maps of many channels are gone through once for each few of them.
constexpr int64_t kChunkElements = 65536;
// Pixels that are added up in float before they go to double.
constexpr int64_t kPixelsInFloat = 32;

bool is_pooled(NormKind kind) {
  return kind == NormKind::kPool || kind == NormKind::kPoolBackwardSums || kind == NormKind::kPoolBackward;
}

bool is_summed(NormKind kind) {
  return kind == NormKind::kSums || kind == NormKind::kReluBackwardSums || kind == NormKind::kPoolBackwardSums;
}

int64_t rows_per_chunk(const NormJob& job) { return job.C < kChunkElements ? kChunkElements / job.C : 1; }

// ---- kinds that go through x pixel by pixel: [begin, end) of all pixels, each C channels ----

// Sums of x and x * x; or of g and g * x.
template <bool kHasGrad>
struct SumPixels {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const NormJob& job, int64_t begin, int64_t end, double* out) {
    using L = Lanes<n>;
    using F = typename L::F;
    const int64_t C = job.C;
    const T* x = static_cast<const T*>(job.x) + c0;
    const T* grad = static_cast<const T*>(job.grad) + (kHasGrad ? c0 : 0);
    const Channels<n, k> affine(job.scale, job.shift, nullptr, c0);
    Sums<n, k> sums;
    for (int64_t some = begin; some < end; some += kPixelsInFloat) {
      const int64_t stop = some + kPixelsInFloat < end ? some + kPixelsInFloat : end;
      for (int64_t pixel = some; pixel < stop; ++pixel) {
#pragma GCC unroll 2
        for (int i = 0; i < k; ++i) {
          F value, g;
          L::load(x + pixel * C + i * n, value);
          if constexpr (kHasGrad) {
            L::load(grad + pixel * C + i * n, g);
            const F y = value * affine.values[0][i] + affine.values[1][i];
            g = y <= 0 ? F{} : g;
          } else {
            g = value;
          }
          sums.add(i, g, value);
        }
      }
      sums.flush();
    }
    sums.add_to(out, C, c0);
  }
};

struct Relu {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const NormJob& job, int64_t begin, int64_t end) {
    using L = Lanes<n>;
    using F = typename L::F;
    const int64_t C = job.C;
    const T* x = static_cast<const T*>(job.x) + c0;
    T* out = static_cast<T*>(job.out) + c0;
    const Channels<n, k> affine(job.scale, job.shift, nullptr, c0);
    for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) {
        F value;
        L::load(x + pixel * C + i * n, value);
        const F y = value * affine.values[0][i] + affine.values[1][i];
        const F rectified = y < 0 ? F{} : y;  // this way round a NaN passes, and training's guard sees it
        L::store(out + pixel * C + i * n, rectified);
      }
    }
  }
};

struct ReluBackward {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const NormJob& job, int64_t begin, int64_t end) {
    using L = Lanes<n>;
    using F = typename L::F;
    const int64_t C = job.C;
    const T* x = static_cast<const T*>(job.x) + c0;
    const T* grad = static_cast<const T*>(job.grad) + c0;
    T* out = static_cast<T*>(job.out) + c0;
    const Channels<n, k> affine(job.scale, job.shift, nullptr, c0);
    const Channels<n, k> coef(job.coef, job.coef + C, job.coef + 2 * C, c0);
    for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) {
        F value, g;
        L::load(x + pixel * C + i * n, value);
        L::load(grad + pixel * C + i * n, g);
        const F y = value * affine.values[0][i] + affine.values[1][i];
        g = y <= 0 ? F{} : g;
        L::store(out + pixel * C + i * n, coef.values[0][i] * g + (coef.values[1][i] * value + coef.values[2][i]));
      }
    }
  }
};

// ---- kinds that pool; a chunk is one row of the pooled map ----

// Where the chunk's first window begins in x, and its first value in the pooled maps.
struct PooledRow {
  int64_t x, pooled, columns, below;

  CXRFAST_INLINE PooledRow(const NormJob& job, int64_t chunk) {
    const int64_t half = job.H / 2;
    columns = job.W / 2;
    below = job.W * job.C;
    x = (chunk / half * job.H + chunk % half * 2) * below;
    pooled = chunk * columns * job.C;
  }
};

struct Pool {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const NormJob& job, int64_t chunk) {
    using L = Lanes<n>;
    using F = typename L::F;
    using I = typename L::I;
    const int64_t C = job.C;
    const PooledRow row(job, chunk);
    const T* x = static_cast<const T*>(job.x) + row.x + c0;
    const int64_t corners[4] = {0, C, row.below, row.below + C};
    const Channels<n, k> affine(job.scale, job.shift, nullptr, c0);
    for (int64_t column = 0; column < row.columns; ++column, x += 2 * C) {
      const int64_t at = row.pooled + column * C + c0;
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) {
        F best{};
        I where{};
#pragma GCC unroll 4
        for (int corner = 0; corner < 4; ++corner) {
          F value;
          L::load(x + corners[corner] + i * n, value);
          value = value * affine.values[0][i] + affine.values[1][i];
          if (corner == 0) {
            best = value;
          } else {  // the first of equals, as torch has it
            where = value > best ? I{} + corner : where;
            best = value > best ? value : best;
          }
        }
        I dead = best <= 0;
        if (job.bytes != nullptr) {
          I bytes;
          L::load(job.bytes + at + i * n, bytes);
          dead |= bytes < job.threshold;
        }
        best = dead ? F{} : best * job.keep_scale;
        where = dead ? I{} + int32_t(kNowhere) : where;
        L::store(static_cast<T*>(job.out) + at + i * n, best);
        L::store(job.place + at + i * n, where);
      }
    }
  }
};

struct PoolBackwardSums {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const NormJob& job, int64_t chunk, double* out) {
    using L = Lanes<n>;
    using F = typename L::F;
    using I = typename L::I;
    const int64_t C = job.C;
    const PooledRow row(job, chunk);
    const T* x = static_cast<const T*>(job.x) + row.x + c0;
    const int64_t corners[4] = {0, C, row.below, row.below + C};
    Sums<n, k> sums;
    for (int64_t some = 0; some < row.columns; some += kPixelsInFloat) {
      const int64_t stop = some + kPixelsInFloat < row.columns ? some + kPixelsInFloat : row.columns;
      for (int64_t column = some; column < stop; ++column, x += 2 * C) {
        const int64_t at = row.pooled + column * C + c0;
#pragma GCC unroll 2
        for (int i = 0; i < k; ++i) {
          I place;
          L::load(job.place + at + i * n, place);
          F value, g;
          L::load(x + i * n, value);
#pragma GCC unroll 3
          for (int corner = 1; corner < 4; ++corner) {
            F other;
            L::load(x + corners[corner] + i * n, other);
            value = place == corner ? other : value;
          }
          L::load(static_cast<const T*>(job.grad) + at + i * n, g);
          g = place == int32_t(kNowhere) ? F{} : g * job.keep_scale;
          sums.add(i, g, value);
        }
      }
      sums.flush();
    }
    sums.add_to(out, C, c0);
  }
};

// One pixel that no window holds, as all of them have it beside what comes through the pool.
template <int n, int k, class T>
CXRFAST_INLINE void outside(const NormJob& job, const Channels<n, k>& coef, int64_t at) {
  using L = Lanes<n>;
#pragma GCC unroll 2
  for (int i = 0; i < k; ++i) {
    typename L::F value;
    L::load(static_cast<const T*>(job.x) + at + i * n, value);
    L::store(static_cast<T*>(job.out) + at + i * n, coef.values[1][i] * value + coef.values[2][i]);
  }
}

struct PoolBackward {
  template <int n, int k, class T>
  static CXRFAST_INLINE void run(int64_t c0, const NormJob& job, int64_t chunk) {
    using L = Lanes<n>;
    using F = typename L::F;
    using I = typename L::I;
    const int64_t C = job.C;
    const Channels<n, k> coef(job.coef, job.coef + C, job.coef + 2 * C, c0);
    if (job.H < 2) {  // no window: a chunk is an image
      for (int64_t pixel = chunk * job.H * job.W; pixel < (chunk + 1) * job.H * job.W; ++pixel)
        outside<n, k, T>(job, coef, pixel * C + c0);
      return;
    }
    const PooledRow row(job, chunk);
    const int64_t corners[4] = {0, C, row.below, row.below + C};
    for (int64_t column = 0; column < row.columns; ++column) {
      const int64_t at = row.pooled + column * C + c0, from = row.x + column * 2 * C + c0;
#pragma GCC unroll 2
      for (int i = 0; i < k; ++i) {
        I place;
        L::load(job.place + at + i * n, place);
        F incoming;
        L::load(static_cast<const T*>(job.grad) + at + i * n, incoming);
        incoming *= coef.values[0][i] * job.keep_scale;
#pragma GCC unroll 4
        for (int corner = 0; corner < 4; ++corner) {
          F value;
          L::load(static_cast<const T*>(job.x) + from + corners[corner] + i * n, value);
          const F g = place == corner ? incoming : F{};
          L::store(static_cast<T*>(job.out) + from + corners[corner] + i * n,
                   g + (coef.values[1][i] * value + coef.values[2][i]));
        }
      }
    }
    // The last column and row of odd sides.
    const int64_t half = job.H / 2;
    if (job.W % 2)
      for (int64_t k_row = 0; k_row < 2; ++k_row)
        outside<n, k, T>(job, coef, row.x + k_row * row.below + (job.W - 1) * C + c0);
    if (job.H % 2 && chunk % half == half - 1)
      for (int64_t column = 0; column < job.W; ++column)
        outside<n, k, T>(job, coef, row.x + 2 * row.below + column * C + c0);
  }
};

// ---- chunks ----

template <int n, class T>
CXRFAST_INLINE void run_chunks_of(const NormJob& job, int64_t begin, int64_t end) {
  const int64_t C = job.C, all = job.N * job.H * job.W, rows = rows_per_chunk(job);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * rows, stop = first + rows < all ? first + rows : all;
    double* sums = job.partial + chunk * 2 * C;
    if (is_summed(job.kind)) std::fill_n(sums, 2 * C, 0.0);
    switch (job.kind) {
      case NormKind::kSums:
        over_channels<SumPixels<false>, n, true, T, const NormJob&>(C, job, first, stop, sums);
        break;
      case NormKind::kRelu:
        over_channels<Relu, n, true, T, const NormJob&>(C, job, first, stop);
        break;
      case NormKind::kReluBackwardSums:
        over_channels<SumPixels<true>, n, true, T, const NormJob&>(C, job, first, stop, sums);
        break;
      case NormKind::kReluBackward:
        over_channels<ReluBackward, n, true, T, const NormJob&>(C, job, first, stop);
        break;
      case NormKind::kPool:
        over_channels<Pool, n, true, T, const NormJob&>(C, job, chunk);
        break;
      case NormKind::kPoolBackwardSums:
        over_channels<PoolBackwardSums, n, true, T, const NormJob&>(C, job, chunk, sums);
        break;
      case NormKind::kPoolBackward:
        over_channels<PoolBackward, n, true, T, const NormJob&>(C, job, chunk);
        break;
    }
  }
}

struct Chunks {
  template <int n>
  static CXRFAST_INLINE void run(const NormJob& job, int64_t begin, int64_t end) {
    job.bf16 ? run_chunks_of<n, Bf16>(job, begin, end) : run_chunks_of<n, float>(job, begin, end);
  }
};

}  // namespace

int64_t norm_chunks(const NormJob& job) {
  if (is_pooled(job.kind)) return job.N * (job.kind == NormKind::kPoolBackward && job.H < 2 ? 1 : job.H / 2);
  const int64_t rows = rows_per_chunk(job);
  return (job.N * job.H * job.W + rows - 1) / rows;
}

void norm_run(const NormJob& job, int64_t begin, int64_t end) { run_at_best_level<Chunks>(job, begin, end); }

}  // namespace cxrfast
