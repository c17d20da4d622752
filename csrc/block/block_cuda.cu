// block_cuda.cu - launches the kernels of block_kernel.cuh as the operators of block_op.cpp on CUDA.
// Everything runs on the current stream of the tensors' device; nothing waits for it, so that a CUDA graph can capture
// it.
#include "../cuda_stream.h"
#include "block_kernel.cuh"
#include "block_op.h"

namespace cxrfast {
namespace {

// Calls f(T()) with the element type of a map.
template <class F>
void dispatch(const Tensor& map, F f) {
  switch (map.scalar_type()) {
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      return f(float());
  }
}

// A job is one that the kernels can do.
template <class Job>
void check_job(const Job& job, std::initializer_list<const void*> maps) {
  STD_TORCH_CHECK(job.C % 8 == 0 && job.C <= kMaxChannels, "channels must be a multiple of 8 up to ", kMaxChannels);
  STD_TORCH_CHECK(job.N * job.H * job.W <= 0x7FFFFFFF, "the map has too many pixels");
  for (const void* data : maps)
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, "a map must begin at a multiple of 16 bytes");
}

NormArgs args_of(const NormJob& job) {
  check_job(job, {job.x, job.grad, job.out, job.bytes, job.place});
  return norm_args(job);
}

// A workspace for the sums of all blocks; `blocks` of them are then added up to `sums`.
class PartialSums {
 public:
  PartialSums(const Tensor& like, int64_t blocks, int64_t count)
      : blocks_(blocks),
        count_(count),
        stream_(current_stream(like)),
        partial_(torch::stable::new_empty(like, {blocks > 0 ? blocks * count : 1}, ScalarType::Double)) {}

  double* data() const { return static_cast<double*>(partial_.data_ptr()); }

  void finish(double* sums) const {
    const auto blocks = unsigned((count_ + kColumns - 1) / kColumns);
    finish_sums_kernel<<<blocks, kBlockThreads, 0, stream_>>>(data(), blocks_, count_, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int64_t blocks_, count_;
  cudaStream_t stream_;
  Tensor partial_;
};

// Launches a kernel (args, no shared memory of dynamic size) on `blocks` blocks, if there is anything to do.
template <class Kernel, class Args>
void launch(Kernel kernel, int64_t blocks, const Tensor& like, const Args& args) {
  if (blocks == 0) return;
  kernel<<<unsigned(blocks), kBlockThreads, 0, current_stream(like)>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same for a kernel that leaves sums, `count` of them, and adds those of all blocks up to `sums`.
template <class Kernel, class Args>
void launch_sums(Kernel kernel, int64_t blocks, const Tensor& like, Args args, int64_t count, double* sums) {
  const PartialSums partial(like, blocks, count);
  args.partial = partial.data();
  launch(kernel, blocks, like, args);
  partial.finish(sums);
}

int64_t pixels_of(const NormJob& job) { return job.N * job.H * job.W; }

void sums_cuda(const Tensor& x, const Tensor& sums) {
  const DeviceGuard guard(x.get_device_index());
  const NormJob job = make_job(NormKind::kSums, x, true);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    launch_sums(sums_kernel<T, false>, blocks_for<kWide<T>>(pixels_of(job), job.C, kPixels), x, args_of(job), 2 * job.C,
                sum_values(sums, 2 * job.C));
  });
}

void relu_cuda(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& out) {
  const DeviceGuard guard(x.get_device_index());
  NormJob job = make_job(NormKind::kRelu, x, true);
  set_affine(job, scale, shift);
  job.out = map_data(out, job, false, x.scalar_type(), "out");
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    launch(relu_kernel<T>, blocks_for<kWide<T>>(pixels_of(job), job.C, kPixels), x, args_of(job));
  });
}

