// bce_auc_cuda.cu - launches the kernels of bce_auc_kernel.cuh and registers them with torch (stable ABI).
// Everything runs on the current stream of the tensors' device; nothing waits for it, so that a CUDA graph can capture
// it. Compile with -fmad=false: the bits are those of the CPU (bce_auc_math.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../cuda_stream.h"
#include "bce_auc_kernel.cuh"
#include "bce_auc_op.h"

namespace cxrfast {
namespace {

void launch(const Tensor& logits, BceAucArgs* args) {
  const Tiling tiling = tiling_of(args->N, args->C);
  const int64_t blocks = tiling.tiles > 0 ? tiling.tiles : 1;
  STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "logits have too many entries");
  const cudaStream_t stream = current_stream(logits);
  std::optional<Tensor> workspace;  // per tile a double and, after all of those, an int; then the counter
  if (blocks > 1 && args->grad) {
    const int64_t doubles = blocks + (blocks + 1) / 2 + 1;
    workspace = empty_tensor(logits, 1, &doubles, ScalarType::Double);
    args->tile_loss = static_cast<double*>(workspace->data_ptr());
    args->tile_known = reinterpret_cast<int*>(args->tile_loss + blocks);
    args->n_finished = reinterpret_cast<unsigned*>(args->tile_loss + doubles - 1);
    STD_CUDA_CHECK(cudaMemsetAsync(args->n_finished, 0, sizeof(unsigned), stream));
  }
  dispatch_logits(logits.scalar_type(), [&](auto element) {
    bce_auc_kernel<decltype(element)><<<unsigned(blocks), kThreads, 0, stream>>>(*args, tiling);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> weighted_bce_auc_cuda(const Tensor& logits, const Tensor& targets,
                                                         std::optional<Tensor> pos_weight,
                                                         std::optional<Tensor> class_weight,
                                                         std::optional<Tensor> counts) {
  check_batch(logits, targets, pos_weight, class_weight, counts);
  const DeviceGuard guard(logits.get_device_index());
  const ScalarType real = real_type(logits.scalar_type());
  const int64_t sizes[2] = {logits.size(0), logits.size(1)};
  Tensor loss = empty_tensor(logits, 0, sizes, real);
  Tensor grad = empty_tensor(logits, 2, sizes, real);
  Tensor known = empty_tensor(logits, 0, sizes, ScalarType::Long);
  BceAucArgs args{};
  fill_batch(&args, logits, targets, pos_weight, class_weight, counts);
  args.grad = loss.data_ptr();  // an empty gradient has a null address, which would mean "only counts"
  if (grad.numel() > 0) args.grad = grad.data_ptr();
  args.loss = loss.data_ptr();
  args.known = static_cast<int64_t*>(known.data_ptr());
  launch(logits, &args);
  return {loss, grad, known};
}

Tensor weighted_bce_auc_backward_cuda(const Tensor& grad_loss, const Tensor& grad, const Tensor& known,
                                      ScalarType dtype) {
  check_backward(grad_loss, grad, known, dtype);
  const DeviceGuard guard(grad.get_device_index());
  const int64_t sizes[2] = {grad.size(0), grad.size(1)};
  Tensor out = empty_tensor(grad, 2, sizes, dtype);
  const int64_t n = grad.numel();
  if (n == 0) return out;
  const int64_t wanted = (n + kThreads - 1) / kThreads;
  const auto blocks = unsigned(wanted < 65535 ? wanted : 65535);
  const cudaStream_t stream = current_stream(grad);
  dispatch_logits(dtype, [&](auto element) {
    using T = decltype(element);
    scale_grad_kernel<T><<<blocks, kThreads, 0, stream>>>(
        static_cast<const Real<T>*>(grad.data_ptr()), static_cast<const Real<T>*>(grad_loss.data_ptr()),
        static_cast<const int64_t*>(known.data_ptr()), static_cast<T*>(out.data_ptr()), n);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

void auc_count_cuda(const Tensor& logits, const Tensor& targets, const Tensor& counts) {
  check_batch(logits, targets, std::nullopt, std::nullopt, counts);
  if (logits.numel() == 0) return;
  const DeviceGuard guard(logits.get_device_index());
  BceAucArgs args{};
  fill_batch(&args, logits, targets, std::nullopt, std::nullopt, counts);
  launch(logits, &args);
}

}  // namespace
}  // namespace cxrfast

STABLE_TORCH_LIBRARY_IMPL(cxrfast, CUDA, m) {
  m.impl("weighted_bce_auc", TORCH_BOX(&cxrfast::weighted_bce_auc_cuda));
  m.impl("weighted_bce_auc_backward", TORCH_BOX(&cxrfast::weighted_bce_auc_backward_cuda));
  m.impl("auc_count", TORCH_BOX(&cxrfast::auc_count_cuda));
}
