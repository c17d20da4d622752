// winograd_float.h - winograd_conv.h and winograd_weight_grad.h in float, for CPUs with AVX2 or AVX-512: a 3x3
// convolution with padding 1 over channels-last maps, the gradient of its input and of its weights, by Winograd's
// F(2x2, 3x3) (winograd_tiles.h). Knows neither torch nor Python. Left out: every other convolution.
#pragma once

#include <cstdint>

#include "winograd_conv.h"

namespace cxrfast {

struct alignas(64) FloatLine {
  float values[16];
};

struct WinogradFloatJob {
  int64_t N, H, W, in, out;
  const float* x;              // (N, H, W, in)
  const float *scale, *shift;  // (in): it is relu(x * scale + shift) that is convolved; null: x
  // of the convolution
  KernelView kernel;
  FloatLine* packed;  // (in * out): winograd_float_pack's
  float* result;      // (N, H, W, out)
  // of the weights' gradient
  const float* grad;  // (N, H, W, out)
  float* partial;     // (winograd_float_parts, 3, 3, in, out); written by its parts
};

// Whether this CPU runs it, at the level that best_level gives now.
bool winograd_float_supported();

// Transforms the kernel for the output channels [32 begin, 32 end).
void winograd_float_pack(const WinogradFloatJob& job, int64_t begin, int64_t end);

// Chunks that the convolution falls into; any split of [0, chunks) over threads gives the same result.
int64_t winograd_float_chunks(const WinogradFloatJob& job);
void winograd_float_run(const WinogradFloatJob& job, int64_t begin, int64_t end);

// The tiles of the weights' gradient fall into so many parts, whatever the number of threads: its sum has one order.
int64_t winograd_float_parts(const WinogradFloatJob& job);
void winograd_float_weight_grad(const WinogradFloatJob& job, int64_t begin, int64_t end);

}  // namespace cxrfast