void relu_backward_sums_cuda(const Tensor& x, const Tensor& grad, const Tensor& scale, const Tensor& shift,
                             const Tensor& sums) {
  const DeviceGuard guard(x.get_device_index());
  NormJob job = make_job(NormKind::kReluBackwardSums, x, true);
  job.grad = map_data(grad, job, false, x.scalar_type(), "grad");
  set_affine(job, scale, shift);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    launch_sums(sums_kernel<T, true>, blocks_for<kWide<T>>(pixels_of(job), job.C, kPixels), x, args_of(job), 2 * job.C,
                sum_values(sums, 2 * job.C));
  });
}

void relu_backward_cuda(const Tensor& x, const Tensor& grad, const Tensor& scale, const Tensor& shift,
                        const Tensor& coef) {
  const DeviceGuard guard(x.get_device_index());
  NormJob job = make_job(NormKind::kReluBackward, x, true);
  job.out = map_data(grad, job, false, x.scalar_type(), "grad");
  set_affine(job, scale, shift);
  job.coef = channel_values(coef, 3 * job.C, "coef");
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    launch(relu_backward_kernel<T>, blocks_for<kWide<T>>(pixels_of(job), job.C, kPixels), x, args_of(job));
  });
}

void pool_cuda(const Tensor& x, const Tensor& scale, const Tensor& shift, std::optional<Tensor> bytes,
               int64_t threshold, double keep_scale, const Tensor& out, const Tensor& place) {
  const DeviceGuard guard(x.get_device_index());
  NormJob job = make_job(NormKind::kPool, x, true);
  set_affine(job, scale, shift);
  set_pool(job, x, bytes, threshold, keep_scale, out, place);
  const NormArgs args = args_of(job);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    launch(pool_kernel<T>, blocks_for<kWide<T>>(window_count(args), args.C, kWindows), x, args);
  });
}

void pool_backward_sums_cuda(const Tensor& x, const Tensor& grad, const Tensor& place, double keep_scale,
                             const Tensor& sums) {
  const DeviceGuard guard(x.get_device_index());
  NormJob job = make_job(NormKind::kPoolBackwardSums, x, true);
  set_pool_backward(job, x, grad, place, keep_scale);
  const NormArgs args = args_of(job);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    launch_sums(pool_backward_sums_kernel<T>, blocks_for<kWide<T>>(window_count(args), args.C, kWindows), x, args,
                2 * job.C, sum_values(sums, 2 * job.C));
  });
}

void pool_backward_cuda(const Tensor& x, const Tensor& grad, const Tensor& place, double keep_scale, const Tensor& coef,
                        const Tensor& out) {
  const DeviceGuard guard(x.get_device_index());
  NormJob job = make_job(NormKind::kPoolBackward, x, true);
  set_pool_backward(job, x, grad, place, keep_scale);
  job.coef = channel_values(coef, 3 * job.C, "coef");
  job.out = map_data(out, job, false, x.scalar_type(), "out");
  const NormArgs args = args_of(job);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    launch(pool_backward_kernel<T>, blocks_for<kWide<T>>(window_count(args), args.C, kWindows), x, args);
    launch(pool_backward_edge_kernel<T>, blocks_for<kWide<T>>(edge_count(args), args.C, 1), x, args);
  });
}

