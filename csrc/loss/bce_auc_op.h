// bce_auc_op.h - what the CPU and the CUDA registration share: the checks of the arguments and the outputs.
// Torch's stable ABI only (torch >= 2.10), so that one binary serves every later torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "bce_auc_math.h"

namespace cxrfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ParallelFor of bce_auc_cpu.h, on torch's threads.
inline void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

// An uninitialised contiguous tensor on the device of `like`. torch::stable::empty goes through the dispatcher, which
// costs three times as much; a training step at batch 32 notices.
inline Tensor empty_tensor(const Tensor& like, int64_t dim, const int64_t* sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (dim == 2) strides[0] = sizes[1] > 1 ? sizes[1] : 1;
  int32_t dtype_code, device_type, device_index;
  switch (dtype) {
    case ScalarType::Float:
      dtype_code = aoti_torch_dtype_float32();
      break;
    case ScalarType::Double:
      dtype_code = aoti_torch_dtype_float64();
      break;
    case ScalarType::Half:
      dtype_code = aoti_torch_dtype_float16();
      break;
    case ScalarType::BFloat16:
      dtype_code = aoti_torch_dtype_bfloat16();
      break;
    default:
      dtype_code = aoti_torch_dtype_int64();
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype_code, device_type, device_index, &handle));
  return Tensor(handle);
}

// Calls f(T()) with the element type of the logits.
template <class F>
void dispatch_logits(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      STD_TORCH_CHECK(false, "logits must be float32, float64, float16 or bfloat16");
  }
}

// The type of loss and grad for such logits.
inline ScalarType real_type(ScalarType logits) {
  return logits == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_batch(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& pos_weight,
                        const std::optional<Tensor>& class_weight, const std::optional<Tensor>& counts) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be (N, C), got ", logits.dim(), " dimensions");
  const int64_t N = logits.size(0), C = logits.size(1);
  STD_TORCH_CHECK(targets.dim() == 2 && targets.size(0) == N && targets.size(1) == C, "targets must be (", N, ", ", C,
                  ") like the logits");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Float, "targets must be float32");
  STD_TORCH_CHECK(targets.get_device() == logits.get_device(), "targets must be on the logits' device");
  for (const auto* weight : {&pos_weight, &class_weight}) {
    if (!weight->has_value()) continue;
    const Tensor& values = **weight;
    STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == C && values.scalar_type() == ScalarType::Float,
                    "pos_weight and class_weight must be float32 (", C, ",)");
    STD_TORCH_CHECK(values.get_device() == logits.get_device(), "weights must be on the logits' device");
  }
  if (counts) {
    STD_TORCH_CHECK(counts->dim() == 3 && counts->size(0) == C && counts->size(1) == 2 && counts->size(2) == kCodes &&
                        counts->scalar_type() == ScalarType::Long && counts->is_contiguous(),
                    "counts must be contiguous int64 (", C, ", 2, ", kCodes, ")");
    STD_TORCH_CHECK(counts->get_device() == logits.get_device(), "counts must be on the logits' device");
  }
}

inline void check_backward(const Tensor& grad_loss, const Tensor& grad, const Tensor& known, ScalarType dtype) {
  STD_TORCH_CHECK(grad_loss.numel() == 1 && grad_loss.scalar_type() == real_type(dtype),
                  "grad_loss must be one number of the loss's type");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.is_contiguous() && grad.scalar_type() == real_type(dtype),
                  "grad must be what weighted_bce_auc returned");
  STD_TORCH_CHECK(known.numel() == 1 && known.scalar_type() == ScalarType::Long,
                  "known must be what weighted_bce_auc returned");
  STD_TORCH_CHECK(grad.get_device() == grad_loss.get_device() && known.get_device() == grad_loss.get_device(),
                  "grad_loss, grad and known must be on one device");
}

// Fills the fields that BceAucBatch and the CUDA kernel's argument have in common.
template <class Batch>
void fill_batch(Batch* batch, const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& pos_weight,
                const std::optional<Tensor>& class_weight, const std::optional<Tensor>& counts) {
  batch->logits = logits.data_ptr();
  batch->targets = static_cast<const float*>(targets.data_ptr());
  for (int i = 0; i < 2; ++i) {
    batch->logits_stride[i] = logits.stride(i);
    batch->targets_stride[i] = targets.stride(i);
  }
  batch->N = logits.size(0);
  batch->C = logits.size(1);
  batch->pos_weight = pos_weight ? static_cast<const float*>(pos_weight->data_ptr()) : nullptr;
  batch->pos_weight_stride = pos_weight ? pos_weight->stride(0) : 0;
  batch->class_weight = class_weight ? static_cast<const float*>(class_weight->data_ptr()) : nullptr;
  batch->class_weight_stride = class_weight ? class_weight->stride(0) : 0;
  batch->counts = counts ? static_cast<int64_t*>(counts->data_ptr()) : nullptr;
}

}  // namespace cxrfast
