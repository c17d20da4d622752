// block_op.h - what the CPU and the CUDA operators of this folder share: the checks of their arguments.
//
// Every operator writes into tensors that cxrfast/block.py has made; autograd is there too. Shapes are those of
// channels-last maps seen as contiguous (N, H, W, C). On torch's stable ABI (torch >= 2.10).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "batch_norm.h"
#include "image_conv.h"
#include "norm_kernels.h"

namespace cxrfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The data of `count` contiguous values of a type, or null.
template <class T>
T* values_of(const Tensor& values, int64_t count, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(values.numel() == count && values.scalar_type() == dtype && values.is_contiguous(), name, " must be ",
                  count, " contiguous values of its type");
  return static_cast<T*>(values.data_ptr());
}

inline const float* channel_values(const Tensor& values, int64_t count, const char* name) {
  return values_of<const float>(values, count, ScalarType::Float, name);
}

inline double* sum_values(const Tensor& sums, int64_t count) {
  return values_of<double>(sums, count, ScalarType::Double, "sums");
}

// x is of a type that the device's passes take.
inline void check_map(const Tensor& x, bool half_too) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "x must be contiguous (N, H, W, C)");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16 ||
                      (half_too && x.scalar_type() == ScalarType::Half),
                  "x must be float32", half_too ? ", float16" : "", " or bfloat16");
}

inline NormJob make_job(NormKind kind, const Tensor& x, bool half_too = false) {
  check_map(x, half_too);
  NormJob job{};
  job.kind = kind;
  job.bf16 = x.scalar_type() == ScalarType::BFloat16;
  job.N = x.size(0), job.H = x.size(1), job.W = x.size(2), job.C = x.size(3);
  job.x = x.data_ptr();
  job.keep_scale = 1;
  return job;
}

inline void* map_data(const Tensor& map, const NormJob& job, bool pooled, ScalarType dtype, const char* name) {
  const int64_t H = pooled ? job.H / 2 : job.H, W = pooled ? job.W / 2 : job.W;
  STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == job.N && map.size(1) == H && map.size(2) == W &&
                      map.size(3) == job.C && map.is_contiguous() && map.scalar_type() == dtype,
                  name, " must be contiguous (", job.N, ", ", H, ", ", W, ", ", job.C, ") and of x's type");
  return map.data_ptr();
}

inline void set_affine(NormJob& job, const Tensor& scale, const Tensor& shift) {
  job.scale = channel_values(scale, job.C, "scale");
  job.shift = channel_values(shift, job.C, "shift");
}

inline void set_pool(NormJob& job, const Tensor& x, const std::optional<Tensor>& bytes, int64_t threshold,
                     double keep_scale, const Tensor& out, const Tensor& place) {
  if (bytes) job.bytes = static_cast<const uint8_t*>(map_data(*bytes, job, true, ScalarType::Byte, "bytes"));
  job.threshold = int(threshold);
  job.keep_scale = float(keep_scale);
  job.out = map_data(out, job, true, x.scalar_type(), "out");
  job.place = static_cast<uint8_t*>(map_data(place, job, true, ScalarType::Byte, "place"));
}

inline void set_pool_backward(NormJob& job, const Tensor& x, const Tensor& grad, const Tensor& place,
                              double keep_scale) {
  job.grad = map_data(grad, job, true, x.scalar_type(), "grad");
  job.place = static_cast<uint8_t*>(map_data(place, job, true, ScalarType::Byte, "place"));
  job.keep_scale = float(keep_scale);
}

inline ImageConvJob image_conv_job(const Tensor& image, const Tensor& x, bool half_too = false) {
  check_map(x, half_too);
  ImageConvJob job{};
  job.bf16 = x.scalar_type() == ScalarType::BFloat16;
  job.N = x.size(0), job.H = x.size(1), job.W = x.size(2), job.C = x.size(3);
  job.image = channel_values(image, job.N * job.H * job.W, "image");
  return job;
}

inline void set_image_backward(ImageConvJob& job, const Tensor& x, const Tensor& grad, const Tensor& scale,
                               const Tensor& shift, const Tensor& coef) {
  job.backward = true;
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel() && grad.is_contiguous(),
                  "grad must be like x");
  job.x = x.data_ptr();
  job.grad = grad.data_ptr();
  job.scale = channel_values(scale, job.C, "scale");
  job.shift = channel_values(shift, job.C, "shift");
  job.coef = channel_values(coef, 3 * job.C, "coef");
}

inline BatchNorm batch_norm_job(const std::optional<Tensor>& sums, const std::optional<Tensor>& total, double count,
                                const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
                                const Tensor& running_var, const Tensor& batches, double momentum, double eps,
                                const Tensor& stats, const Tensor& affine) {
  BatchNorm job{};
  const int64_t C = job.C = weight.numel();
  if (sums) job.sums = sum_values(*sums, 2 * C);
  if (total) job.total = sum_values(*total, 1);
  job.count = count;
  job.weight = channel_values(weight, C, "weight");
  job.bias = channel_values(bias, C, "bias");
  job.running_mean = values_of<float>(running_mean, C, ScalarType::Float, "running_mean");
  job.running_var = values_of<float>(running_var, C, ScalarType::Float, "running_var");
  job.batches = values_of<int64_t>(batches, 1, ScalarType::Long, "batches");
  job.momentum = momentum, job.eps = eps;
  job.stats = values_of<double>(stats, 3 * C, ScalarType::Double, "stats");
  job.affine = values_of<float>(affine, 2 * C, ScalarType::Float, "affine");
  return job;
}

inline BatchNormGrad batch_norm_grad_job(const Tensor& sums, const Tensor& all_sums, const std::optional<Tensor>& total,
                                         double count, bool training, const Tensor& stats, const Tensor& coef,
                                         const Tensor& grad_weight, const Tensor& grad_bias) {
  BatchNormGrad job{};
  const int64_t C = job.C = grad_weight.numel();
  job.sums = sum_values(sums, 2 * C);
  job.all_sums = sum_values(all_sums, 2 * C);
  if (total) job.total = sum_values(*total, 1);
  job.count = count;
  job.training = training;
  job.stats = values_of<double>(stats, 3 * C, ScalarType::Double, "stats");
  job.coef = values_of<float>(coef, 3 * C, ScalarType::Float, "coef");
  job.grad_weight = values_of<float>(grad_weight, C, ScalarType::Float, "grad_weight");
  job.grad_bias = values_of<float>(grad_bias, C, ScalarType::Float, "grad_bias");
  return job;
}

}  // namespace cxrfast
