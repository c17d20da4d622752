// bce_auc_op.cpp - the operators' schemas and their CPU implementation, registered with torch.
//
// weighted_bce_auc returns the mean loss over the known entries, the gradient of the *sum* of the losses, and the
// number of known entries: the mean's divisor is known only after the last entry was read, and the backward pass
// multiplies by the incoming gradient anyway, so that it divides on the same way. Fake kernels and the autograd formula
// are cxrfast/loss_op.py's.
#include "bce_auc_op.h"

#include <tuple>

#include "bce_auc_cpu.h"

namespace cxrfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> weighted_bce_auc_cpu(const Tensor& logits, const Tensor& targets,
                                                        std::optional<Tensor> pos_weight,
                                                        std::optional<Tensor> class_weight,
                                                        std::optional<Tensor> counts) {
  check_batch(logits, targets, pos_weight, class_weight, counts);
  const ScalarType real = real_type(logits.scalar_type());
  const int64_t sizes[2] = {logits.size(0), logits.size(1)};
  Tensor loss = empty_tensor(logits, 0, sizes, real);
  Tensor grad = empty_tensor(logits, 2, sizes, real);
  Tensor known = empty_tensor(logits, 0, sizes, ScalarType::Long);
  BceAucBatch batch;
  fill_batch(&batch, logits, targets, pos_weight, class_weight, counts);
  batch.grad = grad.data_ptr();
  BceAucSums sums;
  dispatch_logits(logits.scalar_type(), [&](auto element) {
    sums = bce_auc_cpu<decltype(element)>(batch, int(torch::stable::get_num_threads()), parallel_for);
  });
  if (real == ScalarType::Double)
    *static_cast<double*>(loss.data_ptr()) = sums.mean();
  else
    *static_cast<float*>(loss.data_ptr()) = float(sums.mean());
  *static_cast<int64_t*>(known.data_ptr()) = sums.known;
  return {loss, grad, known};
}

Tensor weighted_bce_auc_backward_cpu(const Tensor& grad_loss, const Tensor& grad, const Tensor& known,
                                     ScalarType dtype) {
  check_backward(grad_loss, grad, known, dtype);
  const int64_t sizes[2] = {grad.size(0), grad.size(1)};
  Tensor out = empty_tensor(grad, 2, sizes, dtype);
  const void* incoming = grad_loss.data_ptr();
  const BceAucSums sums{0, *static_cast<const int64_t*>(known.data_ptr())};
  const double scale = sums.scale(dtype == ScalarType::Double ? *static_cast<const double*>(incoming)
                                                              : double(*static_cast<const float*>(incoming)));
  dispatch_logits(dtype, [&](auto element) {
    scale_grad_cpu<decltype(element)>(grad.data_ptr(), scale, out.data_ptr(), grad.numel());
  });
  return out;
}

void auc_count_cpu(const Tensor& logits, const Tensor& targets, const Tensor& counts) {
  check_batch(logits, targets, std::nullopt, std::nullopt, counts);
  BceAucBatch batch;
  fill_batch(&batch, logits, targets, std::nullopt, std::nullopt, counts);
  batch.grad = nullptr;
  dispatch_logits(logits.scalar_type(), [&](auto element) {
    bce_auc_cpu<decltype(element)>(batch, int(torch::stable::get_num_threads()), parallel_for);
  });
}

Tensor auc_pairs(const Tensor& counts) {
  STD_TORCH_CHECK(counts.dim() == 3 && counts.size(1) == 2 && counts.size(2) == kCodes && counts.is_contiguous() &&
                      counts.scalar_type() == ScalarType::Long,
                  "counts must be contiguous int64 (C, 2, ", kCodes, ")");
  const int64_t sizes[2] = {counts.size(0), 4};
  Tensor pairs = empty_tensor(counts, 2, sizes, ScalarType::Double);
  auc_pairs_cpu(static_cast<const int64_t*>(counts.data_ptr()), counts.size(0),
                static_cast<double (*)[4]>(pairs.data_ptr()));
  return pairs;
}

}  // namespace
}  // namespace cxrfast

STABLE_TORCH_LIBRARY(cxrfast, m) {
  m.def(
      "weighted_bce_auc(Tensor logits, Tensor targets, Tensor? pos_weight=None, Tensor? class_weight=None, "
      "Tensor(a!)? counts=None) -> (Tensor loss, Tensor grad, Tensor known)");
  m.def("weighted_bce_auc_backward(Tensor grad_loss, Tensor grad, Tensor known, ScalarType dtype) -> Tensor");
  m.def("auc_count(Tensor logits, Tensor targets, Tensor(a!) counts) -> ()");
  m.def("auc_pairs(Tensor counts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cxrfast, CPU, m) {
  m.impl("weighted_bce_auc", TORCH_BOX(&cxrfast::weighted_bce_auc_cpu));
  m.impl("weighted_bce_auc_backward", TORCH_BOX(&cxrfast::weighted_bce_auc_backward_cpu));
  m.impl("auc_count", TORCH_BOX(&cxrfast::auc_count_cpu));
  m.impl("auc_pairs", TORCH_BOX(&cxrfast::auc_pairs));
}
