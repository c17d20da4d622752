// weight_grad_bf16.h - the weight gradient of a 3x3 convolution with padding 1 over channels-last bfloat16 maps, for
// CPUs with AVX512_BF16 and no matrix unit: there torch's own runs at three quarters of the speed of its forward pass
// where channels are few (docs/notes.md). Products of bfloat16, sums in float. Knows neither torch nor Python. Left
// out: every other convolution, and CPUs with AMX.
#pragma once

#include <cstdint>

namespace cxrfast {

struct WeightGradBf16Job {
  int64_t N, H, W;
  int64_t in, out;       // channels; multiples of kWeightGradBf16In and kWeightGradBf16Out
  const uint16_t* x;     // (N, H, W, in)
  const uint16_t* grad;  // (N, H, W, out)
  float* partial;        // (weight_grad_bf16_parts, 3, 3, in, out), zeroed by the caller
};

constexpr int64_t kWeightGradBf16In = 8, kWeightGradBf16Out = 32;

// Whether this CPU runs it, and gains by it.
bool weight_grad_bf16_supported();

// The rows fall into so many parts, whatever the number of threads, so that the sum has one order.
int64_t weight_grad_bf16_parts(const WeightGradBf16Job& job);

// Does the parts [begin, end).
void weight_grad_bf16_run(const WeightGradBf16Job& job, int64_t begin, int64_t end);

}  // namespace cxrfast
