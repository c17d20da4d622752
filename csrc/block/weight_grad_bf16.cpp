// weight_grad_bf16.cpp - weight_grad_bf16.h. The instruction (vdpbf16ps) adds the products of two neighbouring pixels,
// so that both sides are packed as pairs of pixels, one 32-bit word a channel: grad from even pixels on, x from even
// and from odd ones, since a tap moves it by one. A tile of 8 x 32 weights stays in sixteen registers over a row of
// pixels.
#include "weight_grad_bf16.h"

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace cxrfast {
namespace {

constexpr int64_t kMaxParts = 16;  // more than a desktop's cores; each part costs a copy of the weights

#if defined(__x86_64__)
#define CXRFAST_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

constexpr int64_t kIn = kWeightGradBf16In, kOut = kWeightGradBf16Out;

// Pairs of `from` and `next`, `count` channels (a multiple of 8) of two pixels; null is a pixel of zeros.
CXRFAST_BF16 inline void pack_pair(const uint16_t* from, const uint16_t* next, int64_t count, int64_t step,
                                   uint32_t* to) {
  const __m128i zero = _mm_setzero_si128();
  for (int64_t c = 0; c < count; c += 8, to += step) {
    const __m128i low = from ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c)) : zero;
    const __m128i high = next ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(next + c)) : zero;
    const __m256i pairs =
        _mm256_or_si256(_mm256_cvtepu16_epi32(low), _mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs);
  }
}

// A row of x, packed: [parity][in / 8][pairs + 1][8], where pair p of parity q begins at column 2 p + q - 1.
CXRFAST_BF16 void pack_x(const WeightGradBf16Job& job, int64_t image, int64_t y, int64_t pairs, uint32_t* to) {
  const int64_t size = (pairs + 1) * job.in;
  if (y < 0 || y >= job.H) {
    std::fill_n(to, 2 * size, 0u);
    return;
  }
  const uint16_t* row = job.x + (image * job.H + y) * job.W * job.in;
  const auto pixel = [&](int64_t column) { return column >= 0 && column < job.W ? row + column * job.in : nullptr; };
  for (int64_t parity = 0; parity < 2; ++parity)
    for (int64_t pair = 0; pair <= pairs; ++pair) {
      const int64_t column = 2 * pair + parity - 1;
      pack_pair(pixel(column), pixel(column + 1), job.in, (pairs + 1) * kIn, to + parity * size + pair * kIn);
    }
}

// A row of grad, packed: [out / 32][pairs][32].
CXRFAST_BF16 void pack_grad(const WeightGradBf16Job& job, int64_t row, int64_t pairs, uint32_t* to) {
  const uint16_t* from = job.grad + row * job.W * job.out;
  for (int64_t o = 0; o < job.out; o += kOut)
    for (int64_t pair = 0; pair < pairs; ++pair, to += kOut) {
      const uint16_t* first = from + 2 * pair * job.out + o;
      pack_pair(first, 2 * pair + 1 < job.W ? first + job.out : nullptr, kOut, 8, to);
    }
}

// tile (8, 32) of weights (in, out) += over the row's pairs of x[pair][0..8) times grad[pair][0..32)
CXRFAST_BF16 inline void add_tile(const uint32_t* x, const uint32_t* grad, int64_t pairs, int64_t out, float* tile) {
  __m512 sums[kIn][2];
#pragma GCC unroll 8
  for (int i = 0; i < kIn; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sums[i][j] = _mm512_loadu_ps(tile + i * out + 16 * j);
  for (int64_t pair = 0; pair < pairs; ++pair, x += kIn, grad += kOut) {
    const __m512bh low = (__m512bh)_mm512_loadu_si512(grad), high = (__m512bh)_mm512_loadu_si512(grad + 16);
#pragma GCC unroll 8
    for (int i = 0; i < kIn; ++i) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(int(x[i]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], low, both);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], high, both);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kIn; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(tile + i * out + 16 * j, sums[i][j]);
}

CXRFAST_BF16 void add_row(const WeightGradBf16Job& job, const uint32_t* const x_rows[3], const uint32_t* grad,
                          int64_t pairs, float* weights) {
  const int64_t block = (pairs + 1) * kIn;
  for (int64_t o = 0; o < job.out; o += kOut)
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t i = 0; i < job.in; i += kIn)
        for (int64_t kx = 0; kx < 3; ++kx) {
          // column 2 p + kx - 1 begins pair p of parity 0 or 1, or the pair after of parity 0
          const uint32_t* x = x_rows[ky] + (kx & 1) * (pairs + 1) * job.in + i / kIn * block + (kx >> 1) * kIn;
          add_tile(x, grad + o * pairs, pairs, job.out, weights + ((ky * 3 + kx) * job.in + i) * job.out + o);
        }
}

bool has_matrix_unit() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
}

#endif

}  // namespace

bool weight_grad_bf16_supported() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && !has_matrix_unit();
#else
  return false;
#endif
}

int64_t weight_grad_bf16_parts(const WeightGradBf16Job& job) { return std::min(job.N * job.H, kMaxParts); }

void weight_grad_bf16_run(const WeightGradBf16Job& job, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  const int64_t rows = job.N * job.H, parts = weight_grad_bf16_parts(job), pairs = (job.W + 1) / 2;
  const int64_t x_size = 2 * (pairs + 1) * job.in;
  std::vector<uint32_t> packed_x(size_t(3 * x_size)), for_grad(size_t(pairs * job.out + 15));
  const auto x_row = [&](int64_t y) { return packed_x.data() + (y + 1) % 3 * x_size; };  // three rows at a time
  // from a cache line's beginning: otherwise every vector would lie in two lines
  uint32_t* packed_grad = for_grad.data() + (64 - reinterpret_cast<uintptr_t>(for_grad.data()) % 64) % 64 / 4;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first = rows * part / parts, stop = rows * (part + 1) / parts;
    for (int64_t row = first; row < stop; ++row) {
      const int64_t image = row / job.H, y = row % job.H;
      for (int64_t k = row == first || y == 0 ? y - 1 : y + 1; k <= y + 1; ++k) pack_x(job, image, k, pairs, x_row(k));
      pack_grad(job, row, pairs, packed_grad);
      const uint32_t* const x_rows[3] = {x_row(y - 1), x_row(y), x_row(y + 1)};
      add_row(job, x_rows, packed_grad, pairs, job.partial + part * 9 * job.in * job.out);
    }
  }
#else
  (void)job, (void)begin, (void)end;
#endif
}

}  // namespace cxrfast
