// winograd_conv.cpp - winograd_conv.h. A chunk's tiles are transformed into a buffer in the second cache; for sixteen
// output channels at a time, sixteen matrix products follow, four points of a row of M at once in registers, so that
// the way back begins there and half of M is never stored.
#include "winograd_conv.h"

#include <vector>

#include "winograd_tiles.h"

namespace cxrfast {
namespace {

constexpr int64_t kSome =
    7;  // tiles at once: with four points 28 sums, of 32 registers; sides of 14 k pixels have no rest

Tiles tiles_of(const WinogradConvJob& job) { return {(job.H + 1) / 2, (job.W + 1) / 2}; }

// A quarter of a second cache of 1 MiB, and no more than keeps the sums of sixteen output channels in the first.
int64_t tiles_per_chunk(const WinogradConvJob& job) {
  const int64_t tile_nbytes = kPoints * job.in * 2;
  return kSome * std::clamp<int64_t>((1 << 18) / (kSome * tile_nbytes), 1, 8);
}

#if defined(__x86_64__)

// V of `count` tiles of one row, 32 channels from rows on; to[point][tile].
template <bool kRelu>
CXRFAST_BF16 void transform_tiles(const ImageRows<4>& rows, int64_t first, int64_t count, Line* to,
                                  int64_t point_stride) {
  using Column = __m512[2][4];  // even and odd channels
  Column a, b, c, d;
  const auto load = [&rows](int64_t column, Column& v) CXRFAST_BF16 __attribute__((always_inline)) {
    if (column < 0 || column >= rows.W) {
      clear(v[0]), clear(v[1]);
    } else {
      load_column<false, kRelu>(rows, column, v[0]);
      load_column<true, kRelu>(rows, column, v[1]);
    }
  };
  load(2 * first - 1, a);
  load(2 * first, b);
  for (int64_t tile = first; tile < first + count; ++tile, ++to) {
    rows.prefetch_below<2>(2 * tile);
    load(2 * tile + 1, c);
    load(2 * tile + 2, d);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Line* at = to + 4 * k * point_stride;
      const auto store = [](Line* line, __m512 even, __m512 odd) CXRFAST_BF16
          __attribute__((always_inline)) { _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh(odd, even)); };
      store(at, a[0][k] - c[0][k], a[1][k] - c[1][k]);
      store(at + point_stride, b[0][k] + c[0][k], b[1][k] + c[1][k]);
      store(at + 2 * point_stride, c[0][k] - b[0][k], c[1][k] - b[1][k]);
      store(at + 3 * point_stride, b[0][k] - d[0][k], b[1][k] - d[1][k]);
      a[0][k] = c[0][k], a[1][k] = c[1][k];  // the next tile's first two columns
      b[0][k] = d[0][k], b[1][k] = d[1][k];
    }
  }
}

// Four points in a row of M for seven tiles and sixteen output channels, half transformed: half[column][tile].
// v[point][line][tile], u[point][line][pair of channels].
CXRFAST_BF16 void multiply_row(const Line* v, int64_t tiles, int64_t lines, const Line* u, Line* half) {
  __m512 sums[4][kSome];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
#pragma GCC unroll 7
    for (int t = 0; t < kSome; ++t) sums[k][t] = _mm512_setzero_ps();
  const int64_t v_stride = lines * tiles * 16, u_stride = lines * 16;
  const uint32_t* words = v->words;  // g++ 12 keeps a pointer to every one of v[...].words, most of them in memory
  for (int64_t line = 0; line < lines; ++line, words += tiles * 16) {
#pragma GCC unroll 1
    for (int pair = 0; pair < 16; ++pair, ++u) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512bh kernel = (__m512bh)_mm512_load_si512(u + k * u_stride);
#pragma GCC unroll 7
        for (int t = 0; t < kSome; ++t) {
          const __m512i both = _mm512_set1_epi32(int32_t(words[k * v_stride + 16 * t + pair]));
          sums[k][t] = _mm512_dpbf16_ps(sums[k][t], kernel, (__m512bh)both);
        }
      }
    }
  }
#pragma GCC unroll 7
  for (int t = 0; t < kSome; ++t) {
    _mm512_store_ps(half + t, sums[0][t] + sums[1][t] + sums[2][t]);
    _mm512_store_ps(half + tiles + t, sums[1][t] - sums[2][t] - sums[3][t]);
  }
}

// The rest of the way back, for tiles of one row: half[row of M][column][tile].
CXRFAST_BF16 void finish_tiles(const WinogradConvJob& job, uint16_t* image, int64_t row, int64_t first, int64_t count,
                               const Line* half, int64_t tiles) {
  const bool below = 2 * row + 1 < job.H;
  for (int64_t tile = first; tile < first + count; ++tile, ++half)
#pragma GCC unroll 2
    for (int column = 0; column < 2; ++column) {
      const int64_t x = 2 * tile + column;
      if (x >= job.W) continue;
      __m512 m[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) m[k] = _mm512_load_ps(half + (2 * k + column) * tiles);
      uint16_t* to = image + (2 * row * job.W + x) * job.out;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(m[0] + m[1] + m[2]));
      if (!below) continue;
      to += job.W * job.out;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(m[1] - m[2] - m[3]));
    }
}

