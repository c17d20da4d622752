// weight_grad.h - the weight gradient of a 3x3 convolution with padding 1 over channels-last float maps, for CPUs with
// AVX2 and FMA and nothing wider: there torch's own runs at a fifth to a half of the speed of its forward pass
// (docs/notes.md). Knows neither torch nor Python. Left out: every other convolution, and CPUs with AVX-512.
#pragma once

#include <cstdint>

namespace cxrfast {

struct WeightGradJob {
  int64_t N, H, W;
  int64_t in, out;    // channels; multiples of kWeightGradIn and kWeightGradOut
  const float* x;     // (N, H, W, in)
  const float* grad;  // (N, H, W, out)
  float* partial;     // (weight_grad_parts, 3, 3, out, in), zeroed by the caller
};

constexpr int64_t kWeightGradIn = 16, kWeightGradOut = 2;

// Whether this CPU runs it.
bool weight_grad_supported();

// The rows fall into so many parts, whatever the number of threads, so that the sum has one order.
int64_t weight_grad_parts(const WeightGradJob& job);

// Does the parts [begin, end).
void weight_grad_run(const WeightGradJob& job, int64_t begin, int64_t end);

// Adds the parts up in their order: grad_weight (3, 3, out, in).
void weight_grad_finish(const WeightGradJob& job, float* grad_weight);

}  // namespace cxrfast
