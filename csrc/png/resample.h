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
#include "status.h"

namespace cxrfast::png {

constexpr int kWeightBits = 22;  // Pillow's PRECISION_BITS: 32 - 8 (a pixel) - 2 (room for filters that overshoot)

// The weights along one axis, for in pixels to out pixels.
class Axis {
 public:
  Axis(uint32_t in, uint32_t out);  // both at least 1; the one place of this part that may throw: std::bad_alloc

  // Output pixel o is the sum of weight(o)[i] * source[first(o) + i] for i in [0, count(o)).
  struct Span {
    uint32_t first, count;
    size_t weight_at;
  };

  uint32_t in, out;
  std::vector<Span> spans;       // out
  std::vector<int32_t> weights;  // in [0, 2^22]; those of one output pixel sum to 2^22 but for rounding
};

class Resampler {
 public:
  Resampler(uint32_t in_w, uint32_t in_h, uint32_t size);

  Axis horizontal, vertical;
  bool vertical_first;
};

// Memory that one thread keeps from film to film.
struct Scratch {
  Buffer rows;    // un-filtered rows
  Buffer halved;  // after the horizontal pass
};

// grey: in_h rows of in_w pixels, stride_bytes apart. out: size * size, row by row.
// Fails only for want of memory (kTooLarge); out is then unspecified.
Status resample(const Resampler& resampler, const uint8_t* grey, size_t stride_bytes, uint8_t* out, Scratch& scratch,
                Isa isa);

// Bytes that must be readable behind the filtered rows of a PixelJob. Their values never matter.
constexpr size_t kPixelPad = 128;

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

}  // namespace cxrfast::png
