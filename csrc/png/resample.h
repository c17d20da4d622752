// resample.h - grey image to S x S, bit for bit Pillow's resize((S, S), BILINEAR); and that together with un-filtering.
//
// The rule (Pillow's src/libImaging/Resample.c has the same): each output pixel is a weighted sum of the source pixels
// within its reach, with weights of a triangle as wide as the scale (antialiasing) or as one pixel (enlarging), cut at
// the border and normalised, as fixed-point numbers of 22 fractional bits; sums are rounded to uint8 after each of the
// two passes. The horizontal pass comes first, except for films whose height shrinks more than twice as far as their
// width: Pillow 13.0 turned the order round for those (older versions did not), and so does this file.
//
// Threads: a Resampler is immutable and may be shared; a Scratch belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "isa.h"
#include "pixel_kernels.h"
#include "status.h"

namespace cxrfast::png {

// The weights along one axis, from in pixels to out pixels (both at least 1).
struct Axis {
  Axis(uint32_t in, uint32_t out);

  uint32_t in, out;
  std::vector<OutputSpan> spans;    // one for each output pixel
  std::vector<WeightPair> weights;  // those of one output pixel sum to 2^22 but for rounding
  uint32_t longest_span = 0;        // pairs

  // The weight of source pixel 2 * span.first_pair + i.
  uint32_t weight_at(const OutputSpan& span, size_t i) const {
    const WeightPair& pair = weights[span.weights_at + i / 2];
    return (static_cast<uint32_t>(pair.high[i % 2]) << kWeightLowBits) + static_cast<uint32_t>(pair.low[i % 2]);
  }
};

// Making one may throw std::bad_alloc; nothing else of this part throws.
struct Resampler {
  Resampler(uint32_t in_w, uint32_t in_h, uint32_t size);

  Axis horizontal, vertical;
  bool vertical_first;
};

// Memory that one thread keeps from film to film.
struct Scratch {
  Buffer window;  // un-filtered rows
  Buffer halved;  // the film after its first pass
  Buffer tile;    // a few columns of many lines
  Buffer above;   // the row above the window
};

// Bytes of a Resampler and of the Scratch that a film of these sides leaves behind, at most, at any level.
uint64_t resample_nbytes(uint32_t width, uint32_t height, uint32_t size);

// Bytes of the Scratch that un-filtering rows of this width leaves behind, at most, at any level. Part of the above.
uint64_t unfilter_nbytes(uint32_t width);

// grey: in_h rows of in_w pixels, stride_bytes apart. out: size * size, row by row.
// Fails only for want of memory (kTooLarge); out is then unspecified.
Status resample(const Resampler& resampler, const uint8_t* grey, size_t stride_bytes, uint8_t* out, Scratch& scratch,
                Isa isa);

// Bytes that must be readable behind the filtered rows of a PixelJob. Their values never matter.
constexpr size_t kPixelPad = 64;

// One film of 8-bit grey rows, as inflate leaves them.
struct PixelJob {
  uint8_t* rows = nullptr;  // height rows of 1 filter byte + width pixels, then kPixelPad bytes; may be overwritten
  uint32_t width = 0, height = 0;  // equal to the resampler's source
  const Resampler* resampler = nullptr;
  uint8_t* out = nullptr;      // size * size, row by row; unspecified when status is not ok
  int64_t sum = 0, sumsq = 0;  // of the pixels of out and of their squares; 0 when status is not ok
  Status status;               // kCorrupt: bad filter byte, offset = its index in rows; kTooLarge: out of memory
};

// Any number of films; the result of each depends on that film alone.
void unfilter_resample_grey8(PixelJob* jobs, size_t count, Scratch& scratch, Isa isa);

// The same rows, not resized. rows: as in PixelJob, left as they are. grey: width * height, row by row; unspecified
// when the status, that of a PixelJob, is not ok.
Status unfilter_grey8(const uint8_t* rows, uint32_t width, uint32_t height, uint8_t* grey, Scratch& scratch, Isa isa);

}  // namespace cxrfast::png
