// winograd_tiles.h - Winograd's F(2x2, 3x3), and what the files that use it share: the walk over tiles, and V of
// bfloat16 maps.
//
// A tile is 2x2 pixels of the convolution's result (or of its gradient) and the 4x4 pixels of x that they come from.
// Along one direction, for x d, kernel g and result y:
//
//   V = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
//   U = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   y = (M0 + M1 + M2, M1 - M2 - M3)   with M = U V, 4 products where the sum itself has 6
//
// and in both directions 16 products, one at each of 16 points, where it has 36. The weights' gradient is the same read
// backwards, with (z0, z0 + z1, z0 - z1, -z1) of the gradient z of y in M's place. In bfloat16 V, U and these are
// rounded, all else is float. Source: Lavin & Gray 2015, Fast Algorithms for Convolutional Neural Networks,
// section 4.1.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace cxrfast {

constexpr int64_t kPoints = 16;
constexpr int64_t kLineChannels = 32;  // channels of a cache line, which are handled together

// Sixteen pairs of bfloat16, as the products take them: one 32-bit word of V, against sixteen of U.
struct alignas(64) Line {
  uint32_t words[16];
};

// Tiles of N images, counted image by image and row by row. `across` is what a row holds: tiles, or pairs of them.
struct Tiles {
  int64_t rows, across;  // of an image

  int64_t count(int64_t N) const { return N * rows * across; }
};

// Tiles [begin, end), one stretch within a row after the other; none is left where count is 0.
struct Stretch {
  int64_t image, row, first, count;
  int64_t offset = 0;  // of the stretch, from begin

  CXRFAST_INLINE Stretch(const Tiles& all, int64_t begin_tile, int64_t end_tile)
      : tiles(all), begin(begin_tile), end(end_tile) {
    find();
  }
  CXRFAST_INLINE void next() {
    offset += count;
    find();
  }

 private:
  const Tiles tiles;
  const int64_t begin, end;

  CXRFAST_INLINE void find() {
    const int64_t at = begin + offset, any_row = at / tiles.across;
    image = any_row / tiles.rows, row = any_row % tiles.rows, first = at % tiles.across;
    count = std::min(tiles.across - first, end - at);
  }
};

// Which channel of its 32 stands at a place of a transformed line: the even ones first, because widening a line's even
// and odd values is one operation each.
constexpr int64_t channel_at(int64_t place) { return place < 16 ? 2 * place : 2 * place - 31; }

#if defined(__x86_64__)
#define CXRFAST_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

alignas(64) inline constexpr uint16_t kZeroLine[kLineChannels] = {};

// What a batch norm is for one batch, of a line's even and odd channels.
struct alignas(64) LineAffine {
  float scale[2][16], shift[2][16];
};
inline constexpr LineAffine kZeroAffine = {};

// Of `count` channels.
inline std::vector<LineAffine> line_affines(const float* scale, const float* shift, int64_t count) {
  std::vector<LineAffine> lines(size_t(count / kLineChannels));
  for (int64_t c = 0; c < count; ++c) {
    LineAffine& line = lines[size_t(c / kLineChannels)];
    line.scale[c % 2][c % kLineChannels / 2] = scale[c];
    line.shift[c % 2][c % kLineChannels / 2] = shift[c];
  }
  return lines;
}

// `kRows` neighbouring rows of an image, zero outside it, from a channel on; or, with an affine map, relu(affine(it)).
template <int kRows>
struct ImageRows {
  const uint16_t* at[kRows];
  int64_t step[kRows];
  const LineAffine* affine[kRows];
  const uint16_t* below;
  int64_t W, C;

  ImageRows(const uint16_t* image, int64_t H, int64_t width, int64_t channels, int64_t y,
            const LineAffine* line = nullptr)
      : W(width), C(channels) {
    for (int k = 0; k < kRows; ++k) {
      const bool inside = y + k >= 0 && y + k < H;
      at[k] = inside ? image + (y + k) * W * C : kZeroLine;
      step[k] = inside ? C : 0;
      affine[k] = inside ? line : &kZeroAffine;  // the padding is of what comes after the ReLU
    }
    below = image + (y + kRows) * W * C;
  }

  // Asks for pixels of the two rows below, which the next row of tiles begins with: they are here when its turn comes.
  // An address outside the map is no fault.
  template <int kCount>
  CXRFAST_INLINE void prefetch_below(int64_t column) const {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      __builtin_prefetch(below + (column + k) * C, 0, 2);
      __builtin_prefetch(below + (W + column + k) * C, 0, 2);
    }
  }
};

// The even or the odd channels of a line of 32, as floats.
template <bool kOdd>
CXRFAST_BF16 CXRFAST_INLINE __m512 widen(const uint16_t* line) {
  const auto both = (Vectors<16>::U)_mm512_loadu_si512(line);
  return (__m512)(kOdd ? both & 0xFFFF0000u : both << 16);
}

CXRFAST_BF16 CXRFAST_INLINE void clear(__m512 v[4]) { v[0] = v[1] = v[2] = v[3] = _mm512_setzero_ps(); }

// One column of V along the rows.
template <bool kOdd, bool kRelu>
CXRFAST_BF16 CXRFAST_INLINE void load_column(const ImageRows<4>& rows, int64_t column, __m512 v[4]) {
  __m512 d[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    d[k] = widen<kOdd>(rows.at[k] + column * rows.step[k]);
    if constexpr (kRelu) {
      const __m512 scale = _mm512_load_ps(rows.affine[k]->scale[kOdd]);
      const __m512 y = _mm512_fmadd_ps(d[k], scale, _mm512_load_ps(rows.affine[k]->shift[kOdd]));
      // this way round a NaN passes, and training's guard sees it; masked, because g++ 12 warns of the plain one
      d[k] = _mm512_maskz_max_ps(0xFFFF, _mm512_setzero_ps(), y);
    }
  }
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// Words of (first, second), rounded.
CXRFAST_BF16 CXRFAST_INLINE void store_pairs(Line* to, __m512 first, __m512 second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#endif

// Parts of at least `each` of `count` things, at most so many: a power of two, which threads share evenly.
inline int64_t parts_for(int64_t count, int64_t each, int64_t most) {
  int64_t parts = 1;
  while (parts < most && 2 * parts * each <= count) parts *= 2;
  return parts;
}

}  // namespace cxrfast
