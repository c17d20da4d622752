// block_op.cpp - the passes of this folder as torch operators on the CPU, and the operators' schemas, which
// block_cuda.cu implements too.
#include "block_op.h"

#include <memory>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "sums.h"
#include "winograd_conv.h"
#include "winograd_float.h"
#include "winograd_tiles.h"
#include "winograd_weight_grad.h"

namespace cxrfast {
namespace {

void run(const NormJob& job) {
  torch::stable::parallel_for(0, norm_chunks(job), 1, [&](int64_t begin, int64_t end) { norm_run(job, begin, end); });
}

void run_sums(NormJob& job, const Tensor& sums) {
  double* to = sum_values(sums, 2 * job.C);
  std::vector<double> partial(size_t(norm_chunks(job) * 2 * job.C));
  job.partial = partial.data();
  run(job);
  finish_sums(partial.data(), norm_chunks(job), 2 * job.C, to);
}

void norm_sums(const Tensor& x, const Tensor& sums) {
  NormJob job = make_job(NormKind::kSums, x);
  run_sums(job, sums);
}

void norm_relu(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& out) {
  NormJob job = make_job(NormKind::kRelu, x);
  set_affine(job, scale, shift);
  job.out = map_data(out, job, false, x.scalar_type(), "out");
  run(job);
}

void norm_relu_backward_sums(const Tensor& x, const Tensor& grad, const Tensor& scale, const Tensor& shift,
                             const Tensor& sums) {
  NormJob job = make_job(NormKind::kReluBackwardSums, x);
  job.grad = map_data(grad, job, false, x.scalar_type(), "grad");
  set_affine(job, scale, shift);
  run_sums(job, sums);
}

void norm_relu_backward(const Tensor& x, const Tensor& grad, const Tensor& scale, const Tensor& shift,
                        const Tensor& coef) {
  NormJob job = make_job(NormKind::kReluBackward, x);
  job.out = map_data(grad, job, false, x.scalar_type(), "grad");
  job.grad = job.out;
  set_affine(job, scale, shift);
  job.coef = channel_values(coef, 3 * job.C, "coef");
  run(job);
}

void norm_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, std::optional<Tensor> bytes,
               int64_t threshold, double keep_scale, const Tensor& out, const Tensor& place) {
  NormJob job = make_job(NormKind::kPool, x);
  set_affine(job, scale, shift);
  set_pool(job, x, bytes, threshold, keep_scale, out, place);
  run(job);
}

void norm_pool_backward_sums(const Tensor& x, const Tensor& grad, const Tensor& place, double keep_scale,
                             const Tensor& sums) {
  NormJob job = make_job(NormKind::kPoolBackwardSums, x);
  set_pool_backward(job, x, grad, place, keep_scale);
  run_sums(job, sums);
}

void norm_pool_backward(const Tensor& x, const Tensor& grad, const Tensor& place, double keep_scale, const Tensor& coef,
                        const Tensor& out) {
  NormJob job = make_job(NormKind::kPoolBackward, x);
  set_pool_backward(job, x, grad, place, keep_scale);
  job.coef = channel_values(coef, 3 * job.C, "coef");
  job.out = map_data(out, job, false, x.scalar_type(), "out");
  run(job);
}

// Runs all of it; sums (image_conv_sums) float64.
void run_image_conv(ImageConvJob& job, const Tensor& sums) {
  double* to = sum_values(sums, image_conv_sums(job));
  std::vector<double> partial(size_t(image_conv_chunks(job) * image_conv_sums(job)));
  job.partial = partial.data();
  torch::stable::parallel_for(0, image_conv_chunks(job), 1,
                              [&](int64_t begin, int64_t end) { image_conv_run(job, begin, end); });
  finish_sums(partial.data(), image_conv_chunks(job), image_conv_sums(job), to);
}

void image_conv(const Tensor& image, const Tensor& kernel, const Tensor& out, const Tensor& sums) {
  ImageConvJob job = image_conv_job(image, out);
  job.kernel = channel_values(kernel, 9 * job.C, "kernel");
  job.out = out.data_ptr();
  run_image_conv(job, sums);
}

void image_conv_backward(const Tensor& image, const Tensor& x, const Tensor& grad, const Tensor& scale,
                         const Tensor& shift, const Tensor& coef, const Tensor& grad_kernel) {
  ImageConvJob job = image_conv_job(image, x);
  set_image_backward(job, x, grad, scale, shift, coef);
  run_image_conv(job, grad_kernel);
}

void batch_norm_cpu(std::optional<Tensor> sums, std::optional<Tensor> total, double count, const Tensor& weight,
                    const Tensor& bias, const Tensor& running_mean, const Tensor& running_var, const Tensor& batches,
                    double momentum, double eps, const Tensor& stats, const Tensor& affine) {
  const BatchNorm job = batch_norm_job(sums, total, count, weight, bias, running_mean, running_var, batches, momentum,
                                       eps, stats, affine);
  for (int64_t c = 0; c < job.C; ++c) batch_norm(job, c);
}

void batch_norm_grad_cpu(const Tensor& sums, const Tensor& all_sums, std::optional<Tensor> total, double count,
                         bool training, const Tensor& stats, const Tensor& coef, const Tensor& grad_weight,
                         const Tensor& grad_bias) {
  const BatchNormGrad job =
      batch_norm_grad_job(sums, all_sums, total, count, training, stats, coef, grad_weight, grad_bias);
  for (int64_t c = 0; c < job.C; ++c) batch_norm_grad(job, c);
}

bool has_winograd(bool bf16) { return bf16 ? has_bf16_products() : winograd_float_supported(); }

// A map in the job's type.
template <class T>
T* map_of(const Tensor& map, const char* name) {
  const ScalarType dtype = std::is_same_v<std::remove_const_t<T>, float> ? ScalarType::Float : ScalarType::BFloat16;
  STD_TORCH_CHECK(map.dim() == 4 && map.is_contiguous() && map.scalar_type() == dtype, name,
                  " must be contiguous (N, H, W, C) of x's type, float32 or bfloat16");
  return static_cast<T*>(map.data_ptr());
}

// x, and relu(x * scale + shift) in its place where there are scale and shift; `other` is the map of out channels.
template <class Job>
Job winograd_job(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                 const Tensor& other, const char* name) {
  Job job{};
  job.x = map_of<std::remove_pointer_t<decltype(job.x)>>(x, "x");
  job.N = x.size(0), job.H = x.size(1), job.W = x.size(2), job.in = x.size(3), job.out = other.size(3);
  STD_TORCH_CHECK(other.size(0) == job.N && other.size(1) == job.H && other.size(2) == job.W, name,
                  " must be of x's size");
  STD_TORCH_CHECK(job.in % kWinogradChannels == 0 && job.out % kWinogradChannels == 0, "channels must be multiples of ",
                  kWinogradChannels);
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift go together");
  job.scale = scale ? channel_values(*scale, job.in, "scale") : nullptr;
  job.shift = shift ? channel_values(*shift, job.in, "shift") : nullptr;
  return job;
}

KernelView kernel_view(const Tensor& kernel, bool turned, int64_t in, int64_t out) {
  STD_TORCH_CHECK(kernel.dim() == 4 && kernel.scalar_type() == ScalarType::Float &&
                      kernel.size(turned ? 1 : 0) == out && kernel.size(turned ? 0 : 1) == in && kernel.size(2) == 3 &&
                      kernel.size(3) == 3,
                  "kernel must be float32 (out, in, 3, 3), or (in, out, 3, 3) where it is turned");
  const float* at = static_cast<const float*>(kernel.data_ptr());
  const int64_t first = kernel.stride(0), second = kernel.stride(1), y = kernel.stride(2), x = kernel.stride(3);
  if (turned) return {at + 2 * (y + x), first, second, -y, -x};
  return {at, second, first, y, x};
}

void winograd_conv(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& kernel,
                   bool turned, const Tensor& out) {
  if (x.scalar_type() == ScalarType::Float) {
    auto job = winograd_job<WinogradFloatJob>(x, scale, shift, out, "out");
    job.result = map_of<float>(out, "out");
    job.kernel = kernel_view(kernel, turned, job.in, job.out);
    const auto packed = std::make_unique_for_overwrite<FloatLine[]>(size_t(job.in * job.out));
    job.packed = packed.get();
    torch::stable::parallel_for(0, job.out / kWinogradChannels, 1,
                                [&](int64_t begin, int64_t end) { winograd_float_pack(job, begin, end); });
    torch::stable::parallel_for(0, winograd_float_chunks(job), 1,
                                [&](int64_t begin, int64_t end) { winograd_float_run(job, begin, end); });
    return;
  }
  STD_TORCH_CHECK(has_bf16_products(), "winograd_conv in bfloat16 needs AVX512_BF16");
  auto job = winograd_job<WinogradConvJob>(x, scale, shift, out, "out");
  job.result = map_of<uint16_t>(out, "out");
  job.kernel = kernel_view(kernel, turned, job.in, job.out);
  const auto packed = std::make_unique_for_overwrite<Line[]>(size_t(job.in * job.out / 2));
  job.packed = packed.get();
  torch::stable::parallel_for(0, job.out / kWinogradChannels, 1,
                              [&](int64_t begin, int64_t end) { winograd_pack(job, begin, end); });
  torch::stable::parallel_for(0, winograd_conv_chunks(job), 1,
                              [&](int64_t begin, int64_t end) { winograd_conv_run(job, begin, end); });
}

void winograd_weight_grad(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& grad,
                          const Tensor& out) {
  const auto sum_parts = [&](auto& job, int64_t parts, auto run_parts) {
    const int64_t weights = 9 * job.in * job.out;
    STD_TORCH_CHECK(out.numel() == weights && out.is_contiguous() && out.scalar_type() == ScalarType::Float,
                    "out must be contiguous float32 (3, 3, in, out)");
    const auto partial = std::make_unique_for_overwrite<float[]>(size_t(parts * weights));
    job.partial = partial.get();
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) { run_parts(job, begin, end); });
    finish_sums(partial.get(), parts, weights, static_cast<float*>(out.data_ptr()));
  };
  if (x.scalar_type() == ScalarType::Float) {
    auto job = winograd_job<WinogradFloatJob>(x, scale, shift, grad, "grad");
    job.grad = map_of<const float>(grad, "grad");
    return sum_parts(job, winograd_float_parts(job), winograd_float_weight_grad);
  }
  STD_TORCH_CHECK(has_bf16_products(), "winograd_weight_grad in bfloat16 needs AVX512_BF16");
  auto job = winograd_job<WinogradWeightGradJob>(x, scale, shift, grad, "grad");
  job.grad = map_of<const uint16_t>(grad, "grad");
  sum_parts(job, winograd_weight_grad_parts(job), winograd_weight_grad_run);
}

}  // namespace
}  // namespace cxrfast

