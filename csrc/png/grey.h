// grey.h - from rows of any colour type and depth to grey, as Pillow's convert("L") has it.
//
// Rule: colour is (19595 R + 38470 G + 7471 B + 2^15) >> 16 of the 8-bit samples; a 16-bit sample counts with its high
// byte; 1, 2 and 4 bits are scaled to 0 .. 255; alpha and transparency are dropped, not composited.
#pragma once

#include <cstddef>
#include <cstdint>

#include "chunks.h"
#include "status.h"

namespace cxrfast::png {

// ITU-R 601-2 luma in 16-bit fixed point, rounded; the weights sum to 2^16, so R = G = B = v gives v.
constexpr uint8_t grey_of(uint32_t r, uint32_t g, uint32_t b) {
  return static_cast<uint8_t>((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16);
}

// Writes one un-filtered row as grey: columns pixels to grey[0 .. columns).
// row: header.row_nbytes(columns) bytes, without the filter byte.
// False when a palette index has no entry (its pixels are then undefined).
bool grey_row(const Chunks& chunks, const uint8_t* row, uint32_t columns, uint8_t* grey);

// True for the files whose grey image may be one plane of their bytes: a whole number of bytes a sample, not
// interlaced.
bool may_be_one_plane(const Header& header);

// The row filters work on each byte of a pixel apart from the others. So the filtered bytes of a film whose grey image
// is one of its planes (grey of 8 or 16 bits, with or without alpha; colour that is grey in every pixel) are, taken
// alone, the filtered rows of an 8-bit grey film. Copies that plane, filter bytes included, to `plane` (count rows of
// 1 + width bytes). rows: count filtered rows. False, with `plane` undefined, when they have colour. May only be called
// where may_be_one_plane(header).
bool extract_plane(const Header& header, const uint8_t* rows, size_t count, uint8_t* plane);

}  // namespace cxrfast::png
