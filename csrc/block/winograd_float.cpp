// winograd_float.cpp - winograd_float.h. Written once over the vectors of lanes.h. A product at one point of a tile has
// two vectors of output channels and as many tiles (or input channels) as leave the sums in registers; unlike
// winograd_conv.cpp it stores all of M, whose cost beside twice as many multiplications is small.
#include "winograd_float.h"

#include <vector>

#include "winograd_tiles.h"

namespace cxrfast {
namespace {

constexpr int64_t kChannels = 16;  // of a line: 64 bytes

// Tiles at once against two vectors of output channels: 28 sums of 32 registers, or 12 of 16.
template <int n>
constexpr int64_t kSome = n == 16 ? 14 : 6;
// Input channels at once, in the weights' gradient.
template <int n>
constexpr int64_t kIn = n == 16 ? 8 : 4;

// Tiles of a chunk of the convolution, and of the weights' gradient: whose buffers stay in a second cache.
constexpr int64_t kConvTiles = 42, kGradTiles = 56;
static_assert(kConvTiles % kSome<16> == 0 && kConvTiles % kSome<8> == 0 && kConvTiles % kSome<4> == 0);

constexpr int64_t kMaxParts = 16;      // more than a desktop's cores
constexpr int64_t kTilesOfPart = 512;  // at least: a part's end costs as much as the products of forty tiles

Tiles tiles_of(const WinogradFloatJob& job) { return {(job.H + 1) / 2, (job.W + 1) / 2}; }

alignas(64) constexpr float kZeros[kChannels] = {};

// Four neighbouring rows of an image, zero outside it, from a channel on; or, with scale and shift, relu(x * scale +
// shift). Sixteen channels each.
struct SourceRows {
  const float *at[4], *scale[4], *shift[4];
  int64_t step[4];
  const float* below;
  int64_t W, C;

