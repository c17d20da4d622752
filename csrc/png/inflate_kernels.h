// inflate_kernels.h - what stands behind inflate_zlib: the kernel, once for each instruction set. Private to
// inflate*.cpp.
#pragma once

#include <array>
#include <cstdint>

#include "deflate_format.h"
#include "inflate.h"

namespace cxrfast::png {

// One entry of the literal table is split in two, so that what a stream waits for takes little of a first-level cache:
// - its move, 0 in an empty entry: bits 0-4 bits used   8-10 count of the literals   11-15 minus the length, 0: none,
//   -1: above kMaxCopy. The moves of a step are added up; bit 15 says whether there is a length.
// - its text: bits 0-23 up to three literals, first lowest   24-31 kMaxMatch minus the length, if there is one.
// A symbol for lengths above kMaxCopy has entries of its own. Only its code need be within the index: bits 0-15 of the
// text say for BEXTR where its extra bits are, which the move counts as used; 24-31 are of its least length.
constexpr int kIndexBits = 10, kDistanceIndexBits = 8;
constexpr size_t kMaxCopy = 16;
constexpr int kMaxLiterals = 3;
constexpr int kCountShift = 8, kMoveLengthShift = 11, kTextLengthShift = 24;
constexpr unsigned kCountMask = 7;
constexpr uint16_t kLongLength = 31 << kMoveLengthShift;
static_assert(kMaxCopy < 31, "-1 is taken");
constexpr int kFirstLong = kFirstLength + 11;  // the symbols from here on
static_assert(kLengthBase[kFirstLong - kFirstLength] == kMaxCopy + 1);

// What a symbol of the code of the code lengths stands for (RFC 1951, section 3.2.7): itself, once, up to 15; above it
// `count` and what its extra bits say of the length before it, or of 0.
constexpr int kFirstRepeat = 16;
struct RepeatOf {
  uint8_t extra_bits, count;
  uint16_t itself;  // a mask of the symbol, and of another one
  uint64_t before;  // a mask of the length before it
};
inline constexpr auto kRepeatOf = [] {
  std::array<RepeatOf, kLengthCodeSymbols> of{};
  for (int symbol = 0; symbol < kFirstRepeat; ++symbol) of[static_cast<size_t>(symbol)] = {0, 1, 0xFFFF, 0};
  of[kFirstRepeat] = {2, 3, 0, ~uint64_t{0}};
  of[kFirstRepeat + 1] = {3, 3, 0, 0};
  of[kFirstRepeat + 2] = {7, 11, 0, 0};
  return of;
}();

// The table of the code of the code lengths has one for each value of the next kMaxLengthCodeBits bits.
struct LengthEntry {
  uint8_t symbols[2];  // the second one only with a count of 2: two lengths that are within the bits
  uint8_t used;        // bits, extra bits included
  uint8_t count;       // of the lengths, but for what the extra bits add
};

// 64-bit little-endian machines only; the kernels read table entries as bytes and addresses as numbers.
void inflate_portable(InflateFeed& feed);
#if defined(__x86_64__) && defined(__GNUC__)
#define CXRFAST_INFLATE_AVX2 1
void inflate_avx2(InflateFeed& feed, Isa isa);  // isa: AVX2 or more, for the checksum and the tables

// order: the symbols 0 .. symbols - 1 that have a code, bits[s] > 0 long, those of one bit first; up to 32 elements
// behind them are overwritten. [l] of count, of literals: how many have l bits, how many of these are below 256.
void order_symbols_avx512(const uint8_t* bits, int symbols, uint16_t* order, uint16_t* count, uint16_t* literals);

// The table of the code of the code lengths. bits: of its symbols. False: not complete.
bool fill_length_code_avx512(const uint8_t* bits, LengthEntry* table);

// The literal table's 1 << kIndexBits entries (Note [the literal table] in inflate_kernel.h). bits: by symbol; order:
// the symbols whose codes are of up to kIndexBits bits, `count` of them, none of less than kShortestAvx512 bits.
constexpr int kShortestAvx512 = 3;
void fill_literals_avx512(const uint8_t* bits, const uint16_t* order, int count, uint16_t* moves, uint32_t* texts);

// The distance table's 1 << kDistanceIndexBits entries, likewise. entry_of_symbol: 32 of them, the last one for what is
// none.
void fill_distances_avx512(const uint8_t* bits, const uint16_t* order, int count, const uint64_t* entry_of_symbol,
                           uint64_t* entries);
#endif

// The verdict on a job that a kernel has given up.
inline void inflate_carefully(InflateFeed& feed, InflateJob& job) {
  if (job.segment_nbytes > 0) {
    job.segment_nbytes = 0;
    if (!feed.whole(job)) return;
  }
  inflate_zlib_careful(job);
}

constexpr size_t reversed(size_t value, int bits) {
  size_t result = 0;
  for (int bit = 0; bit < bits; ++bit) result |= (value >> bit & 1) << (bits - 1 - bit);
  return result;
}

template <int kBits>
constexpr auto reversed_bits() {
  std::array<uint16_t, size_t{1} << kBits> table{};
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<uint16_t>(reversed(i, kBits));
  return table;
}

inline constexpr auto kReversedByte = reversed_bits<8>();

}  // namespace cxrfast::png
