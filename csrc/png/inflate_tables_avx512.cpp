// inflate_tables_avx512.cpp - what a block's codes are turned into before its symbols, by AVX-512 VBMI and VBMI2.
//
// Plain code for this is made of short loops whose ends are mispredicted; here each is one pass of vectors.
#include "inflate_kernels.h"

#ifdef CXRFAST_INFLATE_AVX2
#include <immintrin.h>

#include <algorithm>
#include <array>

#include "deflate_format.h"

// GCC 12's own header for AVX-512 leaves operands that are masked out uninitialised, and then warns of them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt,bmi2")
#endif

namespace cxrfast::png {

// A counting sort waits for counters that it has just written; this one picks the symbols of one length after the other
// out of all, 32 at a time, and counts them by how far it has come.
void order_symbols_avx512(const uint8_t* bits, int symbols, uint16_t* order, uint16_t* count, uint16_t* literals) {
  constexpr int kVector = 32, kVectors = kLiteralSymbols / kVector;
  static_assert(kLiteralSymbols % kVector == 0 && kEndOfBlock % kVector == 0);
  alignas(64) static constexpr uint16_t kFirst[kVector] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                           11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                           22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  const __m512i first = _mm512_load_si512(kFirst);
  __m256i lengths[kVectors];
  __m256i present = _mm256_setzero_si256();  // a bit for each length, in 16 bits
  const int vectors = (symbols + kVector - 1) / kVector;
  for (int v = 0; v < vectors; ++v) {
    const uint32_t known = ~uint32_t{0} >> (kVector - std::min(kVector, symbols - v * kVector));
    lengths[v] = _mm256_maskz_loadu_epi8(known, bits + v * kVector);
    const __m512i bit = _mm512_sllv_epi16(_mm512_set1_epi16(1), _mm512_cvtepu8_epi16(lengths[v]));
    present = _mm256_or_si256(present, _mm256_or_si256(_mm512_castsi512_si256(bit), _mm512_extracti64x4_epi64(bit, 1)));
  }
  const __m128i eight = _mm_or_si128(_mm256_castsi256_si128(present), _mm256_extracti128_si256(present, 1));
  const __m128i four = _mm_or_si128(eight, _mm_srli_si128(eight, 8));
  const __m128i two = _mm_or_si128(four, _mm_srli_si128(four, 4));
  auto left = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_or_si128(two, _mm_srli_epi32(two, 16)))) & 0xFFFE;
  for (int length = 1; length <= kMaxCodeBits; ++length) count[length] = literals[length] = 0;
  uint16_t* to = order;
  for (; left != 0; left &= left - 1) {
    const int length = __builtin_ctz(left);
    const uint16_t* const begin = to;
    const __m256i wanted = _mm256_set1_epi8(static_cast<char>(length));
    for (int v = 0; v < vectors; ++v) {
      if (v * kVector == kEndOfBlock) literals[length] = static_cast<uint16_t>(to - begin);
      const uint32_t found = _mm256_cmpeq_epi8_mask(lengths[v], wanted);
      const __m512i these = _mm512_add_epi16(first, _mm512_set1_epi16(static_cast<int16_t>(v * kVector)));
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(found, these));
      to += _mm_popcnt_u32(found);
    }
    count[length] = static_cast<uint16_t>(to - begin);
    if (symbols <= kEndOfBlock) literals[length] = count[length];
  }
}

// Note [literal entries by vectors]
// First each index's first symbol alone, as two bytes: how many bits it takes, extra bits included, and its value. In
// an index whose first bit is the highest, a symbol's indexes lie side by side, so each symbol is a store that the next
// one cuts short. Then these bytes are brought into the order in which bits arrive. What follows the first symbol of
// index i is the first symbol of i >> (its bits): at most kIndexBits - kShortestAvx512 = 7 bits, so that a register
// pair holds all that may stand there; behind two symbols there are 4 bits. Lengths above kMaxCopy stand alone.

