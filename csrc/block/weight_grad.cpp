// weight_grad.cpp - weight_grad.h. For a group of image rows and each of the nine taps: grad^T (out, pixels) times the
// shifted rows of x (pixels, in), in tiles of 6 x 16 whose sums stay in twelve registers over the whole group. Twelve
// sums hide the multiply-add's four cycles of latency at two a cycle; the group stays in the second cache over all
// tiles.
#include "weight_grad.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cxrfast {
namespace {

constexpr int64_t kMaxParts = 16;             // more than a desktop's cores; each part costs a copy of the weights
constexpr int64_t kGroupNbytes = 192 * 1024;  // of x and grad together: within the 256 KiB second cache of older CPUs
constexpr int64_t kTileOut = 6;

#if defined(__x86_64__)

// What a tile goes through: `rows` rows of `pixels` pixels.
struct Span {
  const float* x;
  const float* grad;
  int64_t rows, pixels, x_stride, grad_stride, in, out;
};

// tile (kOut, 16) of the weights += sum over the span's pixels of grad[pixel][0..kOut) * x[pixel][0..16)
template <int kOut>
__attribute__((target("avx2,fma"))) inline void add_tile(const Span& span, float* tile) {
  __m256 sums[kOut][2];
  for (int i = 0; i < kOut; ++i)
    for (int j = 0; j < 2; ++j) sums[i][j] = _mm256_loadu_ps(tile + i * span.in + 8 * j);
  for (int64_t row = 0; row < span.rows; ++row) {
    const float* x = span.x + row * span.x_stride;
    const float* grad = span.grad + row * span.grad_stride;
    for (int64_t pixel = 0; pixel < span.pixels; ++pixel, x += span.in, grad += span.out) {
      const __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8);
      for (int i = 0; i < kOut; ++i) {
        const __m256 g = _mm256_broadcast_ss(grad + i);
        sums[i][0] = _mm256_fmadd_ps(g, low, sums[i][0]);
        sums[i][1] = _mm256_fmadd_ps(g, high, sums[i][1]);
      }
    }
  }
  for (int i = 0; i < kOut; ++i)
    for (int j = 0; j < 2; ++j) _mm256_storeu_ps(tile + i * span.in + 8 * j, sums[i][j]);
}

// Rows [begin, end) of one image, as rows of grad.
__attribute__((target("avx2,fma"))) void add_rows(const WeightGradJob& job, int64_t image, int64_t begin, int64_t end,
                                                  float* weights) {
  const int64_t x_stride = job.W * job.in, grad_stride = job.W * job.out;
  for (int64_t ky = 0; ky < 3; ++ky) {
    // rows and pixels whose tap falls inside the map
    const int64_t top = ky == 0 && begin == 0 ? 1 : begin, bottom = ky == 2 && end == job.H ? end - 1 : end;
    for (int64_t kx = 0; kx < 3 && top < bottom; ++kx) {
      const int64_t left = kx == 0 ? 1 : 0, right = kx == 2 ? job.W - 1 : job.W;
      const float* x = job.x + (image * job.H + top + ky - 1) * x_stride + (left + kx - 1) * job.in;
      const float* grad = job.grad + (image * job.H + top) * grad_stride + left * job.out;
      float* tap = weights + (ky * 3 + kx) * job.out * job.in;
      for (int64_t i = 0; i < job.in; i += kWeightGradIn) {
        int64_t o = 0;
        const auto span = [&] {
          return Span{x + i, grad + o, bottom - top, right - left, x_stride, grad_stride, job.in, job.out};
        };
        for (; o + kTileOut <= job.out; o += kTileOut) add_tile<kTileOut>(span(), tap + o * job.in + i);
        for (; o + 4 <= job.out; o += 4) add_tile<4>(span(), tap + o * job.in + i);
        for (; o < job.out; o += 2) add_tile<2>(span(), tap + o * job.in + i);
      }
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
  const int64_t fitting = kGroupNbytes / (job.W * (job.in + job.out) * int64_t(sizeof(float)));
  const int64_t group = fitting > 1 ? fitting : 1;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t stop = rows * (part + 1) / parts;
    for (int64_t row = rows * part / parts, next; row < stop; row = next) {
      next = row + group < stop ? row + group : stop;
      const int64_t image_end = (row / job.H + 1) * job.H;
      if (next > image_end) next = image_end;
      const int64_t image = row / job.H;
      add_rows(job, image, row - image * job.H, next - image * job.H, job.partial + part * 9 * job.out * job.in);
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
