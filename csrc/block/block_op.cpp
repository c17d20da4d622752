// block_op.cpp - the passes of this folder as torch operators on the CPU, and the operators' schemas, which
// block_cuda.cu implements too.
#include "block_op.h"

#include <vector>

#include "sums.h"
#include "weight_grad.h"
#include "weight_grad_bf16.h"

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

bool has_weight_grad() { return weight_grad_supported(); }

void weight_grad(const Tensor& x, const Tensor& grad, const Tensor& out) {
  STD_TORCH_CHECK(weight_grad_supported(), "weight_grad needs AVX2 and FMA");
  WeightGradJob job{};
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
                  "x must be contiguous float32 (N, H, W, in)");
  job.N = x.size(0), job.H = x.size(1), job.W = x.size(2), job.in = x.size(3);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.is_contiguous() && grad.scalar_type() == ScalarType::Float &&
                      grad.size(0) == job.N && grad.size(1) == job.H && grad.size(2) == job.W,
                  "grad must be contiguous float32 (N, H, W, out)");
  job.out = grad.size(3);
  STD_TORCH_CHECK(job.in % kWeightGradIn == 0 && job.out % kWeightGradOut == 0, "channels must be multiples of ",
                  kWeightGradIn, " and ", kWeightGradOut);
  STD_TORCH_CHECK(out.numel() == 9 * job.out * job.in && out.is_contiguous() && out.scalar_type() == ScalarType::Float,
                  "out must be contiguous float32 (3, 3, out, in)");
  job.x = static_cast<const float*>(x.data_ptr());
  job.grad = static_cast<const float*>(grad.data_ptr());
  std::vector<float> partial(size_t(weight_grad_parts(job) * 9 * job.out * job.in));
  job.partial = partial.data();
  torch::stable::parallel_for(0, weight_grad_parts(job), 1,
                              [&](int64_t begin, int64_t end) { weight_grad_run(job, begin, end); });
  weight_grad_finish(job, static_cast<float*>(out.data_ptr()));
}

bool has_weight_grad_bf16() { return weight_grad_bf16_supported(); }

void weight_grad_bf16(const Tensor& x, const Tensor& grad, const Tensor& out) {
  STD_TORCH_CHECK(weight_grad_bf16_supported(), "weight_grad_bf16 needs AVX512_BF16");
  WeightGradBf16Job job{};
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && x.scalar_type() == ScalarType::BFloat16,
                  "x must be contiguous bfloat16 (N, H, W, in)");
  job.N = x.size(0), job.H = x.size(1), job.W = x.size(2), job.in = x.size(3);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.is_contiguous() && grad.scalar_type() == ScalarType::BFloat16 &&
                      grad.size(0) == job.N && grad.size(1) == job.H && grad.size(2) == job.W,
                  "grad must be contiguous bfloat16 (N, H, W, out)");
  job.out = grad.size(3);
  STD_TORCH_CHECK(job.in % kWeightGradBf16In == 0 && job.out % kWeightGradBf16Out == 0,
                  "channels must be multiples of ", kWeightGradBf16In, " and ", kWeightGradBf16Out);
  STD_TORCH_CHECK(out.numel() == 9 * job.out * job.in && out.is_contiguous() && out.scalar_type() == ScalarType::Float,
                  "out must be contiguous float32 (3, 3, in, out)");
  job.x = static_cast<const uint16_t*>(x.data_ptr());
  job.grad = static_cast<const uint16_t*>(grad.data_ptr());
  const int64_t parts = weight_grad_bf16_parts(job);
  std::vector<float> partial(size_t(parts * 9 * job.out * job.in));
  job.partial = partial.data();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) { weight_grad_bf16_run(job, begin, end); });
  finish_sums(partial.data(), parts, 9 * job.out * job.in, static_cast<float*>(out.data_ptr()));
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
  m.def("has_weight_grad() -> bool");
  m.def("has_weight_grad_bf16() -> bool");
  m.def("weight_grad_bf16(Tensor x, Tensor grad, Tensor(a!) out) -> ()");
  m.def("weight_grad(Tensor x, Tensor grad, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cxrfast_block, CompositeExplicitAutograd, m) {
  m.impl("has_weight_grad", TORCH_BOX(&cxrfast::has_weight_grad));
  m.impl("has_weight_grad_bf16", TORCH_BOX(&cxrfast::has_weight_grad_bf16));
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
  m.impl("weight_grad_bf16", TORCH_BOX(&cxrfast::weight_grad_bf16));
  m.impl("weight_grad", TORCH_BOX(&cxrfast::weight_grad));
}
