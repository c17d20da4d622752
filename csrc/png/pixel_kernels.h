// pixel_kernels.h - the inner loops of un-filter and resample, one set for each instruction set. Private to
// resample.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace cxrfast::png {

// Note [the window]
// Un-filtered rows go to a window of group_rows rows, not back in place: lane k of the wavefront is row k, delay(k)
// columns behind lane 0, so 64 steps of it are 64 columns of each row, but for row k those that begin at -delay(k).
// Stored whole, they reach up to kWindowLead columns before the row and kWindowTail behind it. Row strides hold that
// much more, and neither part is ever read as a pixel.
constexpr size_t kMaxGroupRows = 128;
constexpr size_t kMaxLinesAtOnce = 64;
constexpr size_t kMaxDelay = kMaxGroupRows - 1 + (kMaxGroupRows - 1) / 16;
static_assert(kMaxDelay <= 255);
constexpr size_t kTransposeColumns = 16;
constexpr size_t kBlockColumns = 64;
constexpr size_t kWindowLead = (kMaxDelay + 63) / 64 * 64;
constexpr size_t kWindowTail = kMaxDelay + kBlockColumns;

// The same for `above`: a step reads the vector of at most 64 bytes that ends with the next pixel above row 0.
constexpr size_t kAboveLead = 64;
constexpr size_t kAboveTail = kMaxDelay + kBlockColumns + 1;

// Bytes that resample_lines may read behind the last pixel of a line: it takes 16 columns at a time.
constexpr size_t kLineTail = kTransposeColumns;
constexpr size_t kTilePairs = kLineTail / 2;

constexpr int kWeightBits = 22;  // Pillow's PRECISION_BITS: 32 - 8 (a pixel) - 2 (room for filters that overshoot)
constexpr int kWeightLowBits = 8;

// The weights of one output pixel, two neighbouring source pixels at a time from an even one on, ready for a 16-bit
// multiply-add: weight = 256 * high + low, both non-negative; high <= 2^14, low < 2^8. Neither sum of products can
// exceed the sum of weight * pixel < 2^31.
struct WeightPair {
  int16_t high[2], low[2];
};

struct OutputSpan {
  uint32_t first_pair, pairs;
  size_t weights_at;
};

struct PixelKernels {
  // Rows in one call of unfilter_rows; at most kMaxGroupRows.
  size_t group_rows;
  size_t lines_at_once;  // of resample_lines

  // Un-filters `count` rows (1 .. group_rows) of 1 + width bytes into the window. All filter bytes are at most 4.
  // rows: the first row's filter byte; kBlockColumns bytes behind the last row are readable.
  // above: the row above, complemented, with kAboveLead readable bytes before it and kAboveTail behind it.
  // window: column 0 of row 0, see Note [the window].
  void (*unfilter_rows)(const uint8_t* rows, size_t count, size_t width, const uint8_t* above, uint8_t* window,
                        size_t window_stride);

  // Resamples `count` lines of pixels; out[o * out_stride + i] is output pixel o of line i: the result is transposed.
  // lines: kLineTail bytes behind the last pixel of each are readable.
  // tile: scratch, aligned to 64, for the pairs of columns that are worked on, 4 * lines_at_once bytes each: a multiple
  // of kTilePairs pairs, at least kTilePairs - 1 more than the longest span.
  void (*resample_lines)(const OutputSpan* spans, size_t outputs, const WeightPair* weights, const uint8_t* lines,
                         size_t line_stride, size_t count, uint8_t* out, size_t out_stride, uint8_t* tile,
                         size_t tile_nbytes);

  // Sum of the pixels and of their squares.
  void (*sum_pixels)(const uint8_t* pixels, size_t count, int64_t* sum_ret, int64_t* sumsq_ret);
};

const PixelKernels& pixel_kernels(Isa isa);

extern const PixelKernels kPortablePixelKernels;
#if defined(__x86_64__)
extern const PixelKernels kAvx2PixelKernels;
extern const PixelKernels kAvx512PixelKernels;
#endif

}  // namespace cxrfast::png