  CXRFAST_INLINE SourceRows(const WinogradFloatJob& job, int64_t image, int64_t channel, int64_t y)
      : W(job.W), C(job.in) {
    const float* from = job.x + image * job.H * W * C + channel;
    for (int k = 0; k < 4; ++k) {
      const bool inside = y + k >= 0 && y + k < job.H;
      at[k] = inside ? from + (y + k) * W * C : kZeros;
      step[k] = inside ? C : 0;
      // the padding is of what comes after the ReLU
      scale[k] = inside && job.scale != nullptr ? job.scale + channel : kZeros;
      shift[k] = inside && job.scale != nullptr ? job.shift + channel : kZeros;
    }
    below = from + (y + 4) * W * C;
  }
};

// One column of V along the rows; n channels from c on.
template <int n, bool kRelu>
CXRFAST_INLINE void load_column(const SourceRows& rows, int64_t column, int c, typename Lanes<n>::F v[4]) {
  using L = Lanes<n>;
  using F = typename L::F;
  if (column < 0 || column >= rows.W) {
    v[0] = v[1] = v[2] = v[3] = F{};
    return;
  }
  F d[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    L::load(rows.at[k] + column * rows.step[k] + c, d[k]);
    if constexpr (kRelu) {
      F scale, shift;
      L::load(rows.scale[k] + c, scale);
      L::load(rows.shift[k] + c, shift);
      const F y = d[k] * scale + shift;
      d[k] = y < 0 ? F{} : y;  // this way round a NaN passes, and training's guard sees it
    }
  }
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// V of `count` tiles of one row, n channels from c on; to[point][tile], a line apart.
template <int n, bool kRelu>
CXRFAST_INLINE void transform_x(const SourceRows& rows, int c, int64_t first, int64_t count, float* to,
                                int64_t point_stride) {
  using L = Lanes<n>;
  typename L::F v[4][4];  // columns
  load_column<n, kRelu>(rows, 2 * first - 1, c, v[0]);
  load_column<n, kRelu>(rows, 2 * first, c, v[1]);
  for (int64_t tile = first; tile < first + count; ++tile, to += kChannels) {
    // what the next row of tiles begins with: it is here when its turn comes; outside the map it is no fault
    const float* below = rows.below + 2 * tile * rows.C;
    if (c == 0) {
      __builtin_prefetch(below, 0, 2);
      __builtin_prefetch(below + rows.C, 0, 2);
      __builtin_prefetch(below + rows.W * rows.C, 0, 2);
      __builtin_prefetch(below + (rows.W + 1) * rows.C, 0, 2);
    }
    load_column<n, kRelu>(rows, 2 * tile + 1, c, v[2]);
    load_column<n, kRelu>(rows, 2 * tile + 2, c, v[3]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      float* at = to + c + 4 * k * point_stride;
      L::store(at, v[0][k] - v[2][k]);
      L::store(at + point_stride, v[1][k] + v[2][k]);
      L::store(at + 2 * point_stride, v[2][k] - v[1][k]);
      L::store(at + 3 * point_stride, v[1][k] - v[3][k]);
      v[0][k] = v[2][k];
      v[1][k] = v[3][k];
    }
  }
}

// All of x's channels, of the tiles [begin, end); v[point][line][tile].
template <int n>
CXRFAST_INLINE void transform_chunk(const WinogradFloatJob& job, const Tiles& tiles, int64_t begin, int64_t end,
                                    float* v, int64_t some) {
  for (Stretch at(tiles, begin, end); at.count > 0; at.next())
    for (int64_t line = 0; line < job.in / kChannels; ++line) {
      const SourceRows rows(job, at.image, line * kChannels, at.row * 2 - 1);
      float* to = v + (line * some + at.offset) * kChannels;
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; c += n)
        job.scale == nullptr ? transform_x<n, false>(rows, c, at.first, at.count, to, job.in * some)
                             : transform_x<n, true>(rows, c, at.first, at.count, to, job.in * some);
    }
}

// ---- the convolution ----

// One point of M for some tiles and 2 n output channels; v[line][tile], u[in][2 n].
template <int n>
CXRFAST_INLINE void multiply(const float* v, int64_t tiles, int64_t in, const float* u, float* m) {
  using L = Lanes<n>;
  constexpr int kTs = int(kSome<n>);
  typename L::F sums[kTs][2];
#pragma GCC unroll 14
  for (int t = 0; t < kTs; ++t) sums[t][0] = sums[t][1] = typename L::F{};
  for (int64_t line = 0; line < in; line += kChannels, v += tiles * kChannels)
#pragma GCC unroll 1
    for (int c = 0; c < kChannels; ++c, u += 2 * n) {
      typename L::F low, high;
      L::load(u, low);
      L::load(u + n, high);
#pragma GCC unroll 14
      for (int t = 0; t < kTs; ++t) {
        const float value = v[t * kChannels + c];
        sums[t][0] += low * value;
        sums[t][1] += high * value;
      }
    }
#pragma GCC unroll 14
  for (int t = 0; t < kTs; ++t) {
    L::store(m + t * 2 * n, sums[t][0]);
    L::store(m + t * 2 * n + n, sums[t][1]);
  }
}

// The way back for n output channels of tiles of one row; m[point][tile].
template <int n>
CXRFAST_INLINE void finish_tiles(const WinogradFloatJob& job, float* image, int64_t row, int64_t first, int64_t count,
                                 const float* m, int64_t point_stride) {
  using L = Lanes<n>;
  for (int64_t tile = first; tile < first + count; ++tile, m += 2 * n) {
    typename L::F half[4][2];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      typename L::F p[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) L::load(m + (4 * k + j) * point_stride, p[j]);
      half[k][0] = p[0] + p[1] + p[2];
      half[k][1] = p[1] - p[2] - p[3];
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t x = 2 * tile + j;
      if (x >= job.W) continue;
      float* to = image + (2 * row * job.W + x) * job.out;
      L::store(to, half[0][j] + half[1][j] + half[2][j]);
      if (2 * row + 1 < job.H) L::store(to + job.W * job.out, half[1][j] - half[2][j] - half[3][j]);
    }
  }
}

struct Convolution {
  template <int n>
  static CXRFAST_INLINE void run(const WinogradFloatJob& job, int64_t begin, int64_t end) {
    const Tiles tiles = tiles_of(job);
    const int64_t all = tiles.count(job.N), some = kConvTiles;
    std::vector<FloatLine> for_v(size_t(some * job.in)), for_m(size_t(some * 2 * n));
    float *v = for_v[0].values, *m = for_m[0].values;
    const int64_t point_stride = some * 2 * n;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first_tile = chunk * some, stop = all < first_tile + some ? all : first_tile + some;
      transform_chunk<n>(job, tiles, first_tile, stop, v, some);
      for (int64_t out = 0; out < job.out; out += 2 * n) {
        for (int64_t point = 0; point < kPoints; ++point)
          for (int64_t t = 0; t < stop - first_tile; t += kSome<n>)
            multiply<n>(v + (point * job.in / kChannels * some + t) * kChannels, some, job.in,
                        job.packed->values + (out * kPoints + point * 2 * n) * job.in,
                        m + point * point_stride + t * 2 * n);
        for (Stretch at(tiles, first_tile, stop); at.count > 0; at.next()) {
          float* image = job.result + at.image * job.H * job.W * job.out + out;
          for (int j = 0; j < 2; ++j)
            finish_tiles<n>(job, image + j * n, at.row, at.first, at.count, m + at.offset * 2 * n + j * n,
                            point_stride);
        }
      }
    }
  }
};

