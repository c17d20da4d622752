// adler32.cpp - two sums modulo 65521: of the bytes, and of the first sum after each byte; 32 bytes a step with AVX2.
#include "adler32.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CXRFAST_PNG_AVX2 1
#endif

namespace cxrfast::png {
namespace {

constexpr uint32_t kModulus = 65521;  // the largest prime below 2^16

// Bytes that can be summed before `second` must be reduced: 255 n (n + 1) / 2 + (n + 1) (65521 - 1) < 2^32 holds up to
// 5552.
constexpr size_t kChunk = 5376;
static_assert(255ull * kChunk * (kChunk + 1) / 2 + (kChunk + 1) * (kModulus - 1) < (1ull << 32));

struct Sums {
  uint32_t first, second;
};

constexpr size_t kColumns = 16, kRows = 16;
typedef uint8_t Bytes __attribute__((vector_size(kColumns)));
typedef uint16_t Columns __attribute__((vector_size(2 * kColumns)));
typedef uint32_t WideColumns __attribute__((vector_size(4 * kColumns)));
static_assert(255 * kRows * (kRows + 1) / 2 <= UINT16_MAX, "a column of one square");
constexpr size_t kSquare = kRows * kColumns;
static_assert(kChunk % kSquare == 0);

// nbytes <= kChunk, and a multiple of kSquare. Columns of bytes are summed side by side, in whatever vectors the CPU
// has.
void add_chunk_portable(Sums& sums, const uint8_t* data, size_t nbytes) {
  WideColumns first = {}, second = {};
  for (const uint8_t* end = data + nbytes; data < end;) {
    Columns square_first = {}, square_second = {};
    for (size_t row = 0; row < kRows; ++row, data += kColumns) {
      Bytes bytes;
      std::memcpy(&bytes, data, sizeof bytes);
      square_first += __builtin_convertvector(bytes, Columns);
      square_second += square_first;
    }
    second += first * uint32_t{kRows} + __builtin_convertvector(square_second, WideColumns);
    first += __builtin_convertvector(square_first, WideColumns);
  }
  sums.second += sums.first * static_cast<uint32_t>(nbytes);
  for (uint32_t i = 0; i < kColumns; ++i) {
    sums.first += first[i];
    sums.second +=
        second[i] * uint32_t{kColumns} - first[i] * i;  // a byte of column i stands i bytes behind its row's begin
  }
}

#ifdef CXRFAST_PNG_AVX2

constexpr size_t kStep = 32;
static_assert(kChunk % kStep == 0);

__attribute__((target("avx2"))) uint32_t sum_of_lanes(__m256i lanes) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(sum));
}

// nbytes <= kChunk, and a multiple of kStep.
__attribute__((target("avx2"))) void add_chunk_avx2(Sums& sums, const uint8_t* data, size_t nbytes) {
  const __m256i weights = _mm256_set_epi8(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                                          23, 24, 25, 26, 27, 28, 29, 30, 31, 32);
  const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
  __m256i first = zero, firsts = zero, weighted = zero;  // firsts: `first` before each step, summed
  for (const uint8_t* end = data + nbytes; data < end; data += kStep) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    firsts = _mm256_add_epi32(firsts, first);
    first = _mm256_add_epi32(first, _mm256_sad_epu8(bytes, zero));
    // 255 * 32 + 255 * 31 fits into the 16 bits of a pair.
    weighted = _mm256_add_epi32(weighted, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, weights), ones));
  }
  sums.second += sums.first * static_cast<uint32_t>(nbytes) + 32 * sum_of_lanes(firsts) + sum_of_lanes(weighted);
  sums.first += sum_of_lanes(first);
}

#endif

}  // namespace

uint32_t adler32(uint32_t adler, const uint8_t* data, size_t nbytes, Isa isa) {
  Sums sums = {adler & 0xFFFF, adler >> 16};
  auto add_chunk = add_chunk_portable;
  size_t unit = kSquare;
#ifdef CXRFAST_PNG_AVX2
  if (isa != Isa::kPortable) {
    add_chunk = add_chunk_avx2;
    unit = kStep;
  }
#endif
  (void)isa;
  while (nbytes >= unit) {
    const size_t chunk = std::min(nbytes / unit * unit, kChunk);
    add_chunk(sums, data, chunk);
    sums.first %= kModulus;
    sums.second %= kModulus;
    data += chunk;
    nbytes -= chunk;
  }
  for (; nbytes > 0; ++data, --nbytes) {  // fewer than kSquare
    sums.first += *data;
    sums.second += sums.first;
  }
  return (sums.second % kModulus) << 16 | (sums.first % kModulus);
}

}  // namespace cxrfast::png
