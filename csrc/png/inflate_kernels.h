// inflate_kernels.h - what stands behind inflate_zlib: the kernel, once for each instruction set. Private to
// inflate*.cpp.
#pragma once

#include <array>
#include <cstdint>

#include "inflate.h"

namespace cxrfast::png {

// 64-bit little-endian machines only; the kernels read table entries as bytes and addresses as numbers.
void inflate_portable(InflateFeed& feed);
#if defined(__x86_64__) && defined(__GNUC__)
#define CXRFAST_INFLATE_AVX2 1
void inflate_avx2(InflateFeed& feed, Isa isa);  // isa: AVX2 or more, for the checksum and the order of symbols

// order: the symbols 0 .. symbols - 1 that have a code, bits[s] > 0 long, those of one bit first; up to 32 elements
// behind them are overwritten. [l] of count, of literals: how many have l bits, how many of these are below 256.
void order_symbols_avx512(const uint8_t* bits, int symbols, uint16_t* order, uint16_t* count, uint16_t* literals);
#endif

// The verdict on a job that a kernel has given up.
inline void inflate_carefully(InflateFeed& feed, InflateJob& job) {
  if (job.segment_nbytes > 0) {
    job.segment_nbytes = 0;
    if (!feed.whole(job)) return;
  }
  inflate_zlib_careful(job);
}

template <int kBits>
constexpr auto reversed_bits() {
  std::array<uint16_t, size_t{1} << kBits> table{};
  for (uint32_t i = 0; i < table.size(); ++i) {
    uint32_t value = 0;
    for (int bit = 0; bit < kBits; ++bit) value |= (i >> bit & 1) << (kBits - 1 - bit);
    table[i] = static_cast<uint16_t>(value);
  }
  return table;
}

inline constexpr auto kReversedByte = reversed_bits<8>();

}  // namespace cxrfast::png
