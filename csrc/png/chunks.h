// chunks.h - the container: which bytes of a PNG file are what, checked before anything is allocated.
//
// What is refused and what is not: a chunk that cannot be ignored (IHDR, PLTE of a palette image, IDAT, IEND, unknown
// critical ones) must be whole, in order and carry the right CRC-32. Ancillary chunks are passed over unread, so a
// wrong CRC in one is no error (libpng warns and goes on too), and neither are bytes behind IEND. tRNS, gAMA, iCCP,
// sBIT and the like do not touch the pixels: the contract is Pillow's convert("L"), which ignores them as well.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "limits.h"
#include "status.h"

namespace cxrfast::png {

enum class ColorType : uint8_t { kGrey = 0, kRgb = 2, kPalette = 3, kGreyAlpha = 4, kRgba = 6 };

struct Header {
  uint32_t width = 0, height = 0;  // pixels, each in [1, 2^31 - 1]; within the limits once read_chunks has said ok
  uint8_t bit_depth = 0;           // of a sample: 1, 2, 4, 8 or 16
  ColorType color_type = ColorType::kGrey;
  bool interlaced = false;  // Adam7

  int channels() const;
  int bits_per_pixel() const { return bit_depth * channels(); }  // at most 64
  // Bytes of a complete pixel, rounded up to 1: the distance over which the row filters look back.
  int filter_distance() const { return (bits_per_pixel() + 7) / 8; }
  // Bytes of a row of `columns` pixels without its filter byte. columns <= 2^31: fits.
  size_t row_nbytes(uint32_t columns) const {
    return static_cast<size_t>((uint64_t{columns} * bits_per_pixel() + 7) / 8);
  }
  // Bytes that the zlib stream must inflate to: every row of every pass with its filter byte. At most 2^48 pixels.
  uint64_t filtered_nbytes() const;
};

// The reduced images of an interlaced file; a file that is not interlaced has one, the whole.
struct Pass {
  uint32_t width, height;   // pixels; either may be 0, then the pass has no bytes at all
  uint32_t x0, y0, dx, dy;  // its pixel (i, j) is the image's (x0 + i * dx, y0 + j * dy)
};
constexpr int kMaxPasses = 7;

// Fills passes[0 .. count) and returns the count, 1 or 7.
int passes_of(const Header& header, Pass passes[kMaxPasses]);

// Where the parts of one file are. Points into the file; owns nothing.
struct Chunks {
  Header header;
  uint8_t palette_grey[256] = {};  // palette images: each entry as a grey level, Pillow's rounding
  int palette_size = 0;            // entries; indices beyond are corrupt
  size_t idat_offset = 0;  // file offset of the first IDAT chunk (its length field); the others follow it directly
  size_t idat_count = 0;
  size_t idat_nbytes = 0;  // all payloads together
  size_t idat_end = 0;     // file offset behind the last IDAT chunk
};

// Reads everything but the IDAT payloads, whose CRC join_idat checks. Allocates nothing.
// ok: the file is complete up to IEND, its sizes are within the limits, and its IDAT bytes could fill the image.
Status read_chunks(const uint8_t* file, size_t nbytes, const Limits& limits, Isa isa, Chunks* chunks_ret);

// Copies the IDAT payloads one behind the other to `out` (idat_nbytes bytes), checking each CRC-32, and the length of
// each to `lengths` (idat_count). `out` may be file + idat_offset, if the file may be written over.
Status join_idat(const uint8_t* file, const Chunks& chunks, Isa isa, uint8_t* out, uint32_t* lengths);

// The file offset of byte `offset` of the joined payloads.
int64_t file_offset_of(const Chunks& chunks, const uint32_t* lengths, int64_t offset);

}  // namespace cxrfast::png