// U along one direction.
template <class F>
CXRFAST_INLINE void transform_kernel(const F g[3], F u[4]) {
  const F sides = g[0] + g[2];
  u[0] = g[0];
  u[1] = 0.5f * (sides + g[1]);
  u[2] = 0.5f * (sides - g[1]);
  u[3] = g[2];
}

// packed[out / 2 n][point][in][2 n]
struct Pack {
  template <int n>
  static CXRFAST_INLINE void run(const WinogradFloatJob& job, int64_t begin, int64_t end) {
    using L = Lanes<n>;
    using F = typename L::F;
    const KernelView& kernel = job.kernel;
    for (int64_t out = begin * kWinogradChannels; out < end * kWinogradChannels; out += n)
      for (int64_t in = 0; in < job.in; ++in) {
        const float* from = kernel.at + out * kernel.out_stride + in * kernel.in_stride;
        F rows[3][4], columns[4][4];
        for (int y = 0; y < 3; ++y) {
          F taps[3];
          for (int x = 0; x < 3; ++x) {
            float values[n];
            for (int k = 0; k < n; ++k)
              values[k] = from[y * kernel.y_stride + x * kernel.x_stride + k * kernel.out_stride];
            L::load(values, taps[x]);
          }
          transform_kernel(taps, rows[y]);
        }
        for (int x = 0; x < 4; ++x) {
          const F taps[3] = {rows[0][x], rows[1][x], rows[2][x]};
          transform_kernel(taps, columns[x]);
        }
        float* to = job.packed->values + out / (2 * n) * 2 * n * kPoints * job.in + in * 2 * n + out % (2 * n);
        for (int64_t point = 0; point < kPoints; ++point)
          L::store(to + point * job.in * 2 * n, columns[point % 4][point / 4]);
      }
  }
};

// ---- the weights' gradient ----

// The gradient of n output channels at the points of M, of tiles of one row; to[point][tile], a line apart. Along one
// direction it is (z0, z0 + z1, z0 - z1, -z1); the last sign is put right at the end.
template <int n>
CXRFAST_INLINE void transform_grad(const WinogradFloatJob& job, const float* image, int64_t row, int64_t first,
                                   int64_t count, float* to, int64_t point_stride) {
  using L = Lanes<n>;
  using F = typename L::F;
  for (int64_t tile = first; tile < first + count; ++tile, to += kChannels) {
    F z[2][4];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      F d[2] = {F{}, F{}};
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k)
        if (2 * row + k < job.H && 2 * tile + j < job.W)
          L::load(image + ((2 * row + k) * job.W + 2 * tile + j) * job.out, d[k]);
      z[j][0] = d[0], z[j][1] = d[0] + d[1], z[j][2] = d[0] - d[1], z[j][3] = d[1];
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      float* at = to + 4 * k * point_stride;
      L::store(at, z[0][k]);
      L::store(at + point_stride, z[0][k] + z[1][k]);
      L::store(at + 2 * point_stride, z[0][k] - z[1][k]);
      L::store(at + 3 * point_stride, z[1][k]);
    }
  }
}