namespace {

constexpr size_t kVector = 64, kIndexes = size_t{1} << kIndexBits, kVectors = kIndexes / kVector;
constexpr int kIsLength = 0x80;  // in the byte of bits: the value is kMaxMatch minus a length
static_assert(kIndexBits - kShortestAvx512 == 7 && kIndexBits - 2 * kShortestAvx512 == 4 &&
              kIndexes >> kShortestAvx512 == 2 * kVector);
static_assert(kShortestAvx512 * (kMaxLiterals + 1) > kIndexBits, "an entry has room for all that an index holds");

using Bytes = std::array<uint8_t, kVector>;

template <typename ValueOf>
constexpr Bytes bytes_of(ValueOf value_of) {
  Bytes bytes{};
  for (size_t i = 0; i < kVector; ++i) bytes[i] = static_cast<uint8_t>(value_of(i));
  return bytes;
}

struct SymbolFacts {
  uint8_t value, is_length, extra_bits;  // extra_bits: of those that must be within the index, up to 1
};
constexpr auto kSymbolFacts = [] {
  std::array<SymbolFacts, kLiteralSymbols> facts{};
  for (int s = 0; s < kLiteralSymbols; ++s) {
    const int which = s - kFirstLength;
    SymbolFacts& of = facts[static_cast<size_t>(s)];
    if (s < kEndOfBlock) {
      of = {static_cast<uint8_t>(s), 0, 0};
    } else if (which >= 0 && which < kLengthSymbols) {
      of = {static_cast<uint8_t>(kMaxMatch - kLengthBase[which]), kIsLength,
            s < kFirstLong ? kLengthExtra[which] : uint8_t{0}};
    } else {
      of = {0, 0, kIndexBits};  // more bits than an index has: no entry
    }
  }
  return facts;
}();

// [r][k]: whether the k-th of a symbol's 2^r indexes is in the upper half of them.
constexpr auto kUpper = [] {
  std::array<Bytes, kIndexBits> table{};
  for (size_t r = 0; r < table.size(); ++r) {
    table[r] = bytes_of([r](size_t k) { return 2 * k >> r; });
  }
  return table;
}();

__m512i load(const void* from) { return _mm512_loadu_si512(from); }
__m512i fill(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// 64 moves: bits used, and the count of the literals with minus the length.
void store_moves(uint16_t* to, __m512i used, __m512i high) {
  alignas(64) static constexpr Bytes kFirst = bytes_of([](size_t i) { return i / 2 + i % 2 * kVector; });
  alignas(64) static constexpr Bytes kLast = bytes_of([](size_t i) { return 32 + i / 2 + i % 2 * kVector; });
  _mm512_store_si512(to, _mm512_permutex2var_epi8(used, load(kFirst.data()), high));
  _mm512_store_si512(to + kVector / 2, _mm512_permutex2var_epi8(used, load(kLast.data()), high));
}

// to[i] = from[i with its bits reversed]. An index is a row of six bits and a column of four: within a register (four
// rows) bytes are brought together by columns, then a column's 16 groups of four from all registers; last, the order of
// the rows.
void reverse_index(const uint8_t* from, uint8_t* to) {
  static_assert(kVectors == 16);
  alignas(64) static constexpr Bytes kByColumn = bytes_of([](size_t i) { return i % 4 * 16 + i / 4; });
  alignas(64) static constexpr Bytes kRows =
      bytes_of([](size_t i) { return reversed(i % 16, 4) * 4 + reversed(i / 16, 2); });
  const __m512i by_column = load(kByColumn.data()), rows = load(kRows.data());
  __m512i v[kVectors], next[kVectors];
#pragma GCC unroll 16
  for (size_t k = 0; k < kVectors; ++k) v[k] = _mm512_permutexvar_epi8(by_column, load(from + k * kVector));
#pragma GCC unroll 8
  for (size_t k = 0; k < 8; ++k) {
    next[2 * k] = _mm512_unpacklo_epi32(v[2 * k], v[2 * k + 1]);
    next[2 * k + 1] = _mm512_unpackhi_epi32(v[2 * k], v[2 * k + 1]);
  }
#pragma GCC unroll 4
  for (size_t k = 0; k < 16; k += 4) {
    v[k] = _mm512_unpacklo_epi64(next[k], next[k + 2]);
    v[k + 1] = _mm512_unpackhi_epi64(next[k], next[k + 2]);
    v[k + 2] = _mm512_unpacklo_epi64(next[k + 1], next[k + 3]);
    v[k + 3] = _mm512_unpackhi_epi64(next[k + 1], next[k + 3]);
  }
  // v[k + c], part p: column 4 p + c of registers k .. k + 3.
#pragma GCC unroll 4
  for (size_t c = 0; c < 4; ++c) {
    const __m512i low_a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x44),
                  high_a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xee);
    const __m512i low_b = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x44);
    const __m512i high_b = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xee);
    const __m512i columns[4] = {_mm512_shuffle_i32x4(low_a, low_b, 0x88), _mm512_shuffle_i32x4(low_a, low_b, 0xdd),
                                _mm512_shuffle_i32x4(high_a, high_b, 0x88), _mm512_shuffle_i32x4(high_a, high_b, 0xdd)};
