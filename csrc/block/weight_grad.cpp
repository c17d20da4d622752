// weight_grad.cpp - weight_grad.h. For a group of image rows and each of the nine taps: grad^T (out, pixels) times the
// shifted rows of x (pixels, in), in tiles of 6 x 16 whose sums stay in twelve registers over the whole group. Twelve
// sums hide the multiply-add's four cycles of latency at two a cycle. Both sides are packed first, sixteen channels of
// x with a border of zeros, and a tile's channels of grad: in the maps themselves the pixels of 256 channels lie 1 KiB
// apart and fall into four sets of the first cache.
#include "weight_grad.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cxrfast {
namespace {

constexpr int64_t kMaxParts = 16;             // more than a desktop's cores; each part costs a copy of the weights
constexpr int64_t kPanelNbytes = 24 * 1024;   // of x: it stays in a first cache of 32 KiB beside a tile's grad
constexpr int64_t kGroupNbytes = 160 * 1024;  // of grad: within the 256 KiB second cache of older CPUs, beside x
constexpr int64_t kTileOut = 6;

#if defined(__x86_64__)

// Rows of one image, packed.
struct Group {
  int64_t rows, W, in;
};

// tile (kOut, 16) of the weights += sum over the group's pixels of grad[pixel][0..kOut) * x[pixel][0..16)
template <int kOut>
__attribute__((target("avx2,fma"))) inline void add_tile(const Group& group, const float* x_map, const float* grad_map,
                                                         float* tile) {
  const int64_t rows = group.rows, W = group.W;
  __m256 sums[kOut][2];
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sums[i][j] = _mm256_loadu_ps(tile + i * group.in + 8 * j);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = x_map + row * (W + 2) * kWeightGradIn;
    const float* grad = grad_map + row * W * kOut;
    for (int64_t pixel = 0; pixel < W; ++pixel, x += kWeightGradIn, grad += kOut) {
      const __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8);
#pragma GCC unroll 6
      for (int i = 0; i < kOut; ++i) {
        const __m256 g = _mm256_broadcast_ss(grad + i);
        sums[i][0] = _mm256_fmadd_ps(g, low, sums[i][0]);
        sums[i][1] = _mm256_fmadd_ps(g, high, sums[i][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm256_storeu_ps(tile + i * group.in + 8 * j, sums[i][j]);
}

// Sixteen channels of x from rows [begin - 1, end + 1) and columns [-1, W] of one image.
void pack_x(const WeightGradJob& job, int64_t image, int64_t begin, int64_t end, int64_t channel, float* to) {
  constexpr int64_t kPixel = kWeightGradIn;
  for (int64_t row = begin - 1; row <= end; ++row) {
    const bool inside = row >= 0 && row < job.H;
    std::fill_n(to, inside ? kPixel : (job.W + 2) * kPixel, 0.0f);
    if (inside) {
      const float* from = job.x + (image * job.H + row) * job.W * job.in + channel;
      for (int64_t pixel = 0; pixel < job.W; ++pixel)
        std::copy_n(from + pixel * job.in, kPixel, to + (pixel + 1) * kPixel);
      std::fill_n(to + (job.W + 1) * kPixel, kPixel, 0.0f);
    }
    to += (job.W + 2) * kPixel;
  }
}

// Channels of a tile, of so many pixels.
template <int kOut>
void pack_tile(const float* grad, int64_t pixels, int64_t out, float* to) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) std::copy_n(grad + pixel * out, kOut, to + pixel * kOut);
}

// Calls visit(number of channels as a constant, first channel) for each tile.
template <typename Visit>
inline void for_tiles(int64_t out, Visit&& visit) {
  int64_t o = 0;
  for (; o + kTileOut <= out; o += kTileOut) visit(std::integral_constant<int, kTileOut>(), o);
  for (; o + 4 <= out; o += 4) visit(std::integral_constant<int, 4>(), o);
  for (; o < out; o += 2) visit(std::integral_constant<int, 2>(), o);
}

// Rows [begin, end) of one image, as rows of grad.
void add_rows(const WeightGradJob& job, int64_t image, int64_t begin, int64_t end, float* packed_x, float* packed_grad,
              float* weights) {
  const Group group{end - begin, job.W, job.in};
  const int64_t pixels = group.rows * job.W;
  const float* grad = job.grad + (image * job.H + begin) * job.W * job.out;
  for_tiles(job.out,
            [&](auto tile, int64_t o) { pack_tile<tile>(grad + o, pixels, job.out, packed_grad + o * pixels); });
  for (int64_t i = 0; i < job.in; i += kWeightGradIn) {
    pack_x(job, image, begin, end, i, packed_x);
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t kx = 0; kx < 3; ++kx) {
        const float* x = packed_x + (ky * (job.W + 2) + kx) * kWeightGradIn;
        float* tap = weights + (ky * 3 + kx) * job.out * job.in + i;
        for_tiles(job.out,
                  [&](auto tile, int64_t o) { add_tile<tile>(group, x, packed_grad + o * pixels, tap + o * job.in); });
      }
  }
}

#endif

}  // namespace

bool weight_grad_supported() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !__builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

int64_t weight_grad_parts(const WeightGradJob& job) {
  const int64_t rows = job.N * job.H;
  return rows < kMaxParts ? rows : kMaxParts;
}

void weight_grad_run(const WeightGradJob& job, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  const int64_t rows = job.N * job.H, parts = weight_grad_parts(job);
  const int64_t row_nbytes = job.W * int64_t(sizeof(float));
  const int64_t fitting = std::min(kPanelNbytes / (row_nbytes * kWeightGradIn), kGroupNbytes / (row_nbytes * job.out));
  const int64_t group = std::max<int64_t>(1, fitting);
  std::vector<float> packed_x(size_t((group + 2) * (job.W + 2) * kWeightGradIn));
  std::vector<float> packed_grad(size_t(group * job.W * job.out));
  for (int64_t part = begin; part < end; ++part) {
    const int64_t stop = rows * (part + 1) / parts;
    for (int64_t row = rows * part / parts, next; row < stop; row = next) {
      next = row + group < stop ? row + group : stop;
      const int64_t image_end = (row / job.H + 1) * job.H;
      if (next > image_end) next = image_end;
      const int64_t image = row / job.H;
      add_rows(job, image, row - image * job.H, next - image * job.H, packed_x.data(), packed_grad.data(),
               job.partial + part * 9 * job.out * job.in);
    }
  }
#else
  (void)job, (void)begin, (void)end;
#endif
}

void weight_grad_finish(const WeightGradJob& job, float* grad_weight) {
  const int64_t count = 9 * job.out * job.in, parts = weight_grad_parts(job);
  for (int64_t k = 0; k < count; ++k) grad_weight[k] = 0;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < count; ++k) grad_weight[k] += job.partial[part * count + k];
}

}  // namespace cxrfast
