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

  // The source pixels of one output pixel; their weights sum to 2^22 but for rounding.
  struct Reach {
    uint32_t first, count;
    size_t weights_at;
  };
  std::vector<Reach> reaches;  // one for each output pixel
  std::vector<uint32_t> weights;
  PackedWeights pairs, fours;  // the same by cells of two and of four
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
  Buffer tile;    // a few columns of many lines
};

// One 8-bit grey film on its way to S x S whose rows come a few at a time, top to bottom: un-filtered and resampled
// along the rows while they are in the cache. Keeps its memory for the next film. Not for films whose vertical pass
// comes first (Resampler::vertical_first): those need all their rows at once.
class RowGroups {
 public:
  // Begins a film. False for want of memory.
  bool begin(const Resampler& resampler, Scratch& scratch, Isa isa);

  // How many rows add_filtered and add_grey take at a time; only the last ones may be fewer or more.
  static size_t group_rows(Isa isa);

  // rows: count rows of 1 filter byte + width pixels, then kPixelPad readable bytes. Bad filter bytes are noted.
  void add_filtered(const uint8_t* rows, size_t count);

  // grey: count rows of width pixels, stride_bytes apart.
  void add_grey(const uint8_t* grey, size_t stride_bytes, size_t count);

  // out: size * size, row by row, unspecified when the status is not ok: kCorrupt for a bad filter byte, offset = its
  // index in the filtered rows. All rows have been added.
  Status finish(uint8_t* out);

  void release_above(size_t nbytes);

 private:
  bool reserve_scratch();

  const Resampler* resampler_ = nullptr;
  const PixelKernels* kernels_ = nullptr;
  Scratch* scratch_ = nullptr;
  size_t y_ = 0;   // rows so far
  Buffer halved_;  // the film after its first pass
  Buffer above_;   // the last row so far, complemented
  Status status_;
};

// Bytes of a Resampler, of RowGroups and of the Scratch that a film of these sides leaves behind, at most, at any
// level.
uint64_t resample_nbytes(uint32_t width, uint32_t height, uint32_t size);

// Bytes of the Scratch that un-filtering rows of this width leaves behind, at most, at any level. Part of the above.
uint64_t unfilter_nbytes(uint32_t width);

// grey: in_h rows of in_w pixels, stride_bytes apart. out: size * size, row by row.
// Fails only for want of memory (kTooLarge); out is then unspecified.
Status resample(const Resampler& resampler, const uint8_t* grey, size_t stride_bytes, uint8_t* out, RowGroups& groups,
                Scratch& scratch, Isa isa);

// Bytes that must be readable behind the filtered rows of a PixelJob. Their values never matter.
constexpr size_t kPixelPad = 64;

// One film of 8-bit grey rows, as inflate leaves them.
struct PixelJob {
  uint8_t* rows = nullptr;  // height rows of 1 filter byte + width pixels, then kPixelPad bytes; may be overwritten
  const Resampler* resampler = nullptr;
  uint8_t* out = nullptr;      // size * size, row by row; unspecified when status is not ok
  int64_t sum = 0, sumsq = 0;  // of the pixels of out and of their squares; 0 when status is not ok
  Status status;               // kCorrupt: bad filter byte, offset = its index in rows; kTooLarge: out of memory
};

void unfilter_resample_grey8(PixelJob& job, RowGroups& groups, Scratch& scratch, Isa isa);

// The sums of an image's pixels and of their squares.
void sum_pixels(const uint8_t* image, size_t nbytes, int64_t* sum_ret, int64_t* sumsq_ret, Isa isa);

// The same rows, not resized. rows: as in PixelJob, left as they are. grey: width * height, row by row; unspecified
// when the status, that of a PixelJob, is not ok.
Status unfilter_grey8(const uint8_t* rows, uint32_t width, uint32_t height, uint8_t* grey, Scratch& scratch, Isa isa);

}  // namespace cxrfast::png
