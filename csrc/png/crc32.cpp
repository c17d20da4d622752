// crc32.cpp - sixteen bytes a step from tables, or 64 or 256 bytes a step with carry-less multiplication.
//
// Method of the other two: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009.
// Its last reduction is left to the tables: the folded 16 bytes stand for the whole message, so their own CRC is the
// answer.
#include "crc32.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CXRFAST_PNG_PCLMUL 1
#endif

namespace cxrfast::png {

namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;  // bit-reflected: bit 31 is x^0

constexpr uint32_t times_x(uint32_t value) { return (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0); }

constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 16> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = times_x(value);
    tables[0][byte] = value;
  }
  for (size_t ahead = 1; ahead < 16; ++ahead) {  // tables[k]: the byte is followed by k zero bytes
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t value = tables[ahead - 1][byte];
      tables[ahead][byte] = (value >> 8) ^ tables[0][value & 255];
    }
  }
  return tables;
}();

uint32_t load32(const uint8_t* data) {
  uint32_t value;
  std::memcpy(&value, data, sizeof value);
  if constexpr (std::endian::native == std::endian::big) value = __builtin_bswap32(value);
  return value;
}

uint32_t look_up(uint32_t word, size_t ahead) {
  return kTables[ahead + 3][word & 255] ^ kTables[ahead + 2][(word >> 8) & 255] ^
         kTables[ahead + 1][(word >> 16) & 255] ^ kTables[ahead][word >> 24];
}

// `state` is the complement of a CRC.
uint32_t update_tables(uint32_t state, const uint8_t* data, size_t nbytes) {
  for (; nbytes >= 16; data += 16, nbytes -= 16) {
    state = look_up(state ^ load32(data), 12) ^ look_up(load32(data + 4), 8) ^ look_up(load32(data + 8), 4) ^
            look_up(load32(data + 12), 0);
  }
  for (; nbytes > 0; ++data, --nbytes) state = (state >> 8) ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#ifdef CXRFAST_PNG_PCLMUL

// x^n mod P, reflected, one bit up: the product of two reflected 64-bit factors lies one bit too low.
constexpr uint64_t power_of_x(int n) {
  uint32_t value = uint32_t{1} << 31;
  for (int i = 0; i < n; ++i) value = times_x(value);
  return uint64_t{value} << 1;
}

// To move 16 bytes ahead by n bits: the half that comes first is x^64 higher, and a factor's 32 bits sit 32 too high.
constexpr uint64_t kAhead256Low = power_of_x(2048 + 32), kAhead256High = power_of_x(2048 - 32);
constexpr uint64_t kAhead64Low = power_of_x(512 + 32), kAhead64High = power_of_x(512 - 32);
constexpr uint64_t kAhead16Low = power_of_x(128 + 32), kAhead16High = power_of_x(128 - 32);
static_assert(kAhead64Low == 0x154442bd4 && kAhead64High == 0x1c6e41596, "the constants of the paper, page 22");
static_assert(kAhead16Low == 0x1751997d0 && kAhead16High == 0x0ccaa009e, "the constants of the paper, page 22");

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i value, __m128i ahead, __m128i next) {
  return _mm_xor_si128(
      next, _mm_xor_si128(_mm_clmulepi64_si128(value, ahead, 0x00), _mm_clmulepi64_si128(value, ahead, 0x11)));
}

__attribute__((target("pclmul,sse4.1"))) uint32_t update_pclmul(uint32_t state, const uint8_t* data, size_t nbytes) {
  if (nbytes < 64) return update_tables(state, data, nbytes);
  const auto load = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  const __m128i ahead64 = _mm_set_epi64x(kAhead64High, kAhead64Low);
  const __m128i ahead16 = _mm_set_epi64x(kAhead16High, kAhead16Low);
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (data += 64, nbytes -= 64; nbytes >= 64; data += 64, nbytes -= 64) {
    a = fold(a, ahead64, load(data));
    b = fold(b, ahead64, load(data + 16));
    c = fold(c, ahead64, load(data + 32));
    d = fold(d, ahead64, load(data + 48));
  }
  a = fold(fold(fold(a, ahead16, b), ahead16, c), ahead16, d);
  for (; nbytes >= 16; data += 16, nbytes -= 16) a = fold(a, ahead16, load(data));
  uint8_t folded[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(folded), a);
  return update_tables(update_tables(0, folded, sizeof folded), data, nbytes);
}

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,vpclmulqdq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,vpclmulqdq")
#endif

