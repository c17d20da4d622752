// immintrin.h - stands in for the compiler's header in tests: AVX-512 by SIMDe, so that its code runs on any x86-64.
// What SIMDe leaves out is written here from Intel's description of the instruction.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

// In each 16-byte part: bytes kShift .. kShift + 15 of b followed by a.
template <int kShift>
inline __m512i emulated_alignr_epi8(__m512i a, __m512i b) {
  uint8_t from_a[64], from_b[64], result[64];
  std::memcpy(from_a, &a, 64);
  std::memcpy(from_b, &b, 64);
  for (int i = 0; i < 64; ++i) {
    const int part = i / 16 * 16, at = i % 16 + kShift;
    result[i] = at < 16 ? from_b[part + at] : from_a[part + at - 16];
  }
  std::memcpy(&a, result, 64);
  return a;
}
#define _mm512_alignr_epi8(a, b, shift) emulated_alignr_epi8<(shift)>(a, b)

// 64-bit elements kShift .. kShift + 7 of b followed by a.
template <int kShift>
inline __m512i emulated_alignr_epi64(__m512i a, __m512i b) {
  uint64_t both[16];
  std::memcpy(both, &b, 64);
  std::memcpy(both + 8, &a, 64);
  std::memcpy(&a, both + kShift, 64);
  return a;
}
#define _mm512_alignr_epi64(a, b, shift) emulated_alignr_epi64<(shift)>(a, b)
