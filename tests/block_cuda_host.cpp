// block_cuda_host.cpp - runs the CUDA kernels of csrc/block/block_kernel.cuh on the CPU (cuda_host.h).
//
// As a library it has one C function, for tests/test_block_cuda.py. As a program (-DCXRFAST_MAIN) it runs every kernel
// on maps of more than one block, for ThreadSanitizer.
#include <vector>

// clang-format off: the kernels are written in the built-ins that the first one defines
#include "cuda_host.h"
#include "../csrc/block/block_kernel.cuh"
// clang-format on

using namespace cxrfast;

// What all kernels take, in the order of test_block_cuda.py's Job.
struct HostJob {
  int64_t N, H, W, C;
  const void *image, *kernel, *x, *grad;
  const float *scale, *shift, *coef;
  const uint8_t* bytes;
  int64_t threshold;
  double keep_scale;
  void* out;
  uint8_t* place;
  double* sums;
};

// Launches as block_cuda.cu does.
template <class Kernel, class Args>
static void launch(Kernel kernel, int64_t blocks, const Args& args) {
  if (blocks > 0) cuda_host::launch(unsigned(blocks), kBlockThreads, [=] { kernel(args); });
}

template <class Kernel, class Args>
static void launch_sums(Kernel kernel, int64_t blocks, Args args, int64_t count, double* sums) {
  std::vector<double> partial(size_t(blocks * count + 1));
  double* data = args.partial = partial.data();
  launch(kernel, blocks, args);
  cuda_host::launch(unsigned((count + kColumns - 1) / kColumns), kBlockThreads,
                    [=] { finish_sums_kernel(data, blocks, count, sums); });
}

template <class T>
static void run(int pass, const HostJob& job) {
  constexpr int n = kWide<T>;
  NormJob norm{};
  norm.N = job.N, norm.H = job.H, norm.W = job.W, norm.C = job.C;
  norm.x = job.x, norm.grad = job.grad;
  norm.scale = job.scale, norm.shift = job.shift, norm.coef = job.coef;
  norm.bytes = job.bytes, norm.threshold = int(job.threshold), norm.keep_scale = float(job.keep_scale);
  norm.out = job.out, norm.place = job.place;
  const NormArgs args = norm_args(norm);
  const int64_t pixels = job.N * job.H * job.W, blocks = blocks_for<n>(pixels, job.C, kPixels);
  const int64_t pooled = blocks_for<n>(window_count(args), job.C, kWindows);
  if (pass == 0) launch_sums(sums_kernel<T, false>, blocks, args, 2 * job.C, job.sums);
  if (pass == 1) launch(relu_kernel<T>, blocks, args);
  if (pass == 2) launch_sums(sums_kernel<T, true>, blocks, args, 2 * job.C, job.sums);
  if (pass == 3) launch(relu_backward_kernel<T>, blocks, args);
  if (pass == 4) launch(pool_kernel<T>, pooled, args);
  if (pass == 5) launch_sums(pool_backward_sums_kernel<T>, pooled, args, 2 * job.C, job.sums);
  if (pass == 6) {
    launch(pool_backward_kernel<T>, pooled, args);
    launch(pool_backward_edge_kernel<T>, blocks_for<n>(edge_count(args), job.C, 1), args);
  }
  if (pass < 7) return;
  const int64_t count = job.N * (job.H + 2) * (job.W + 2);
  std::vector<float> padded(size_t(count) + 1);
  float* to = padded.data();
  const Divider columns(job.W + 2), rows(job.H + 2);
  cuda_host::launch(unsigned((count + kBlockThreads - 1) / kBlockThreads), kBlockThreads,
                    [=] { pad_image_kernel(static_cast<const float*>(job.image), count, columns, rows, to); });
  ImageConvJob conv{};
  conv.N = job.N, conv.H = job.H, conv.W = job.W, conv.C = job.C;
  conv.kernel = static_cast<const float*>(job.kernel), conv.out = job.out;
  conv.x = job.x, conv.grad = job.grad;
  conv.scale = job.scale, conv.shift = job.shift, conv.coef = job.coef;
  const ImageConvArgs image_args = image_conv_args(conv, to);
  const int64_t image_blocks = blocks_for<kFew>(pixels, job.C, kImagePixels);
  if (pass == 7) launch_sums(image_conv_kernel<T>, image_blocks, image_args, 2 * job.C, job.sums);
  if (pass == 8) launch_sums(image_conv_backward_kernel<T>, image_blocks, image_args, 9 * job.C, job.sums);
}

// pass: in the order above. dtype: 0 float32, 1 bfloat16, 2 float16.
extern "C" void block_host(int pass, int dtype, const HostJob* job) {
  if (dtype == 0) run<float>(pass, *job);
  if (dtype == 1) run<BFloat16>(pass, *job);
  if (dtype == 2) run<Half>(pass, *job);
}

#ifdef CXRFAST_MAIN

int main() {
  const int64_t N = 1, H = 41, W = 27, C = 64;  // three to five blocks
  const size_t values = size_t(N * H * W * C);
  std::vector<float> image(values), x(values, 1.5f), grad(values, 0.5f), out(values), channels(9 * C, 0.25f);
  std::vector<uint8_t> bytes(values, 200), place(values, 1);
  std::vector<double> sums(9 * C);
  for (int pass = 0; pass < 9; ++pass)
    run<float>(pass, {N, H, W, C, image.data(), channels.data(), x.data(), grad.data(), channels.data(),
                      channels.data(), channels.data(), bytes.data(), 64, 1.0, pass == 3 ? grad.data() : out.data(),
                      place.data(), sums.data()});
  return 0;
}

#endif
