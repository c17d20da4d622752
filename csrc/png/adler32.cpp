// adler32.cpp - two sums modulo 65521: of the bytes, and of the first sum after each byte; 32 bytes a step with AVX2,
// 64 with AVX-512.
#include "adler32.h"

#include <algorithm>
#include <array>
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

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vnni")
#endif

constexpr size_t kWideStep = 64;
constexpr size_t kWideChunk = size_t{1} << 20;
static_assert(255ull * (64 + 63 + 62 + 61) * (kWideChunk / kWideStep + 1) <= UINT32_MAX, "a lane of weighted bytes");

alignas(kWideStep) constexpr auto kWideWeights = [] {
  std::array<int8_t, kWideStep> weights{};
  for (size_t i = 0; i < kWideStep; ++i) weights[i] = static_cast<int8_t>(kWideStep - i);
  return weights;
}();

template <typename Lane>
inline uint64_t sum_of_lanes(__m512i vector) {
  Lane lanes[sizeof vector / sizeof(Lane)];
  _mm512_storeu_si512(lanes, vector);
  uint64_t sum = 0;
  for (const Lane lane : lanes) sum += lane;
  return sum;
}

// 0 < nbytes <= kWideChunk. Steps are aligned (else each crosses two cache lines), so zeros stand for the bytes before
// the first and behind the last. Those before have no part in the sums; each one behind adds `first` to `second`.
void add_chunk_avx512(Sums& sums, const uint8_t* data, size_t nbytes) {
  const __m512i weights = _mm512_load_si512(kWideWeights.data()), zero = _mm512_setzero_si512();
  __m512i first = zero, firsts = zero;           // as above, in 64 bits
  __m512i weighted_odd = zero, weighted = zero;  // two, because the next sum must wait four cycles
  const auto add = [&](__m512i bytes, __m512i& weighted_sum) {
    asm("" : "+v"(bytes));  // in a register: g++ 12 would load it twice, which takes a fifth longer
    firsts = _mm512_add_epi64(firsts, first);
    first = _mm512_add_epi64(first, _mm512_sad_epu8(bytes, zero));
    weighted_sum = _mm512_dpbusd_epi32(weighted_sum, bytes, weights);
  };

  const size_t before = reinterpret_cast<uintptr_t>(data) % kWideStep, end = before + nbytes;
  const size_t behind = (kWideStep - end % kWideStep) % kWideStep;
  const uint64_t not_before = ~uint64_t{0} << before, not_behind = ~uint64_t{0} >> behind;
  const uint8_t* step = data - before;
  const uint8_t* const last = data + nbytes + behind - kWideStep;
  if (step == last) {
    add(_mm512_maskz_loadu_epi8(not_before & not_behind, step), weighted);
  } else {
    add(_mm512_maskz_loadu_epi8(not_before, step), weighted);
    for (step += kWideStep; last - step >= static_cast<ptrdiff_t>(2 * kWideStep); step += 2 * kWideStep) {
      add(_mm512_load_si512(step), weighted_odd);
      add(_mm512_load_si512(step + kWideStep), weighted);
    }
    if (step < last) add(_mm512_load_si512(step), weighted_odd);
    add(_mm512_maskz_loadu_epi8(not_behind, last), weighted);
  }

  const uint64_t first_before = sums.first, first_behind = first_before + sum_of_lanes<uint64_t>(first);
  const uint64_t second = sums.second + first_before * (nbytes + behind) + kWideStep * sum_of_lanes<uint64_t>(firsts) +
                          sum_of_lanes<uint32_t>(_mm512_add_epi32(weighted, weighted_odd)) - first_behind * behind;
  sums.first = static_cast<uint32_t>(first_behind % kModulus);
  sums.second = static_cast<uint32_t>(second % kModulus);
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

}  // namespace

uint32_t adler32(uint32_t adler, const uint8_t* data, size_t nbytes, Isa isa) {
  Sums sums = {adler & 0xFFFF, adler >> 16};
  auto add_chunk = add_chunk_portable;
  size_t unit = kSquare;
#ifdef CXRFAST_PNG_AVX2
  if (isa == Isa::kAvx512) {
    while (nbytes > 0) {
      const size_t chunk = std::min(nbytes, kWideChunk);
      add_chunk_avx512(sums, data, chunk);
      data += chunk;
      nbytes -= chunk;
    }
  } else if (isa != Isa::kPortable) {
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
