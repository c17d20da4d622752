// inflate_order_avx512.cpp - the symbols of a canonical code in the order of their codes, by AVX-512 VBMI2.
//
// A counting sort waits for counters that it has just written; this one picks the symbols of one length after the other
// out of all, 32 at a time, and counts them by how far it has come.
#include "inflate_kernels.h"

#ifdef CXRFAST_INFLATE_AVX2
#include <immintrin.h>

#include <algorithm>

#include "deflate_format.h"

// GCC 12's own header for AVX-512 leaves operands that are masked out uninitialised, and then warns of them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace cxrfast::png {

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi2"))) void order_symbols_avx512(
    const uint8_t* bits, int symbols, uint16_t* order, uint16_t* count, uint16_t* literals) {
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

}  // namespace cxrfast::png
#endif
