// unfilter.cpp - the row filters one row at a time, one byte at a time: the plain reading of the specification.
#include "unfilter.h"

#include <algorithm>
#include <cstdlib>

namespace cxrfast::png {

namespace {

// The neighbour (a: left, b: above, c: above left) that is nearest to a + b - c; in a tie, in that order.
inline uint8_t paeth(int a, int b, int c) {
  const int pa = std::abs(b - c), pb = std::abs(a - c), pc = std::abs(a + b - 2 * c);
  if (pa <= pb && pa <= pc) return static_cast<uint8_t>(a);
  return static_cast<uint8_t>(pb <= pc ? b : c);
}

// Calls predict(left, above, above left) for each byte of the row; above may be null, for zeros.
template <typename Predict>
void unfilter_row(uint8_t* row, const uint8_t* above, size_t nbytes, size_t bpp, Predict predict) {
  for (size_t i = 0; i < nbytes; ++i) {
    const int a = i >= bpp ? row[i - bpp] : 0;
    const int b = above != nullptr ? above[i] : 0;
    const int c = above != nullptr && i >= bpp ? above[i - bpp] : 0;
    row[i] = static_cast<uint8_t>(row[i] + predict(a, b, c));
  }
}

}  // namespace

Status unfilter(uint8_t* rows, uint32_t height, size_t row_nbytes, int bpp) {
  const uint8_t* above = nullptr;
  const size_t left = static_cast<size_t>(bpp);
  for (uint32_t y = 0; y < height; ++y) {
    const size_t filter_at = y * (row_nbytes + 1);
    uint8_t* row = rows + filter_at + 1;
    switch (rows[filter_at]) {
      case kNone:
        break;
      case kSub:
        unfilter_row(row, above, row_nbytes, left, [](int a, int, int) { return a; });
        break;
      case kUp:
        unfilter_row(row, above, row_nbytes, left, [](int, int b, int) { return b; });
        break;
      case kAverage:
        unfilter_row(row, above, row_nbytes, left, [](int a, int b, int) { return (a + b) / 2; });
        break;
      case kPaeth:
        unfilter_row(row, above, row_nbytes, left, paeth);
        break;
      default:
        return {Code::kCorrupt, reason::kRowFilter, static_cast<int64_t>(filter_at)};
    }
    above = row;
  }
  return {};
}

}  // namespace cxrfast::png
