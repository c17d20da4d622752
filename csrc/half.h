// half.h - fp16 and bf16 as their bits, and the conversions from and to float, for the CPU and for CUDA.
//
// Every function is a fixed sequence of IEEE operations: the CPU and CUDA give the same bits. Knows nothing of torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CXRFAST_INLINE __host__ __device__ __forceinline__
#else
#define CXRFAST_INLINE inline __attribute__((always_inline))
#endif

namespace cxrfast {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

CXRFAST_INLINE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
CXRFAST_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

CXRFAST_INLINE float to_real(float value) { return value; }
CXRFAST_INLINE float to_real(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

// Exact. A subnormal is 0.5 + m * 2^-24 less 0.5, so that no float is subnormal on the way (flush-to-zero modes).
CXRFAST_INLINE float to_real(Half value) {
  uint32_t magnitude = value.bits & 0x7FFFu;
  uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  float subnormal = float_of(0x3F000000u + magnitude) - 0.5f;
  uint32_t rebias = magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u;  // 255 - 31, or 127 - 15, in the exponent
  float normal = float_of((magnitude << 13) + rebias);
  return float_of(bits_of(magnitude < 0x0400u ? subnormal : normal) | sign);
}

// Magnitude bits of the fp16 nearest to |value|, ties to even; 0x7C00 from 65520 on. `value` is not NaN.
// Below 2^-14 the fp16 spacing is 2^-24, which is that of floats in [0.5, 1): the addition does the rounding.
CXRFAST_INLINE uint32_t half_magnitude(float value) {
  uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return magnitude >= 0x477FF000u ? 0x7C00u : finite;
}

CXRFAST_INLINE void from_real(float value, float* out) { *out = value; }

CXRFAST_INLINE void from_real(float value, Half* out) {
  uint32_t bits = bits_of(value);
  uint32_t magnitude = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7E00u : half_magnitude(value);
  out->bits = uint16_t(magnitude | ((bits >> 16) & 0x8000u));
}

CXRFAST_INLINE void from_real(float value, BFloat16* out) {
  uint32_t bits = bits_of(value);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace cxrfast