// A copy of the images with a border of zeros.
Tensor padded_image(const ImageConvJob& job, const Tensor& like) {
  const int64_t count = job.N * (job.H + 2) * (job.W + 2);
  STD_TORCH_CHECK(count <= 0x7FFFFFFF, "the images have too many pixels");
  Tensor padded = torch::stable::new_empty(like, {count}, ScalarType::Float);
  const int64_t blocks = (count + kBlockThreads - 1) / kBlockThreads;
  if (blocks > 0) {
    pad_image_kernel<<<unsigned(blocks), kBlockThreads, 0, current_stream(like)>>>(
        job.image, count, Divider(job.W + 2), Divider(job.H + 2), static_cast<float*>(padded.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return padded;
}

// Runs all of it; `like` is the map, `sums` how many there are of a channel.
void run_image_conv(const ImageConvJob& job, const Tensor& like, int sums, double* to) {
  check_job(job, {job.x, job.grad, job.out});
  const Tensor padded = padded_image(job, like);
  const int64_t blocks = blocks_for<kFew>(job.N * job.H * job.W, job.C, kImagePixels);
  dispatch(like, [&](auto element) {
    using T = decltype(element);
    launch_sums(job.backward ? image_conv_backward_kernel<T> : image_conv_kernel<T>, blocks, like,
                image_conv_args(job, static_cast<const float*>(padded.data_ptr())), sums * job.C, to);
  });
}

void image_conv_cuda(const Tensor& image, const Tensor& kernel, const Tensor& out, const Tensor& sums) {
  const DeviceGuard guard(out.get_device_index());
  ImageConvJob job = image_conv_job(image, out, true);
  job.kernel = channel_values(kernel, 9 * job.C, "kernel");
  job.out = out.data_ptr();
  run_image_conv(job, out, 2, sum_values(sums, 2 * job.C));
}

void image_conv_backward_cuda(const Tensor& image, const Tensor& x, const Tensor& grad, const Tensor& scale,
                              const Tensor& shift, const Tensor& coef, const Tensor& grad_kernel) {
  const DeviceGuard guard(x.get_device_index());
  ImageConvJob job = image_conv_job(image, x, true);
  set_image_backward(job, x, grad, scale, shift, coef);
  run_image_conv(job, x, 9, sum_values(grad_kernel, 9 * job.C));
}

void batch_norm_cuda(std::optional<Tensor> sums, std::optional<Tensor> total, double count, const Tensor& weight,
                     const Tensor& bias, const Tensor& running_mean, const Tensor& running_var, const Tensor& batches,
                     double momentum, double eps, const Tensor& stats, const Tensor& affine) {
  const DeviceGuard guard(weight.get_device_index());
  launch(batch_norm_kernel, 1, weight,
         batch_norm_job(sums, total, count, weight, bias, running_mean, running_var, batches, momentum, eps, stats,
                        affine));
}

void batch_norm_grad_cuda(const Tensor& sums, const Tensor& all_sums, std::optional<Tensor> total, double count,
                          bool training, const Tensor& stats, const Tensor& coef, const Tensor& grad_weight,
                          const Tensor& grad_bias) {
  const DeviceGuard guard(sums.get_device_index());
  launch(batch_norm_grad_kernel, 1, sums,
         batch_norm_grad_job(sums, all_sums, total, count, training, stats, coef, grad_weight, grad_bias));
}

}  // namespace
}  // namespace cxrfast

STABLE_TORCH_LIBRARY_IMPL(cxrfast_block, CUDA, m) {
  m.impl("sums", TORCH_BOX(&cxrfast::sums_cuda));
  m.impl("relu", TORCH_BOX(&cxrfast::relu_cuda));
  m.impl("relu_backward_sums", TORCH_BOX(&cxrfast::relu_backward_sums_cuda));
  m.impl("relu_backward", TORCH_BOX(&cxrfast::relu_backward_cuda));
  m.impl("pool", TORCH_BOX(&cxrfast::pool_cuda));
  m.impl("pool_backward_sums", TORCH_BOX(&cxrfast::pool_backward_sums_cuda));
  m.impl("pool_backward", TORCH_BOX(&cxrfast::pool_backward_cuda));
  m.impl("image_conv", TORCH_BOX(&cxrfast::image_conv_cuda));
  m.impl("image_conv_backward", TORCH_BOX(&cxrfast::image_conv_backward_cuda));
  m.impl("batch_norm", TORCH_BOX(&cxrfast::batch_norm_cuda));
  m.impl("batch_norm_grad", TORCH_BOX(&cxrfast::batch_norm_grad_cuda));
}