// Asks for the pixels that seven tiles will write.
void prefetch_result(const WinogradConvJob& job, const Tiles& tiles, int64_t tile, int64_t channel) {
  const int64_t row = tile / tiles.across, y = row / tiles.rows * job.H + row % tiles.rows * 2;
  const uint16_t* to = job.result + (y * job.W + tile % tiles.across * 2) * job.out + channel;
  for (int64_t k = 0; k < 2 * kSome; ++k) {
    __builtin_prefetch(to + k * job.out, 1, 3);
    __builtin_prefetch(to + (job.W + k) * job.out, 1, 3);
  }
}

// U of sixteen output channels and two input channels; to[point].
CXRFAST_BF16 void pack_pair(const float* const channels[2], const KernelView& kernel, Line* to, int64_t point_stride) {
  __m512 u[2][4][4];
  const __m512 half = _mm512_set1_ps(0.5f);
  const auto transform = [half](__m512 g0, __m512 g1, __m512 g2, __m512& u0, __m512& u1, __m512& u2, __m512& u3)
                             CXRFAST_BF16 __attribute__((always_inline)) {
                               u0 = g0;
                               u1 = half * (g0 + g1 + g2);
                               u2 = half * (g0 - g1 + g2);
                               u3 = g2;
                             };
  for (int channel = 0; channel < 2; ++channel) {
    __m512 rows[3][4];
    for (int y = 0; y < 3; ++y) {
      float taps[3][16];
      for (int x = 0; x < 3; ++x)
        for (int k = 0; k < 16; ++k)
          taps[x][k] = channels[channel][y * kernel.y_stride + x * kernel.x_stride + k * kernel.out_stride];
      transform(_mm512_loadu_ps(taps[0]), _mm512_loadu_ps(taps[1]), _mm512_loadu_ps(taps[2]), rows[y][0], rows[y][1],
                rows[y][2], rows[y][3]);
    }
    for (int x = 0; x < 4; ++x)
      transform(rows[0][x], rows[1][x], rows[2][x], u[channel][0][x], u[channel][1][x], u[channel][2][x],
                u[channel][3][x]);
  }
  for (int k = 0; k < 16; ++k) store_pairs(to + k * point_stride, u[0][k / 4][k % 4], u[1][k / 4][k % 4]);
}

#endif

}  // namespace

// packed[out / 16][point][in / 2]
void winograd_pack(const WinogradConvJob& job, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  const int64_t pairs = job.in / 2;
  for (int64_t block = 2 * begin; block < 2 * end; ++block)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const float* const from = job.kernel.at + block * 16 * job.kernel.out_stride;
      const int64_t line = pair / 16 * kLineChannels, place = pair % 16 * 2;
      const float* const channels[2] = {from + (line + channel_at(place)) * job.kernel.in_stride,
                                        from + (line + channel_at(place + 1)) * job.kernel.in_stride};
      pack_pair(channels, job.kernel, job.packed + block * kPoints * pairs + pair, pairs);
    }
#else
  (void)job, (void)begin, (void)end;
#endif
}

int64_t winograd_conv_chunks(const WinogradConvJob& job) {
  const int64_t some = tiles_per_chunk(job);
  return (tiles_of(job).count(job.N) + some - 1) / some;
}

void winograd_conv_run(const WinogradConvJob& job, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  const Tiles tiles = tiles_of(job);
  const int64_t all = tiles.count(job.N), some = tiles_per_chunk(job), lines = job.in / kLineChannels;
  std::vector<LineAffine> affines;
  if (job.scale != nullptr) affines = line_affines(job.scale, job.shift, job.in);
  std::vector<Line> v(size_t(kPoints * lines * some)), half(size_t(8 * some));
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first_tile = chunk * some, stop = std::min(all, first_tile + some);
    for (Stretch at(tiles, first_tile, stop); at.count > 0; at.next())
      for (int64_t line = 0; line < lines; ++line) {
        const uint16_t* from = job.x + at.image * job.H * job.W * job.in + line * kLineChannels;
        const LineAffine* affine = job.scale == nullptr ? nullptr : affines.data() + line;
        const ImageRows<4> rows(from, job.H, job.W, job.in, 2 * at.row - 1, affine);
        const auto transform = affine == nullptr ? transform_tiles<false> : transform_tiles<true>;
        transform(rows, at.first, at.count, v.data() + line * some + at.offset, lines * some);
      }
    for (int64_t block = 0; block < job.out / 16; ++block) {
      const Line* u = job.packed + block * kPoints * job.in / 2;
      for (int64_t k = 0; k < 4; ++k)
        for (int64_t t = 0; t < stop - first_tile; t += kSome) {
          // two blocks share a cache line
          if (k == 3 && block % 2 == 0) prefetch_result(job, tiles, first_tile + t, block * 16);
          multiply_row(v.data() + 4 * k * lines * some + t, some, lines, u + 4 * k * job.in / 2,
                       half.data() + 2 * k * some + t);
        }
      for (Stretch at(tiles, first_tile, stop); at.count > 0; at.next()) {
        uint16_t* to = job.result + at.image * job.H * job.W * job.out + block * 16;
        finish_tiles(job, to, at.row, at.first, at.count, half.data() + at.offset, some);
      }
    }
  }
#else
  (void)job, (void)begin, (void)end;
#endif
}

}  // namespace cxrfast
