// grey.cpp - rows to grey, one loop per colour type.
#include "grey.h"

#include <algorithm>
#include <cstring>

namespace cxrfast::png {

namespace {

// Sample i of a row of 1, 2, 4 or 8 bits a sample; the leftmost lies in the high bits.
inline uint32_t sample_at(const uint8_t* row, uint32_t i, uint32_t depth) {
  const size_t bit = size_t{i} * depth;
  return row[bit / 8] >> (8 - depth - bit % 8) & ((1u << depth) - 1);
}

template <int kPixelNbytes, int kSampleNbytes>
void rgb_row(const uint8_t* row, uint32_t columns, uint8_t* grey) {
  for (size_t i = 0; i < columns; ++i) {
    const uint8_t* pixel = row + i * kPixelNbytes;
    grey[i] = grey_of(pixel[0], pixel[kSampleNbytes], pixel[2 * kSampleNbytes]);
  }
}

// The first byte of every pixel. kSampleNbytes > 0: R, G and B lie that far apart, and their first bytes must agree.
// Not in one pass with an early exit: the loop over a row stays free of branches, so that it is vectorised.
template <int kPixelNbytes, int kSampleNbytes>
bool plane_of(const uint8_t* rows, uint32_t width, size_t count, uint8_t* plane) {
  for (size_t y = 0; y < count; ++y) {
    *plane++ = *rows++;
    uint8_t difference = 0;
    for (size_t x = 0; x < width; ++x) {
      const uint8_t* pixel = rows + x * kPixelNbytes;
      plane[x] = pixel[0];
      if constexpr (kSampleNbytes > 0) {
        difference |= (pixel[0] ^ pixel[kSampleNbytes]) | (pixel[0] ^ pixel[2 * kSampleNbytes]);
      }
    }
    if (difference != 0) return false;
    rows += size_t{width} * kPixelNbytes;
    plane += width;
  }
  return true;
}

}  // namespace

bool grey_row(const Chunks& chunks, const uint8_t* row, uint32_t columns, uint8_t* grey) {
  const uint32_t depth = chunks.header.bit_depth;
  switch (chunks.header.color_type) {
    case ColorType::kGrey:
      if (depth == 8) {
        std::memcpy(grey, row, columns);
      } else if (depth == 16) {
        for (size_t i = 0; i < columns; ++i) grey[i] = row[2 * i];
      } else {
        const uint32_t scale = 255 / ((1u << depth) - 1);
        for (uint32_t i = 0; i < columns; ++i) grey[i] = static_cast<uint8_t>(sample_at(row, i, depth) * scale);
      }
      return true;
    case ColorType::kPalette: {
      uint32_t largest = 0;
      for (uint32_t i = 0; i < columns; ++i) {
        const uint32_t index = sample_at(row, i, depth);
        largest = std::max(largest, index);
        grey[i] = chunks.palette_grey[index];
      }
      return largest < static_cast<uint32_t>(chunks.palette_size);
    }
    case ColorType::kGreyAlpha:
      for (size_t i = 0; i < columns; ++i) grey[i] = row[i * (depth / 4)];
      return true;
    case ColorType::kRgb:
      depth == 8 ? rgb_row<3, 1>(row, columns, grey) : rgb_row<6, 2>(row, columns, grey);
      return true;
    case ColorType::kRgba:
      depth == 8 ? rgb_row<4, 1>(row, columns, grey) : rgb_row<8, 2>(row, columns, grey);
      return true;
  }
  return true;
}

bool may_be_one_plane(const Header& header) {
  return !header.interlaced && header.bit_depth >= 8 && header.color_type != ColorType::kPalette;
}

bool extract_plane(const Header& header, const uint8_t* rows, size_t count, uint8_t* plane) {
  const uint32_t width = header.width;
  const bool deep = header.bit_depth == 16;
  switch (header.color_type) {
    case ColorType::kGrey:
      return deep ? plane_of<2, 0>(rows, width, count, plane) : plane_of<1, 0>(rows, width, count, plane);
    case ColorType::kGreyAlpha:
      return deep ? plane_of<4, 0>(rows, width, count, plane) : plane_of<2, 0>(rows, width, count, plane);
    case ColorType::kRgb:
      return deep ? plane_of<6, 2>(rows, width, count, plane) : plane_of<3, 1>(rows, width, count, plane);
    case ColorType::kRgba:
      return deep ? plane_of<8, 2>(rows, width, count, plane) : plane_of<4, 1>(rows, width, count, plane);
    case ColorType::kPalette:
      break;
  }
  return false;
}

}  // namespace cxrfast::png
