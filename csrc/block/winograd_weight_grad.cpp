// winograd_weight_grad.cpp - winograd_weight_grad.h. The instruction (vdpbf16ps) adds the products of two tiles, so
// that both sides are kept as words of two neighbouring tiles, one a channel. Some pairs of tiles are transformed into
// buffers in the second cache, then sixteen matrix products add them to the gradient at each point of U; only at a
// part's end does it become one of nine taps.
//
// Along one direction the gradient of y (2 values) is (z0, z0 + z1, z0 - z1, -z1) at the points of M; the last sign is
// put right at the end. At four of sixteen points its values are the map's own.
#include "winograd_weight_grad.h"

#include <vector>

#include "winograd_tiles.h"

namespace cxrfast {
namespace {

constexpr int64_t kMaxParts = 16;      // more than a desktop's cores
constexpr int64_t kPairsOfPart = 256;  // at least: a part's end costs as much as the products of twenty pairs
constexpr int64_t kPairs = 56;         // of a chunk: few enough for the second cache, enough for a pass over the sums
constexpr int64_t kSome = 8;           // input channels of a product at once, against 32 output channels

Tiles pairs_of(const WinogradWeightGradJob& job) { return {(job.H + 1) / 2, ((job.W + 1) / 2 + 1) / 2}; }

#if defined(__x86_64__)

// V of `count` pairs of tiles of one row, sixteen channels of 32 from rows on; to[point][pair].
template <bool kOdd, bool kRelu>
CXRFAST_BF16 void transform_x(const ImageRows<4>& rows, int64_t first, int64_t count, Line* to, int64_t point_stride) {
  const auto load = [&rows](int64_t column, __m512 v[4]) CXRFAST_BF16 __attribute__((always_inline)) {
    column < 0 || column >= rows.W ? clear(v) : load_column<kOdd, kRelu>(rows, column, v);
  };
  __m512 a[4], b[4], c[4], d[4], e[4], f[4];
  load(4 * first - 1, a);
  load(4 * first, b);
  for (int64_t pair = first; pair < first + count; ++pair, ++to) {
    if constexpr (!kOdd) rows.template prefetch_below<4>(4 * pair);
    load(4 * pair + 1, c);
    load(4 * pair + 2, d);
    load(4 * pair + 3, e);
    load(4 * pair + 4, f);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Line* at = to + 4 * k * point_stride;
      store_pairs(at, a[k] - c[k], c[k] - e[k]);
      store_pairs(at + point_stride, b[k] + c[k], d[k] + e[k]);
      store_pairs(at + 2 * point_stride, c[k] - b[k], e[k] - d[k]);
      store_pairs(at + 3 * point_stride, b[k] - d[k], d[k] - f[k]);
      a[k] = e[k];
      b[k] = f[k];
    }
  }
}

// The same of grad, but for the signs.
template <bool kOdd>
CXRFAST_BF16 void transform_grad(const ImageRows<2>& rows, int64_t first, int64_t count, Line* to,
                                 int64_t point_stride) {
  const auto load = [&rows](int64_t column, __m512 v[4]) CXRFAST_BF16 __attribute__((always_inline)) {
    if (column >= rows.W) return clear(v);
    const __m512 z0 = widen<kOdd>(rows.at[0] + column * rows.step[0]);
    const __m512 z1 = widen<kOdd>(rows.at[1] + column * rows.step[1]);
    v[0] = z0, v[1] = z0 + z1, v[2] = z0 - z1, v[3] = z1;
  };
  __m512 a[4], b[4], c[4], d[4];
  for (int64_t pair = first; pair < first + count; ++pair, ++to) {
    if constexpr (!kOdd) rows.template prefetch_below<4>(4 * pair);
    load(4 * pair, a);
    load(4 * pair + 1, b);
    load(4 * pair + 2, c);
    load(4 * pair + 3, d);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Line* at = to + 4 * k * point_stride;
      store_pairs(at, a[k], c[k]);
      store_pairs(at + point_stride, a[k] + b[k], c[k] + d[k]);
      store_pairs(at + 2 * point_stride, a[k] - b[k], c[k] - d[k]);
      store_pairs(at + 3 * point_stride, b[k], d[k]);
    }
  }
}

// sums (8, 32) += over pairs of x[pair][0..8) times grad[half][pair][0..16)
CXRFAST_BF16 void add_products(const Line* x, int64_t channel, const Line* grad, int64_t grad_stride, int64_t pairs,
                               Line* to) {
  __m512 sums[kSome][2];
#pragma GCC unroll 8
  for (int i = 0; i < kSome; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sums[i][j] = _mm512_load_ps(to + 2 * i + j);
  const uint32_t* words = x->words + channel;
  for (int64_t pair = 0; pair < pairs; ++pair, ++grad, words += 16) {
    const __m512bh low = (__m512bh)_mm512_load_si512(grad), high = (__m512bh)_mm512_load_si512(grad + grad_stride);
#pragma GCC unroll 8
    for (int i = 0; i < kSome; ++i) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(int32_t(words[i]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], low, both);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], high, both);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSome; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm512_store_ps(to + 2 * i + j, sums[i][j]);
}

