// pixel_kernels.h - the inner loops of un-filter and resample, one set for each instruction set. Private to
// resample.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace cxrfast::png {

// Note [the window]
// Un-filtered rows go to a window of group_rows rows, not back in place: lane k of the wavefront is row k, delay(k)
// columns behind lane 0, so 64 steps of it are 64 columns of each row, but for row k those that begin at -delay(k).
// Stored whole, they reach up to kWindowLead columns before the row and kWindowTail behind it. Row strides hold that
// much more, and neither part is ever read as a pixel.
constexpr size_t kMaxGroupRows = 128;
constexpr size_t kMaxDelay = kMaxGroupRows - 1 + (kMaxGroupRows - 1) / 16;
constexpr size_t kTransposeColumns = 16;
static_assert(kMaxDelay + kTransposeColumns <= 255);  // so that steps up to a row's first pixel are counted in bytes
constexpr size_t kBlockColumns = 64;
constexpr size_t kWindowLead = (kMaxDelay + 63) / 64 * 64;
constexpr size_t kWindowTail = kMaxDelay + kBlockColumns;

// The same for `above`: a step reads the vector of at most 64 bytes that ends with the next pixel above row 0.
constexpr size_t kAboveLead = 64;
constexpr size_t kAboveTail = kMaxDelay + kBlockColumns + 1;

// Bytes that resample_lines may read behind the last pixel of a line: it takes 16 columns at a time.
constexpr size_t kLineTail = kTransposeColumns;

constexpr int kWeightBits = 22;  // Pillow's PRECISION_BITS: 32 - 8 (a pixel) - 2 (room for filters that overshoot)
constexpr int kDigitBits = 8;

// Note [cells]
// Multiply-adds take the pixels of a line by cells: as many neighbours as an instruction multiplies in 32 bits, `taps`
// of them, the first one's column a multiple of that. Weights are split into digits that fit beside them:
// - two pixels of 16 bits: weight = 256 * high + low, both non-negative; high <= 2^14, low < 2^8;
// - four pixels of 8 bits: weight = 2^16 * d2 + 2^8 * d1 + d0; d1 and d0 are signed, 0 <= d2 <= 2^6.
// Sums of weight * pixel stay below 2^31, so do those of each digit, and 32-bit sums that are put together again from
// those of the digits, the highest first, are exact.
constexpr size_t digits_of(size_t taps) { return taps == 4 ? 3 : 2; }

struct OutputSpan {
  uint32_t first_cell, cells;
  size_t weights_at;  // index of its first word

  size_t end_cell() const { return size_t{first_cell} + cells; }
};

// One axis: a span for each output pixel; for each cell of it, a word with the taps' digits for each digit.
struct PackedWeights {
  std::vector<OutputSpan> spans;
  std::vector<int32_t> words;
  uint32_t longest_span = 0;  // cells
};

struct PixelKernels {
  // Rows in one call of unfilter_rows; at most kMaxGroupRows.
  size_t group_rows;
  size_t taps;  // Note [cells]

  // Un-filters `count` rows (1 .. group_rows) of 1 + width bytes into the window. All filter bytes are at most 4.
  // rows: the first row's filter byte; kBlockColumns bytes behind the last row are readable.
  // above: the row above, complemented, with kAboveLead readable bytes before it and kAboveTail bytes behind it;
  // becomes the last of the rows.
  // window: column 0 of row 0, see Note [the window].
  void (*unfilter_rows)(const uint8_t* rows, size_t count, size_t width, uint8_t* above, uint8_t* window,
                        size_t window_stride);

  // Resamples `count` lines of pixels; out[o * out_stride + i] is output pixel o of line i: the result is transposed.
  // lines: kLineTail bytes behind the last pixel of each are readable.
  // tile: scratch, aligned to 64, for the cells that are worked on, 4 bytes a line each: for group_rows lines, twice
  // the longest span and two blocks of columns at least.
  void (*resample_lines)(const PackedWeights& packed, const uint8_t* lines, size_t line_stride, size_t count,
                         uint8_t* out, size_t out_stride, uint8_t* tile, size_t tile_nbytes);

  // unfilter_rows and then resample_lines, without a window.
  void (*unfilter_resample)(const uint8_t* rows, size_t count, size_t width, uint8_t* above,
                            const PackedWeights& packed, uint8_t* out, size_t out_stride, uint8_t* tile,
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
