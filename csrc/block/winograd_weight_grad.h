// winograd_weight_grad.h - the weight gradient of a 3x3 convolution with padding 1 over channels-last bfloat16 maps, as
// the derivative of Winograd's F(2x2, 3x3) (winograd_tiles.h): 16 multiplications where the sum itself has 36. For the
// same CPUs as winograd_conv.h. Products of bfloat16, sums in float; its error against float64 is two to three times
// that of torch's. Knows neither torch nor Python. Left out: every other convolution.
#pragma once

#include <cstdint>

#include "winograd_conv.h"

namespace cxrfast {

struct WinogradWeightGradJob {
  int64_t N, H, W;
  int64_t in, out;             // channels; multiples of kWinogradChannels
  const uint16_t* x;           // (N, H, W, in)
  const float *scale, *shift;  // (in): it was relu(x * scale + shift) that was convolved; null: x
  const uint16_t* grad;        // (N, H, W, out)
  float* partial;              // (winograd_weight_grad_parts, 3, 3, in, out); written by its parts
};

// The tiles fall into so many parts, whatever the number of threads, so that the sum has one order.
int64_t winograd_weight_grad_parts(const WinogradWeightGradJob& job);

// Does the parts [begin, end).
void winograd_weight_grad_run(const WinogradWeightGradJob& job, int64_t begin, int64_t end);

}  // namespace cxrfast
