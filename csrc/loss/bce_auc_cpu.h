// bce_auc_cpu.h - weighted BCE, its gradient and the AUC counts on the CPU. Knows nothing of torch.
#pragma once

#include <cstdint>

namespace cxrfast {

// One call. Pointers are borrowed; strides are in elements.
struct BceAucBatch {
  const void* logits;  // T (N, C)
  int64_t logits_stride[2];
  const float* targets;  // (N, C): 1, 0, everything else unknown
  int64_t targets_stride[2];
  int64_t N, C;
  const float* pos_weight;  // (C,) or null: ones
  int64_t pos_weight_stride;
  const float* class_weight;  // (C,) or null: ones
  int64_t class_weight_stride;
  void* grad;       // Real<T> (N, C) contiguous, overwritten; or null: no loss, only counts
  int64_t* counts;  // (C, 2, 65536) contiguous, added to; or null
};

struct BceAucSums {
  double loss;    // over the known entries
  int64_t known;  // their number

  double mean() const { return known ? loss / double(known) : 0.0; }
  // By what the gradient of the sum is multiplied to become that of `mean`, for an incoming gradient.
  double scale(double grad_loss) const { return known ? grad_loss / double(known) : 0.0; }
};

// Two threads gain from half of this on, while the machine is theirs alone (docs/notes.md, "The loss").
constexpr int64_t kThreadedEntries = 32768;

// Runs body(begin, end, context) on disjoint ranges that cover [0, n), possibly at once, and waits for all.
using ParallelFor = void (*)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// T: float, double, Half, BFloat16. `threads` is what parallel_for may use; the result has the same bits for any.
// Allocates nothing.
template <class T>
BceAucSums bce_auc_cpu(const BceAucBatch& batch, int threads, ParallelFor parallel_for);

// out[i] = grad[i] * scale, rounded once to T; n elements.
template <class T>
void scale_grad_cpu(const void* grad, double scale, void* out, int64_t n);

// What the AUC of each class needs from counts (C, 2, 65536): pairs[c] = {pairs of a positive above a negative, pairs
// of equal code, negatives, positives}. NaN scores are counted like the others. Exact up to 2^53 pairs.
void auc_pairs_cpu(const int64_t* counts, int64_t C, double (*pairs)[4]);

}  // namespace cxrfast