#pragma GCC unroll 4
    for (size_t p = 0; p < 4; ++p) {
      _mm512_store_si512(to + reversed(4 * p + c, 4) * kVector, _mm512_permutexvar_epi8(rows, columns[p]));
    }
  }
}

// 64 elements of four bytes each.
void store_interleaved(void* to, __m512i byte0, __m512i byte1, __m512i byte2, __m512i byte3) {
  // In each part four of every quarter of the elements, so that interleaving within parts leaves whole quarters.
  alignas(64) static constexpr std::array<uint32_t, 16> kQuarters = {0, 4, 8,  12, 1, 5, 9,  13,
                                                                     2, 6, 10, 14, 3, 7, 11, 15};
  const __m512i quarters = load(kQuarters.data());
  byte0 = _mm512_permutexvar_epi32(quarters, byte0);
  byte1 = _mm512_permutexvar_epi32(quarters, byte1);
  byte2 = _mm512_permutexvar_epi32(quarters, byte2);
  byte3 = _mm512_permutexvar_epi32(quarters, byte3);
  const __m512i low01 = _mm512_unpacklo_epi8(byte0, byte1), high01 = _mm512_unpackhi_epi8(byte0, byte1);
  const __m512i low23 = _mm512_unpacklo_epi8(byte2, byte3), high23 = _mm512_unpackhi_epi8(byte2, byte3);
  auto* const vectors = static_cast<__m512i*>(to);
  vectors[0] = _mm512_unpacklo_epi16(low01, low23);
  vectors[1] = _mm512_unpackhi_epi16(low01, low23);
  vectors[2] = _mm512_unpacklo_epi16(high01, high23);
  vectors[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Each byte shifted down by as many bits as its count says.
__m512i shifted(__m512i bytes, __m512i counts) {
  const __m512i low = _mm512_set1_epi16(255);
  const __m512i even = _mm512_srlv_epi16(_mm512_and_si512(bytes, low), _mm512_and_si512(counts, low));
  const __m512i odd = _mm512_srlv_epi16(_mm512_srli_epi16(bytes, 8), _mm512_srli_epi16(counts, 8));
  return _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
}

}  // namespace

bool fill_length_code_avx512(const uint8_t* bits, LengthEntry* table) {
  static_assert(kMaxLengthCodeBits == 7 && kLengthCodeSymbols <= 32);
  constexpr size_t kTable = size_t{1} << kMaxLengthCodeBits;
  alignas(64) static constexpr Bytes kNumbers = bytes_of([](size_t i) { return i; });
  const __m256i numbers = _mm512_castsi512_si256(load(kNumbers.data()));
  const __m256i lengths = _mm256_maskz_loadu_epi8((uint32_t{1} << kLengthCodeSymbols) - 1, bits);
  uint8_t order[2 * 32];
  size_t count = 0, places = 0;
#pragma GCC unroll 7
  for (int length = 1; length <= kMaxLengthCodeBits; ++length) {
    const uint32_t these = _mm256_cmpeq_epi8_mask(lengths, _mm256_set1_epi8(static_cast<char>(length)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(order + count), _mm256_maskz_compress_epi8(these, numbers));
    const size_t more = static_cast<size_t>(_mm_popcnt_u32(these));
    count += more;
    places += more << (kMaxLengthCodeBits - length);
  }
  if (places != kTable) return false;

  alignas(64) uint8_t used_in_order[kTable + kVector], value_in_order[kTable + kVector];
  size_t at = 0;
  for (size_t i = 0; i < count; ++i) {
    const int symbol = order[i], length = bits[symbol];
    _mm512_storeu_si512(used_in_order + at, fill(length + kRepeatOf[symbol].extra_bits));
    _mm512_storeu_si512(value_in_order + at, fill(symbol));
    at += kTable >> length;
  }
  __m512i used[2], value[2];
  alignas(64) static constexpr Bytes kFrom = bytes_of([](size_t l) { return 2 * reversed(l, 6); });
  for (size_t v = 0; v < 2; ++v) {
    const __m512i from = _mm512_or_si512(load(kFrom.data()), fill(static_cast<int>(v)));
    used[v] = _mm512_permutex2var_epi8(load(used_in_order), from, load(used_in_order + kVector));
    value[v] = _mm512_permutex2var_epi8(load(value_in_order), from, load(value_in_order + kVector));
  }
  alignas(64) static constexpr Bytes kCounts =
      bytes_of([](size_t symbol) { return symbol < kLengthCodeSymbols ? kRepeatOf[symbol].count : 0; });
  const __m512i counts = load(kCounts.data());
  const __m512i repeats = fill(kFirstRepeat), all_bits = fill(kMaxLengthCodeBits);
  for (size_t v = 0; v < 2; ++v) {
    const __m512i index = _mm512_add_epi8(load(kNumbers.data()), fill(static_cast<int>(v * kVector)));
    const __m512i behind = shifted(index, used[v]);
    const __m512i used2 = _mm512_permutex2var_epi8(used[0], behind, used[1]);
    const __m512i value2 = _mm512_permutex2var_epi8(value[0], behind, value[1]);
    const __m512i both = _mm512_add_epi8(used[v], used2);
    const __mmask64 is_pair = _mm512_cmplt_epu8_mask(value[v], repeats) & _mm512_cmplt_epu8_mask(value2, repeats) &
                              _mm512_cmple_epu8_mask(both, all_bits);
    store_interleaved(table + v * kVector, value[v], value2, _mm512_mask_mov_epi8(used[v], is_pair, both),
                      _mm512_mask_mov_epi8(_mm512_permutexvar_epi8(value[v], counts), is_pair, fill(2)));
  }
  return true;
}

void fill_distances_avx512(const uint8_t* bits, const uint16_t* order, int count, const uint64_t* entry_of_symbol,
                           uint64_t* entries) {
  static_assert(kDistanceIndexBits == 8 && kDistanceSymbols == 32);
  constexpr size_t kDistanceIndexes = size_t{1} << kDistanceIndexBits;
  alignas(64) uint8_t in_order[kDistanceIndexes + 2 * kVector];
  size_t at = 0;
  for (int i = 0; i < count; ++i) {
    _mm512_storeu_si512(in_order + at, fill(order[i]));
    _mm512_storeu_si512(in_order + at + kVector, fill(order[i]));
    at += kDistanceIndexes >> bits[order[i]];
  }
  for (; at < kDistanceIndexes; at += kVector) _mm512_storeu_si512(in_order + at, fill(kDistanceSymbols - 1));

  // Index 64 v + l comes from place 4 (l reversed) + (v reversed), which is above 127 where l is odd.
  alignas(64) static constexpr Bytes kFrom = bytes_of([](size_t l) { return 4 * reversed(l, 6) % 128; });
  constexpr __mmask64 kOdd = 0xaaaaaaaaaaaaaaaa;
  const __m512i in[4] = {load(in_order), load(in_order + 64), load(in_order + 128), load(in_order + 192)};
  alignas(64) uint8_t by_index[kDistanceIndexes];
  for (size_t v = 0; v < 4; ++v) {
    const __m512i from = _mm512_or_si512(load(kFrom.data()), fill(static_cast<int>(reversed(v, 2))));
    const __m512i even = _mm512_permutex2var_epi8(in[0], from, in[1]);
    const __m512i odd = _mm512_permutex2var_epi8(in[2], from, in[3]);
    _mm512_store_si512(by_index + v * kVector, _mm512_mask_blend_epi8(kOdd, even, odd));
  }
  const __m512i of[4] = {load(entry_of_symbol), load(entry_of_symbol + 8), load(entry_of_symbol + 16),
                         load(entry_of_symbol + 24)};
  for (size_t i = 0; i < kDistanceIndexes; i += 8) {
    const __m512i symbol = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(by_index + i)));
    const __m512i low = _mm512_permutex2var_epi64(of[0], symbol, of[1]);
    const __m512i high = _mm512_permutex2var_epi64(of[2], symbol, of[3]);
    const __mmask8 is_high = _mm512_test_epi64_mask(symbol, _mm512_set1_epi64(16));
    _mm512_store_si512(entries + i, _mm512_mask_blend_epi64(is_high, low, high));
  }
}

