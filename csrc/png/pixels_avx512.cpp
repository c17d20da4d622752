// pixels_avx512.cpp - the pixel kernels on 64-byte vectors (AVX-512 BW and VNNI), two of them side by side.
#if defined(__x86_64__)

// GCC 12's own header for AVX-512 leaves operands that are masked out uninitialised, and then warns of them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "pixel_kernels.h"
#include "unfilter.h"

// Emulated: a test compiles this file against a header that stands in for the intrinsics, and runs it on any x86-64.
#if !defined(CXRFAST_EMULATE_AVX512)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#endif

namespace cxrfast::png {

namespace {

struct Lanes {
  static constexpr size_t kBytes = 64;
  using U8 = __m512i;
  using I32 = __m512i;
  using Where = uint64_t;  // a bit for each lane
  static constexpr size_t kTaps = 4;
  struct Cells {
    __m512i v[4];
  };

  static U8 load(const uint8_t* p) { return _mm512_load_si512(p); }
  static U8 load_unaligned(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, U8 v) { _mm512_store_si512(p, v); }
  static void store_unaligned(uint8_t* p, U8 v) { _mm512_storeu_si512(p, v); }
  static U8 fill(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static I32 fill32(int32_t value) { return _mm512_set1_epi32(value); }

  static __m128i load_part(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  // By halves: inserting into 32 bytes is twice as fast as into 64.
  static U8 of_parts(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load_part(a)), load_part(b), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load_part(c)), load_part(d), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static U8 gather_parts(const uint8_t* const* rows, size_t offset) {
    return of_parts(rows[0] + offset, rows[16] + offset, rows[32] + offset, rows[48] + offset);
  }
  static U8 load_parts(const uint8_t* p, size_t stride) {
    return of_parts(p, p + stride, p + 2 * stride, p + 3 * stride);
  }
  static U8 load_parts_of(const uint8_t* const* p, size_t offset) {
    return of_parts(p[0] + offset, p[1] + offset, p[2] + offset, p[3] + offset);
  }

  static U8 interleave_low(U8 a, U8 b) { return _mm512_unpacklo_epi8(a, b); }
  static U8 interleave_high(U8 a, U8 b) { return _mm512_unpackhi_epi8(a, b); }
  static U8 odd_lanes(U8 even, U8 odd) { return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, odd); }
  static U8 complement_odd_pairs(U8 even, U8 odd) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(-0x10000), even, odd, 0x53);  // ~(mask ? odd : even)
  }
  static U8 interleave_pairs_low(U8 a, U8 b) { return _mm512_unpacklo_epi16(a, b); }
  static U8 interleave_pairs_high(U8 a, U8 b) { return _mm512_unpackhi_epi16(a, b); }
  static U8 both(U8 a, U8 b) { return _mm512_and_si512(a, b); }
  static U8 either(U8 a, U8 b) { return _mm512_or_si512(a, b); }
  static U8 complement(U8 a) { return _mm512_xor_si512(a, fill(0xff)); }
  static U8 min(U8 a, U8 b) { return _mm512_min_epu8(a, b); }
  static U8 max(U8 a, U8 b) { return _mm512_max_epu8(a, b); }
  static U8 mean(U8 a, U8 b) { return _mm512_avg_epu8(a, b); }
  static U8 subtract(U8 a, U8 b) { return _mm512_sub_epi8(a, b); }
  static U8 subtract_to_zero(U8 a, U8 b) { return _mm512_subs_epu8(a, b); }
  static U8 where_not_less(U8 a, U8 b, U8 yes, U8 no) {
    return _mm512_mask_blend_epi8(_mm512_cmpge_epu8_mask(a, b), no, yes);
  }
  static Where where(U8 mask) { return _mm512_movepi8_mask(mask); }
  static U8 mean_where(Where where, U8 a, U8 b, U8 no) { return _mm512_mask_avg_epu8(no, where, a, b); }
  static U8 nearest_less(U8 x, U8 over, U8 below_half, U8 low, U8 below, U8 over_half, U8 high, U8 c) {
    const U8 high_or_c = _mm512_mask_sub_epi8(_mm512_sub_epi8(c, x), _mm512_cmplt_epu8_mask(below, over_half), high, x);
    return _mm512_mask_sub_epi8(high_or_c, _mm512_cmplt_epu8_mask(over, below_half), low, x);
  }
  static U8 carry(U8 before, U8 v) { return _mm512_alignr_epi64(v, before, 6); }
  static U8 shift_in(U8 carried, U8 v) { return _mm512_alignr_epi8(v, carried, 15); }

  // In a register: compilers would rather read it from memory again for each product.
  static I32 loaded(I32 v) {
#if !defined(CXRFAST_EMULATE_AVX512)
    asm("" : "+v"(v));
#endif
    return v;
  }
  static I32 multiply_add(I32 sum, I32 pixels, I32 weights) { return _mm512_dpbusd_epi32(sum, pixels, weights); }
  template <int kShift>
  static I32 shift_add(I32 high, I32 low) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, kShift), low);
  }
  template <int kShift>
  static I32 shift_down(I32 v) {
    return _mm512_srli_epi32(v, kShift);
  }
  static U8 pack(I32 a, I32 b, I32 c, I32 d) {
    return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  }
  static Cells cells(const uint8_t* const* rows, size_t column) {
    const __m512i a = gather_parts(rows, column), b = gather_parts(rows + 1, column);
    const __m512i c = gather_parts(rows + 2, column), d = gather_parts(rows + 3, column);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    return {{_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
             _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)}};
  }
};

}  // namespace

}  // namespace cxrfast::png

#include "pixel_kernels_impl.h"

namespace cxrfast::png {

constexpr PixelKernels kAvx512PixelKernels = kernels_of<Lanes, 2>();

}  // namespace cxrfast::png

#if !defined(CXRFAST_EMULATE_AVX512)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#endif
