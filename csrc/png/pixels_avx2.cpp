// pixels_avx2.cpp - the pixel kernels on 32-byte vectors (AVX2), two of them side by side.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "pixel_kernels.h"
#include "unfilter.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace cxrfast::png {

namespace {

struct Lanes {
  static constexpr size_t kBytes = 32;
  using U8 = __m256i;
  using I32 = __m256i;
  using Where = U8;
  static constexpr size_t kTaps = 2;
  struct Cells {
    __m256i v[8];
  };

  static U8 load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static U8 load_unaligned(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint8_t* p, U8 v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static void store_unaligned(uint8_t* p, U8 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static U8 fill(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static I32 fill32(int32_t value) { return _mm256_set1_epi32(value); }

  // Part q: 16 bytes at rows[16 q] + offset.
  static U8 gather_parts(const uint8_t* const* rows, size_t offset) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0] + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[16] + offset)), 1);
  }
  // Part q: 16 bytes at p + q * stride, aligned.
  static U8 load_parts(const uint8_t* p, size_t stride) {
    const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm_load_si128(reinterpret_cast<const __m128i*>(p + stride)), 1);
  }
  // Part q: 16 bytes at parts[q] + offset, aligned.
  static U8 load_parts_of(const uint8_t* const* parts, size_t offset) {
    const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(parts[0] + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm_load_si128(reinterpret_cast<const __m128i*>(parts[1] + offset)), 1);
  }
  static U8 interleave_low(U8 a, U8 b) { return _mm256_unpacklo_epi8(a, b); }
  static U8 interleave_high(U8 a, U8 b) { return _mm256_unpackhi_epi8(a, b); }
  // Lanes 1, 3, 5 .. of odd, the others of even.
  static U8 odd_lanes(U8 even, U8 odd) {
    return _mm256_blendv_epi8(even, odd, _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
  }
  // Complements of lanes 2, 3, 6, 7 .. of odd, of the others of even.
  static U8 complement_odd_pairs(U8 even, U8 odd) { return complement(_mm256_blend_epi16(even, odd, 0xaa)); }
  static U8 both(U8 a, U8 b) { return _mm256_and_si256(a, b); }
  static U8 either(U8 a, U8 b) { return _mm256_or_si256(a, b); }
  static U8 complement(U8 a) { return _mm256_xor_si256(a, fill(0xff)); }
  static U8 min(U8 a, U8 b) { return _mm256_min_epu8(a, b); }
  static U8 max(U8 a, U8 b) { return _mm256_max_epu8(a, b); }
  static U8 mean(U8 a, U8 b) { return _mm256_avg_epu8(a, b); }
  static U8 subtract(U8 a, U8 b) { return _mm256_sub_epi8(a, b); }
  static U8 subtract_to_zero(U8 a, U8 b) { return _mm256_subs_epu8(a, b); }
  // Lane by lane: a >= b ? yes : no.
  static U8 where_not_less(U8 a, U8 b, U8 yes, U8 no) {
    return _mm256_blendv_epi8(no, yes, _mm256_cmpeq_epi8(_mm256_max_epu8(a, b), a));
  }
  // Part q of the result is the part before part q of v; part 0 is the last part of `before`.
  static U8 carry(U8 before, U8 v) { return _mm256_permute2x128_si256(before, v, 0x21); }
  // In each part, lane i is v's lane i - 1; lane 0 is the last lane of the same part of `carried`.
  static U8 shift_in(U8 carried, U8 v) { return _mm256_alignr_epi8(v, carried, 15); }

  // In a register: compilers would rather read it from memory again for each product.
  static I32 loaded(I32 v) {
    asm("" : "+x"(v));
    return v;
  }
  static I32 multiply_add(I32 sum, I32 pixels, I32 weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pixels, weights));
  }
  template <int kShift>
  static I32 shift_add(I32 high, I32 low) {
    return _mm256_add_epi32(_mm256_slli_epi32(high, kShift), low);
  }
  template <int kShift>
  static I32 shift_down(I32 v) {
    return _mm256_srli_epi32(v, kShift);
  }
  static U8 pack(I32 a, I32 b, I32 c, I32 d) {
    return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  }
  // Lanes: rows[0 .. 3] and rows[16 .. 19]; vector i: columns 2 i and 2 i + 1 from `column` on, as 16-bit numbers.
  static Cells cells(const uint8_t* const* rows, size_t column) {
    const __m256i a = gather_parts(rows, column), b = gather_parts(rows + 1, column);
    const __m256i c = gather_parts(rows + 2, column), d = gather_parts(rows + 3, column);
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    const __m256i fours[4] = {_mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
                              _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)};
    const __m256i low =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
    const __m256i high =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
    Cells result;
    for (int i = 0; i < 4; ++i) {
      result.v[2 * i] = _mm256_shuffle_epi8(fours[i], low);
      result.v[2 * i + 1] = _mm256_shuffle_epi8(fours[i], high);
    }
    return result;
  }
};

}  // namespace

}  // namespace cxrfast::png

#include "pixel_kernels_impl.h"

namespace cxrfast::png {

constexpr PixelKernels kAvx2PixelKernels = kernels_of<Lanes, 2>();

}  // namespace cxrfast::png

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