void fill_literals_avx512(const uint8_t* bits, const uint16_t* order, int count, uint16_t* moves, uint32_t* texts) {
  alignas(64) uint8_t used_in_order[kIndexes + kVector], value_in_order[kIndexes + kVector];
  alignas(64) uint8_t used_at[kIndexes], value_at[kIndexes];
  // Lengths whose extra bit is not within the index.
  uint16_t stretched_at[4];
  uint8_t stretched_value[4];
  size_t stretched = 0, at = 0;
  for (int i = 0; i < count; ++i) {
    const uint16_t symbol = order[i];
    const SymbolFacts facts = kSymbolFacts[symbol];
    const size_t length = bits[symbol], used = length + facts.extra_bits;
    const __m512i used_bytes = fill(used > kIndexBits ? 0 : static_cast<int>(used | facts.is_length));
    const __m512i value = fill(facts.value), extra = fill(facts.extra_bits);
    const __m512i upper = load(&kUpper[kIndexBits - length]);
    _mm512_storeu_si512(used_in_order + at, used_bytes);
    _mm512_storeu_si512(value_in_order + at, _mm512_sub_epi8(value, _mm512_and_si512(upper, extra)));
    if (length == kShortestAvx512) {  // a vector more
      _mm512_storeu_si512(used_in_order + at + kVector, used_bytes);
      _mm512_storeu_si512(value_in_order + at + kVector, _mm512_sub_epi8(value, extra));
    }
    stretched_at[stretched] = static_cast<uint16_t>(at);
    stretched_value[stretched] = facts.value;
    stretched += used > kIndexBits && facts.is_length != 0;
    at += kIndexes >> length;
  }
  for (; at < kIndexes; at += kVector) {
    _mm512_storeu_si512(used_in_order + at, _mm512_setzero_si512());
    _mm512_storeu_si512(value_in_order + at, _mm512_setzero_si512());
  }
  reverse_index(used_in_order, used_at);
  reverse_index(value_in_order, value_at);

  // The extra bits of a length above kMaxCopy, by its value: five from 1 to 127, four up to 191, and so on; 0 has none.
  const __m512i extra_bits_by_value =
      _mm512_broadcast_i32x4(_mm_setr_epi8(5, 5, 5, 5, 5, 5, 5, 5, 4, 4, 4, 4, 3, 3, 2, 1));
  const __m512i not_long = fill(static_cast<int>(kMaxMatch - kMaxCopy)), long_length = fill(kLongLength >> 8);
  const __m512i bits_mask = fill(15), all_bits = fill(kIndexBits), one = fill(1);
  const auto is_long = [=](__m512i used, __m512i value) {
    return _mm512_mask_cmplt_epu8_mask(_mm512_movepi8_mask(used), value, not_long);
  };
  // What may follow a literal: no length above kMaxCopy.
  const __m512i value_low = load(value_at), value_high = load(value_at + kVector);
  const __m512i used_low = _mm512_maskz_mov_epi8(~is_long(load(used_at), value_low), load(used_at));
  const __m512i used_high =
      _mm512_maskz_mov_epi8(~is_long(load(used_at + kVector), value_high), load(used_at + kVector));
  const __m512i used_least = _mm512_broadcast_i32x4(_mm512_castsi512_si128(used_low));
  const __m512i value_least = _mm512_broadcast_i32x4(_mm512_castsi512_si128(value_low));
  // i >> n for n >= 3 needs no more of i than i / 8, which eight neighbours share.
  __m512i indexes = _mm512_setr_epi64(0, 8, 16, 24, 32, 40, 48, 56);
  for (size_t v = 0; v < kVectors; ++v, indexes = _mm512_add_epi64(indexes, _mm512_set1_epi64(kVector))) {
    const __m512i used1 = load(used_at + v * kVector), value1 = load(value_at + v * kVector);
    const __mmask64 is1 = _mm512_test_epi8_mask(used1, used1), length1 = _mm512_movepi8_mask(used1);
    const __m512i sum1 = _mm512_and_si512(used1, bits_mask);

    const __m512i at2 = _mm512_multishift_epi64_epi8(sum1, indexes);
    const __m512i used2 = _mm512_permutex2var_epi8(used_low, at2, used_high);
    const __m512i value2 = _mm512_permutex2var_epi8(value_low, at2, value_high);
    const __m512i sum2 = _mm512_add_epi8(sum1, _mm512_and_si512(used2, bits_mask));
    const __mmask64 is2 =
        _mm512_mask_cmple_epu8_mask(_mm512_test_epi8_mask(used2, used2) & is1 & ~length1, sum2, all_bits);
    const __mmask64 length2 = is2 & _mm512_movepi8_mask(used2);
    const __m512i sum12 = _mm512_mask_mov_epi8(sum1, is2, sum2);

    const __m512i at3 = _mm512_multishift_epi64_epi8(sum12, indexes);
    const __m512i used3 = _mm512_shuffle_epi8(used_least, at3), value3 = _mm512_shuffle_epi8(value_least, at3);
    const __m512i sum3 = _mm512_add_epi8(sum12, _mm512_and_si512(used3, bits_mask));
    const __mmask64 is3 =
        _mm512_mask_cmple_epu8_mask(_mm512_test_epi8_mask(used3, used3) & is2 & ~length2, sum3, all_bits);
    const __mmask64 length3 = is3 & _mm512_movepi8_mask(used3);
    const __m512i sum = _mm512_mask_mov_epi8(sum12, is3, sum3);

    const __mmask64 any_length = length1 | length2 | length3;
    __m512i length = _mm512_maskz_mov_epi8(length1, value1);
    length = _mm512_mask_mov_epi8(length, length2, value2);
    length = _mm512_mask_mov_epi8(length, length3, value3);
    const __mmask64 long1 = is_long(used1, value1);
    const __m512i extra_bits =
        _mm512_maskz_shuffle_epi8(long1 & _mm512_test_epi8_mask(value1, value1), extra_bits_by_value,
                                  _mm512_and_si512(_mm512_srli_epi16(value1, 4), bits_mask));
    __m512i high = _mm512_maskz_mov_epi8(is1 & ~length1, one);
    high = _mm512_mask_add_epi8(high, is2 & ~length2, high, one);
    high = _mm512_mask_add_epi8(high, is3 & ~length3, high, one);
    // Minus the length is the text's byte minus kMaxMatch; of both the low five bits.
    static_assert(kMoveLengthShift == 8 + 3 && kMaxMatch % 32 == 2);
    const __m512i minus_length = _mm512_and_si512(_mm512_slli_epi16(_mm512_sub_epi8(length, fill(2)), 3), long_length);
    high = _mm512_or_si512(high,
                           _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(any_length, minus_length), long1, long_length));
    store_moves(moves + v * kVector, _mm512_add_epi8(sum, extra_bits), high);
    store_interleaved(texts + v * kVector, _mm512_mask_mov_epi8(value1, long1, sum1),
                      _mm512_mask_mov_epi8(value2, long1, extra_bits), value3, length);
  }
  for (size_t i = 0; i < stretched; ++i) {
    const size_t index = reversed(stretched_at[i], kIndexBits);
    moves[index] = kLongLength + kIndexBits + 1;
    texts[index] = static_cast<uint32_t>(stretched_value[i]) << kTextLengthShift | 1 << 8 | kIndexBits;
  }
}

}  // namespace cxrfast::png

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
