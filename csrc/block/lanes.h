// lanes.h - vectors of n floats for the passes of this folder, and how the widest is chosen at run time.
//
// A pass is written once, as a template over n, with the vectors of GCC and clang. Each level below is one instance of
// it: a function with that target attribute, into which everything is inlined (nothing here may be called otherwise).
// Vectors are handed on by reference: by value, their ABI would depend on the level.
#pragma once

#include <cstdint>
#include <cstring>

#define CXRFAST_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define CXRFAST_AVX2 __attribute__((target("avx2,fma")))
#define CXRFAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

namespace cxrfast {

enum class Level { kPortable, kAvx2, kAvx512 };

// The highest that this CPU runs, lowered by the environment variable CXRFAST_ISA=portable|avx2|avx512. The environment
// is read at every call.
Level best_level();

// Whether this CPU multiplies bfloat16 in vectors (AVX512_BF16), and has no matrix unit (AMX) that torch would use.
bool has_bf16_products();

struct Bf16 {
  uint16_t bits;
};

// Vectors of n values. Spelt out for each n: g++ 12 mistakes a vector whose length depends on a template's argument.
template <int n>
struct Vectors;
#define CXRFAST_VECTORS(n)                                  \
  template <>                                               \
  struct Vectors<n> {                                       \
    typedef float F __attribute__((vector_size(4 * n)));    \
    typedef int32_t I __attribute__((vector_size(4 * n)));  \
    typedef uint32_t U __attribute__((vector_size(4 * n))); \
    typedef uint16_t H __attribute__((vector_size(2 * n))); \
    typedef uint8_t B __attribute__((vector_size(n)));      \
  };
CXRFAST_VECTORS(1)
CXRFAST_VECTORS(4)
CXRFAST_VECTORS(8)
CXRFAST_VECTORS(16)
#undef CXRFAST_VECTORS

template <int n>
struct Lanes {
  using F = typename Vectors<n>::F;
  using I = typename Vectors<n>::I;
  using U = typename Vectors<n>::U;
  using H = typename Vectors<n>::H;
  using B = typename Vectors<n>::B;

  static CXRFAST_INLINE void load(const float* from, F& to) { std::memcpy(&to, from, sizeof(F)); }
  static CXRFAST_INLINE void load(const Bf16* from, F& to) {
    H half;
    std::memcpy(&half, from, sizeof(H));
    const U bits = __builtin_convertvector(half, U) << 16;
    std::memcpy(&to, &bits, sizeof(F));
  }
  static CXRFAST_INLINE void load(const uint8_t* from, I& to) {
    B bytes;
    std::memcpy(&bytes, from, sizeof(B));
    to = __builtin_convertvector(bytes, I);
  }

  static CXRFAST_INLINE void store(float* to, const F& from) { std::memcpy(to, &from, sizeof(F)); }
  static CXRFAST_INLINE void store(Bf16* to, const F& from) {  // to nearest, ties to even; a NaN stays one
    U bits;
    std::memcpy(&bits, &from, sizeof(F));
    const U rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const U quiet = U{} + 0x7FC0;
    const U chosen = from != from ? quiet : rounded;
    const H half = __builtin_convertvector(chosen, H);
    std::memcpy(to, &half, sizeof(H));
  }
  static CXRFAST_INLINE void store(uint8_t* to, const I& from) {
    const B bytes = __builtin_convertvector(from, B);
    std::memcpy(to, &bytes, sizeof(B));
  }
};

// Calls Pass::run<n, vectors, T>(first channel, arguments...) for all C channels: two vectors at a time where kPairs,
// then one, then single values.
template <class Pass, int n, bool kPairs, class T, class... Arguments>
CXRFAST_INLINE void over_channels(int64_t C, Arguments... arguments) {
  int64_t c = 0;
  if constexpr (kPairs)
    for (; c + 2 * n <= C; c += 2 * n) Pass::template run<n, 2, T>(c, arguments...);
  for (; c + n <= C; c += n) Pass::template run<n, 1, T>(c, arguments...);
  for (; c < C; ++c) Pass::template run<1, 1, T>(c, arguments...);
}

// Chunks::run<n>(job, begin, end), compiled for each level with that level's vectors, at the best of them. A pass that
// is to be inlined into them is CXRFAST_INLINE throughout.
template <class Chunks, class Job>
void run_portable(const Job& job, int64_t begin, int64_t end) {
  Chunks::template run<4>(job, begin, end);
}
#if defined(__x86_64__)
template <class Chunks, class Job>
CXRFAST_AVX2 void run_avx2(const Job& job, int64_t begin, int64_t end) {
  Chunks::template run<8>(job, begin, end);
}
template <class Chunks, class Job>
CXRFAST_AVX512 void run_avx512(const Job& job, int64_t begin, int64_t end) {
  Chunks::template run<16>(job, begin, end);
}
#endif
template <class Chunks, class Job>
void run_at_best_level(const Job& job, int64_t begin, int64_t end) {
  switch (best_level()) {
#if defined(__x86_64__)
    case Level::kAvx512:
      return run_avx512<Chunks>(job, begin, end);
    case Level::kAvx2:
      return run_avx2<Chunks>(job, begin, end);
#endif
    default:
      return run_portable<Chunks>(job, begin, end);
  }
}

}  // namespace cxrfast