STABLE_TORCH_LIBRARY(cxrfast_block, m) {
  m.def("sums(Tensor x, Tensor(a!) sums) -> ()");
  m.def("relu(Tensor x, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");
  m.def("relu_backward_sums(Tensor x, Tensor grad, Tensor scale, Tensor shift, Tensor(a!) sums) -> ()");
  m.def("relu_backward(Tensor x, Tensor(a!) grad, Tensor scale, Tensor shift, Tensor coef) -> ()");
  m.def(
      "pool(Tensor x, Tensor scale, Tensor shift, Tensor? bytes, int threshold, float keep_scale, Tensor(a!) out, "
      "Tensor(b!) place) -> ()");
  m.def("pool_backward_sums(Tensor x, Tensor grad, Tensor place, float keep_scale, Tensor(a!) sums) -> ()");
  m.def("pool_backward(Tensor x, Tensor grad, Tensor place, float keep_scale, Tensor coef, Tensor(a!) out) -> ()");
  m.def("image_conv(Tensor image, Tensor kernel, Tensor(a!) out, Tensor(b!) sums) -> ()");
  m.def(
      "image_conv_backward(Tensor image, Tensor x, Tensor grad, Tensor scale, Tensor shift, Tensor coef, "
      "Tensor(a!) grad_kernel) -> ()");
  m.def(
      "batch_norm(Tensor? sums, Tensor? total, float count, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor(c!) batches, float momentum, float eps, Tensor(d!) stats, Tensor(e!) affine) -> "
      "()");
  m.def(
      "batch_norm_grad(Tensor sums, Tensor all_sums, Tensor? total, float count, bool training, Tensor stats, "
      "Tensor(a!) coef, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()");
  m.def("has_winograd(bool bf16) -> bool");
  m.def("winograd_conv(Tensor x, Tensor? scale, Tensor? shift, Tensor kernel, bool turned, Tensor(a!) out) -> ()");
  m.def("winograd_weight_grad(Tensor x, Tensor? scale, Tensor? shift, Tensor grad, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cxrfast_block, CompositeExplicitAutograd, m) {
  m.impl("has_winograd", TORCH_BOX(&cxrfast::has_winograd));
}

STABLE_TORCH_LIBRARY_IMPL(cxrfast_block, CPU, m) {
  m.impl("sums", TORCH_BOX(&cxrfast::norm_sums));
  m.impl("relu", TORCH_BOX(&cxrfast::norm_relu));
  m.impl("relu_backward_sums", TORCH_BOX(&cxrfast::norm_relu_backward_sums));
  m.impl("relu_backward", TORCH_BOX(&cxrfast::norm_relu_backward));
  m.impl("pool", TORCH_BOX(&cxrfast::norm_pool));
  m.impl("pool_backward_sums", TORCH_BOX(&cxrfast::norm_pool_backward_sums));
  m.impl("pool_backward", TORCH_BOX(&cxrfast::norm_pool_backward));
  m.impl("image_conv", TORCH_BOX(&cxrfast::image_conv));
  m.impl("image_conv_backward", TORCH_BOX(&cxrfast::image_conv_backward));
  m.impl("batch_norm", TORCH_BOX(&cxrfast::batch_norm_cpu));
  m.impl("batch_norm_grad", TORCH_BOX(&cxrfast::batch_norm_grad_cpu));
  m.impl("winograd_conv", TORCH_BOX(&cxrfast::winograd_conv));
  m.impl("winograd_weight_grad", TORCH_BOX(&cxrfast::winograd_weight_grad));
}
