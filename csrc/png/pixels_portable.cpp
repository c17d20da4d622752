// pixels_portable.cpp - the pixel kernels on 16-byte vectors: SSE2, which every x86-64 has, or the compiler's own
// vectors.
#include <algorithm>
#include <cstring>

#include "pixel_kernels.h"
#include "unfilter.h"

#if defined(__SSE2__) && !defined(CXRFAST_GENERIC_LANES)

#include <emmintrin.h>

namespace cxrfast::png {

namespace {

struct Lanes {
  static constexpr size_t kBytes = 16;
  using U8 = __m128i;
  using I32 = __m128i;
  using Where = U8;
  static constexpr size_t kTaps = 2;
  struct Cells {
    __m128i v[8];
  };

  static U8 load(const uint8_t* p) { return _mm_load_si128(reinterpret_cast<const __m128i*>(p)); }
  static U8 load_unaligned(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void store(uint8_t* p, U8 v) { _mm_store_si128(reinterpret_cast<__m128i*>(p), v); }
  static void store_unaligned(uint8_t* p, U8 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  static U8 fill(uint8_t value) { return _mm_set1_epi8(static_cast<char>(value)); }
  static I32 fill32(int32_t value) { return _mm_set1_epi32(value); }
  static U8 gather_parts(const uint8_t* const* rows, size_t offset) { return load_unaligned(rows[0] + offset); }
  static U8 load_parts(const uint8_t* p, size_t) { return load(p); }
  static U8 load_parts_of(const uint8_t* const* parts, size_t offset) { return load(parts[0] + offset); }

  static U8 interleave_low(U8 a, U8 b) { return _mm_unpacklo_epi8(a, b); }
  static U8 interleave_high(U8 a, U8 b) { return _mm_unpackhi_epi8(a, b); }
  static U8 odd_lanes(U8 even, U8 odd) {
    const U8 mask = _mm_set1_epi16(static_cast<int16_t>(0xff00));
    return _mm_or_si128(_mm_and_si128(mask, odd), _mm_andnot_si128(mask, even));
  }
  static U8 complement_odd_pairs(U8 even, U8 odd) {
    const U8 mask = _mm_set1_epi32(-0x10000);
    return _mm_or_si128(_mm_andnot_si128(odd, mask), _mm_andnot_si128(even, complement(mask)));
  }
  static U8 both(U8 a, U8 b) { return _mm_and_si128(a, b); }
  static U8 either(U8 a, U8 b) { return _mm_or_si128(a, b); }
  static U8 complement(U8 a) { return _mm_xor_si128(a, fill(0xff)); }
  static U8 min(U8 a, U8 b) { return _mm_min_epu8(a, b); }
  static U8 max(U8 a, U8 b) { return _mm_max_epu8(a, b); }
  static U8 mean(U8 a, U8 b) { return _mm_avg_epu8(a, b); }
  static U8 subtract(U8 a, U8 b) { return _mm_sub_epi8(a, b); }
  static U8 subtract_to_zero(U8 a, U8 b) { return _mm_subs_epu8(a, b); }
  static U8 where_not_less(U8 a, U8 b, U8 yes, U8 no) {
    const U8 mask = _mm_cmpeq_epi8(_mm_max_epu8(a, b), a);
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
  }
  static U8 carry(U8 before, U8) { return _mm_srli_si128(before, 15); }
  static U8 shift_in(U8 carried, U8 v) { return _mm_or_si128(_mm_slli_si128(v, 1), carried); }

  // In a register: compilers would rather read it from memory again for each product.
  static I32 loaded(I32 v) {
    asm("" : "+x"(v));
    return v;
  }
  static I32 multiply_add(I32 sum, I32 pixels, I32 weights) {
    return _mm_add_epi32(sum, _mm_madd_epi16(pixels, weights));
  }
  template <int kShift>
  static I32 shift_add(I32 high, I32 low) {
    return _mm_add_epi32(_mm_slli_epi32(high, kShift), low);
  }
  template <int kShift>
  static I32 shift_down(I32 v) {
    return _mm_srli_epi32(v, kShift);
  }
  static U8 pack(I32 a, I32 b, I32 c, I32 d) { return _mm_packus_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d)); }
  static Cells cells(const uint8_t* const* rows, size_t column) {
    Cells result;
    const __m128i zero = _mm_setzero_si128();
    __m128i half[2][4];
    for (int r = 0; r < 4; ++r) {
      const __m128i row = load_unaligned(rows[r] + column);
      half[0][r] = _mm_unpacklo_epi8(row, zero);
      half[1][r] = _mm_unpackhi_epi8(row, zero);
    }
    for (int h = 0; h < 2; ++h) {
      const __m128i ab_low = _mm_unpacklo_epi32(half[h][0], half[h][1]);
      const __m128i ab_high = _mm_unpackhi_epi32(half[h][0], half[h][1]);
      const __m128i cd_low = _mm_unpacklo_epi32(half[h][2], half[h][3]);
      const __m128i cd_high = _mm_unpackhi_epi32(half[h][2], half[h][3]);
      result.v[4 * h] = _mm_unpacklo_epi64(ab_low, cd_low);
      result.v[4 * h + 1] = _mm_unpackhi_epi64(ab_low, cd_low);
      result.v[4 * h + 2] = _mm_unpacklo_epi64(ab_high, cd_high);
      result.v[4 * h + 3] = _mm_unpackhi_epi64(ab_high, cd_high);
    }
    return result;
  }
};

}  // namespace

}  // namespace cxrfast::png