inline __m512i four_times(uint64_t high, uint64_t low) {
  const auto h = static_cast<int64_t>(high), l = static_cast<int64_t>(low);
  return _mm512_set4_epi64(h, l, h, l);
}

inline __m512i fold(__m512i value, __m512i ahead, __m512i next) {
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, ahead, 0x00),
                                   _mm512_clmulepi64_epi128(value, ahead, 0x11), next, kXorOfThree);
}

// Folds nbytes, a multiple of 64 and at least kFoldedFrom, to 64 bytes that stand for them.
//
// No function of this file may be called in here: g++ 12 then leaves out the vzeroupper, and while the upper halves of
// the vectors are in use, a Zen 4 runs SSE code (update_pclmul, for one) at 0.56 times its speed.
constexpr size_t kFoldedFrom = 256;
template <bool kCopies>
void fold_vpclmul(uint32_t state, const uint8_t* data, size_t nbytes, uint8_t* out, uint8_t folded_ret[64]) {
  size_t at = 0;
  const auto next = [&] {
    const __m512i value = _mm512_loadu_si512(data + at);
    if constexpr (kCopies) _mm512_storeu_si512(out + at, value);
    at += 64;
    return value;
  };
  const __m512i ahead256 = four_times(kAhead256High, kAhead256Low), ahead64 = four_times(kAhead64High, kAhead64Low);
  __m512i a = _mm512_xor_si512(next(), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  __m512i b = next(), c = next(), d = next();
  while (nbytes - at >= 256) {
    a = fold(a, ahead256, next());
    b = fold(b, ahead256, next());
    c = fold(c, ahead256, next());
    d = fold(d, ahead256, next());
  }
  a = fold(fold(fold(a, ahead64, b), ahead64, c), ahead64, d);
  while (at < nbytes) a = fold(a, ahead64, next());
  _mm512_storeu_si512(folded_ret, a);
  (void)out;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// nbytes >= kFoldedFrom.
template <bool kCopies>
uint32_t update_vpclmul(uint32_t state, const uint8_t* data, size_t nbytes, uint8_t* out) {
  uint8_t folded[64];
  const size_t whole = nbytes / 64 * 64;
  fold_vpclmul<kCopies>(state, data, whole, out, folded);
  state = update_tables(update_pclmul(0, folded, sizeof folded), data + whole, nbytes - whole);
  if constexpr (kCopies) std::memmove(out + whole, data + whole, nbytes - whole);
  return state;
}

#endif

}  // namespace

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t nbytes, Isa isa) {
#ifdef CXRFAST_PNG_PCLMUL
  if (isa == Isa::kAvx512 && nbytes >= kFoldedFrom) return ~update_vpclmul<false>(~crc, data, nbytes, nullptr);
  if (isa != Isa::kPortable) return ~update_pclmul(~crc, data, nbytes);
#endif
  (void)isa;
  return ~update_tables(~crc, data, nbytes);
}

uint32_t crc32_and_copy(uint32_t crc, const uint8_t* data, size_t nbytes, uint8_t* out, Isa isa) {
#ifdef CXRFAST_PNG_PCLMUL
  if (isa == Isa::kAvx512 && nbytes >= kFoldedFrom) return ~update_vpclmul<true>(~crc, data, nbytes, out);
#endif
  crc = crc32(crc, data, nbytes, isa);
  std::memmove(out, data, nbytes);  // behind the CRC: the bytes are in the cache now
  return crc;
}

}  // namespace cxrfast::png