// to (kIn, 2 n) += over tiles of x[tile][0..kIn) times grad[tile][0..n) and next_grad[tile][0..n)
template <int n>
CXRFAST_INLINE void add_products(const float* x, const float* grad, const float* next_grad, int64_t tiles, float* to) {
  using L = Lanes<n>;
  constexpr int kIns = int(kIn<n>);
  typename L::F sums[kIns][2];  // from zero: they lose less than a running sum of all chunks would
#pragma GCC unroll 8
  for (int i = 0; i < kIns; ++i) sums[i][0] = sums[i][1] = typename L::F{};
  for (int64_t tile = 0; tile < tiles; ++tile, x += kChannels, grad += kChannels, next_grad += kChannels) {
    typename L::F low, high;
    L::load(grad, low);
    L::load(next_grad, high);
#pragma GCC unroll 8
    for (int i = 0; i < kIns; ++i) {
      const float value = x[i];
      sums[i][0] += low * value;
      sums[i][1] += high * value;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kIns; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j, to += n) {
      typename L::F before;
      L::load(to, before);
      L::store(to, before + sums[i][j]);
    }
}

template <class F>
CXRFAST_INLINE void to_taps(const F u[4], F g[3]) {
  const F sides = 0.5f * (u[1] + u[2]);
  g[0] = u[0] + sides;
  g[1] = 0.5f * (u[1] - u[2]);
  g[2] = sides - u[3];  // the sign that transform_grad left out
}

// sums[point][out / 2 n][in][2 n] to taps (3, 3, in, out)
template <int n>
CXRFAST_INLINE void finish_part(const WinogradFloatJob& job, const float* sums, float* taps) {
  using L = Lanes<n>;
  using F = typename L::F;
  const int64_t weights = job.in * job.out;
  for (int64_t out = 0; out < job.out; out += n)
    for (int64_t in = 0; in < job.in; ++in) {
      const float* from = sums + out / (2 * n) * 2 * n * job.in + in * 2 * n + out % (2 * n);
      F rows[3][4];
      for (int x = 0; x < 4; ++x) {
        F u[4], g[3];
        for (int y = 0; y < 4; ++y) L::load(from + (4 * y + x) * weights, u[y]);
        to_taps(u, g);
        for (int y = 0; y < 3; ++y) rows[y][x] = g[y];
      }
      for (int y = 0; y < 3; ++y) {
        F g[3];
        to_taps(rows[y], g);
        for (int x = 0; x < 3; ++x) L::store(taps + (3 * y + x) * weights + in * job.out + out, g[x]);
      }
    }
}

struct WeightGrad {
  template <int n>
  static CXRFAST_INLINE void run(const WinogradFloatJob& job, int64_t begin, int64_t end) {
    const Tiles tiles = tiles_of(job);
    const int64_t all = tiles.count(job.N), parts = winograd_float_parts(job), weights = job.in * job.out;
    std::vector<FloatLine> for_x(size_t(kGradTiles * job.in)), for_grad(size_t(kGradTiles * job.out)),
        for_sums(size_t(job.in * job.out));
    float *x = for_x[0].values, *grad = for_grad[0].values, *sums = for_sums[0].values;
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t k = 0; k < kPoints * weights; ++k) sums[k] = 0;
      const int64_t last = all * (part + 1) / parts;
      for (int64_t first_tile = all * part / parts; first_tile < last; first_tile += kGradTiles) {
        const int64_t stop = last < first_tile + kGradTiles ? last : first_tile + kGradTiles;
        transform_chunk<n>(job, tiles, first_tile, stop, x, kGradTiles);
        for (Stretch at(tiles, first_tile, stop); at.count > 0; at.next()) {
          const float* image = job.grad + at.image * job.H * job.W * job.out;
          for (int64_t c = 0; c < job.out; c += n)
            transform_grad<n>(job, image + c, at.row, at.first, at.count,
                              grad + (c / kChannels * kGradTiles + at.offset) * kChannels + c % kChannels,
                              job.out * kGradTiles);
        }
        const auto line_of = [](float* lines, int64_t point, int64_t channels, int64_t c) {
          return lines + (point * channels + c / kChannels * kChannels) * kGradTiles + c % kChannels;
        };
        for (int64_t point = 0; point < kPoints; ++point)
          for (int64_t out = 0; out < job.out; out += 2 * n)
            for (int64_t in = 0; in < job.in; in += kIn<n>)
              add_products<n>(line_of(x, point, job.in, in), line_of(grad, point, job.out, out),
                              line_of(grad, point, job.out, out + n), stop - first_tile,
                              sums + point * weights + out * job.in + in * 2 * n);
      }
      finish_part<n>(job, sums, job.partial + part * 9 * weights);
    }
  }
};

}  // namespace

bool winograd_float_supported() { return best_level() != Level::kPortable; }

void winograd_float_pack(const WinogradFloatJob& job, int64_t begin, int64_t end) {
  run_at_best_level<Pack>(job, begin, end);
}

int64_t winograd_float_chunks(const WinogradFloatJob& job) {
  return (tiles_of(job).count(job.N) + kConvTiles - 1) / kConvTiles;
}

void winograd_float_run(const WinogradFloatJob& job, int64_t begin, int64_t end) {
  run_at_best_level<Convolution>(job, begin, end);
}

int64_t winograd_float_parts(const WinogradFloatJob& job) {
  return parts_for(tiles_of(job).count(job.N), kTilesOfPart, kMaxParts);
}

void winograd_float_weight_grad(const WinogradFloatJob& job, int64_t begin, int64_t end) {
  run_at_best_level<WeightGrad>(job, begin, end);
}

}  // namespace cxrfast