// The derivative of U by g, turned round: four values at the points become three taps.
CXRFAST_BF16 CXRFAST_INLINE void to_taps(const __m512 u[4], __m512 g[3]) {
  const __m512 half = _mm512_set1_ps(0.5f);
  g[0] = u[0] + half * (u[1] + u[2]);
  g[1] = half * (u[1] - u[2]);
  g[2] = half * (u[1] + u[2]) - u[3];  // the sign that transform_grad left out
}

// sums[point][out / 32][in][even, odd] to taps (3, 3, in, out)
CXRFAST_BF16 void finish_part(const WinogradWeightGradJob& job, const Line* sums, float* taps) {
  alignas(64) static constexpr int32_t kOrder[2][16] = {{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
                                                        {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
  const int64_t weights = job.in * job.out, point_stride = weights / 16;
  for (int64_t out = 0; out < job.out; out += kLineChannels)
    for (int64_t place = 0; place < job.in; ++place, sums += 2) {
      __m512 found[2][9];  // of even and odd output channels
      for (int half = 0; half < 2; ++half) {
        __m512 rows[3][4];
        for (int x = 0; x < 4; ++x) {
          __m512 u[4], g[3];
          for (int y = 0; y < 4; ++y) u[y] = _mm512_load_ps(sums + half + (4 * y + x) * point_stride);
          to_taps(u, g);
          for (int y = 0; y < 3; ++y) rows[y][x] = g[y];
        }
        for (int y = 0; y < 3; ++y) to_taps(rows[y], found[half] + 3 * y);
      }
      const int64_t in = place / kLineChannels * kLineChannels + channel_at(place % kLineChannels);
      for (int tap = 0; tap < 9; ++tap)
        for (int half = 0; half < 2; ++half)
          _mm512_storeu_ps(taps + tap * weights + in * job.out + out + 16 * half,
                           _mm512_permutex2var_ps(found[0][tap], _mm512_load_si512(kOrder[half]), found[1][tap]));
    }
}

#endif

}  // namespace

int64_t winograd_weight_grad_parts(const WinogradWeightGradJob& job) {
  return parts_for(pairs_of(job).count(job.N), kPairsOfPart, kMaxParts);
}

void winograd_weight_grad_run(const WinogradWeightGradJob& job, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  const Tiles tiles = pairs_of(job);
  const int64_t all = tiles.count(job.N), parts = winograd_weight_grad_parts(job), some = kPairs;
  const int64_t x_stride = job.in / 16 * some, grad_stride = job.out / 16 * some;
  const int64_t sums_stride = job.in * job.out / 16;
  std::vector<LineAffine> affines;
  if (job.scale != nullptr) affines = line_affines(job.scale, job.shift, job.in);
  // x and grad: [point][sixteen channels][pair]; sums: [point][out / 32][in][2]
  std::vector<Line> x(size_t(kPoints * x_stride)), grad(size_t(kPoints * grad_stride)),
      sums(size_t(kPoints * sums_stride));
  for (int64_t part = begin; part < end; ++part) {
    std::fill(sums.begin(), sums.end(), Line{});
    const int64_t last = all * (part + 1) / parts;
    for (int64_t first_pair = all * part / parts; first_pair < last; first_pair += some) {
      const int64_t stop = std::min(last, first_pair + some);
      for (Stretch at(tiles, first_pair, stop); at.count > 0; at.next()) {
        for (int64_t c = 0; c < job.in; c += kLineChannels) {
          const uint16_t* from = job.x + at.image * job.H * job.W * job.in + c;
          const LineAffine* affine = job.scale == nullptr ? nullptr : affines.data() + c / kLineChannels;
          const ImageRows<4> rows(from, job.H, job.W, job.in, 2 * at.row - 1, affine);
          const auto even = affine == nullptr ? transform_x<false, false> : transform_x<false, true>;
          const auto odd = affine == nullptr ? transform_x<true, false> : transform_x<true, true>;
          Line* to = x.data() + c / 16 * some + at.offset;
          even(rows, at.first, at.count, to, x_stride);
          odd(rows, at.first, at.count, to + some, x_stride);
        }
        for (int64_t c = 0; c < job.out; c += kLineChannels) {
          const uint16_t* from = job.grad + at.image * job.H * job.W * job.out + c;
          const ImageRows<2> rows(from, job.H, job.W, job.out, 2 * at.row);
          Line* to = grad.data() + c / 16 * some + at.offset;
          transform_grad<false>(rows, at.first, at.count, to, grad_stride);
          transform_grad<true>(rows, at.first, at.count, to + some, grad_stride);
        }
      }
      for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t out = 0; out < job.out; out += kLineChannels)
          for (int64_t in = 0; in < job.in; in += kSome)
            add_products(x.data() + point * x_stride + in / 16 * some, in % 16,
                         grad.data() + point * grad_stride + out / 16 * some, some, stop - first_pair,
                         sums.data() + point * sums_stride + (out / kLineChannels * job.in + in) * 2);
    }
    finish_part(job, sums.data(), job.partial + part * 9 * job.in * job.out);
  }
#else
  (void)job, (void)begin, (void)end;
#endif
}

}  // namespace cxrfast