#else

namespace cxrfast::png {

namespace {

// The same on vectors of the compiler (GCC and clang), for any CPU. Those of a whole part are what it knows to lower
// well.
struct Lanes {
  static constexpr size_t kBytes = 16;
  typedef uint8_t U8 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  using Where = U8;
  static constexpr size_t kTaps = 2;
  struct Cells {
    U8 v[8];
  };

  static U8 load(const uint8_t* p) { return load_unaligned(p); }
  static U8 load_unaligned(const uint8_t* p) {
    U8 v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(uint8_t* p, U8 v) { store_unaligned(p, v); }
  static void store_unaligned(uint8_t* p, U8 v) { std::memcpy(p, &v, sizeof v); }
  static U8 fill(uint8_t value) { return U8{} + value; }
  static I32 fill32(int32_t value) { return I32{} + value; }
  static U8 gather_parts(const uint8_t* const* rows, size_t offset) { return load_unaligned(rows[0] + offset); }
  static U8 load_parts(const uint8_t* p, size_t) { return load(p); }
  static U8 load_parts_of(const uint8_t* const* parts, size_t offset) { return load(parts[0] + offset); }

  static U8 interleave_low(U8 a, U8 b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static U8 interleave_high(U8 a, U8 b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  static U8 odd_lanes(U8 even, U8 odd) {
    return __builtin_shufflevector(even, odd, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31);
  }
  static U8 complement_odd_pairs(U8 even, U8 odd) {
    return ~__builtin_shufflevector(even, odd, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31);
  }
  static U8 both(U8 a, U8 b) { return a & b; }
  static U8 either(U8 a, U8 b) { return a | b; }
  static U8 complement(U8 a) { return ~a; }
  static U8 min(U8 a, U8 b) { return a < b ? a : b; }
  static U8 max(U8 a, U8 b) { return a > b ? a : b; }
  static U8 mean(U8 a, U8 b) { return (a | b) - ((a ^ b) >> 1); }
  static U8 subtract(U8 a, U8 b) { return a - b; }
  static U8 subtract_to_zero(U8 a, U8 b) { return max(a, b) - b; }
  static U8 where_not_less(U8 a, U8 b, U8 yes, U8 no) { return a >= b ? yes : no; }
  static U8 carry(U8 before, U8) { return before; }
  static U8 shift_in(U8 carried, U8 v) {
    return __builtin_shufflevector(carried, v, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
  }

  static I32 loaded(U8 v) { return reinterpret_cast<I32>(v); }
  static I32 loaded(I32 v) { return v; }
  static I32 multiply_add(I32 sum, I32 pixels, I32 weights) {
    return sum + (pixels & 0xffff) * (weights & 0xffff) + (pixels >> 16) * (weights >> 16);
  }
  template <int kShift>
  static I32 shift_add(I32 high, I32 low) {
    return (high << kShift) + low;
  }
  template <int kShift>
  static I32 shift_down(I32 v) {
    return v >> kShift;
  }
  static U8 pack(I32 a, I32 b, I32 c, I32 d) {
    U8 result;
    for (int i = 0; i < 4; ++i) {
      result[i] = clip(a[i]);
      result[4 + i] = clip(b[i]);
      result[8 + i] = clip(c[i]);
      result[12 + i] = clip(d[i]);
    }
    return result;
  }
  static uint8_t clip(int32_t value) { return static_cast<uint8_t>(std::min(value, 255)); }
  static Cells cells(const uint8_t* const* rows, size_t column) {
    Cells result;
    for (size_t i = 0; i < 8; ++i) {
      I32 v;
      for (size_t r = 0; r < 4; ++r) {
        const uint8_t* pixel = rows[r] + column + 2 * i;
        v[r] = pixel[0] | pixel[1] << 16;
      }
      result.v[i] = reinterpret_cast<U8>(v);
    }
    return result;
  }
};

}  // namespace

}  // namespace cxrfast::png

#endif

#include "pixel_kernels_impl.h"

namespace cxrfast::png {

constexpr PixelKernels kPortablePixelKernels = kernels_of<Lanes, 2>();

}  // namespace cxrfast::png
