// winograd_conv.h - a 3x3 convolution with padding 1 over channels-last bfloat16 maps, or the gradient of its input, by
// Winograd's F(2x2, 3x3): for CPUs with AVX512_BF16 and no matrix unit, where torch's own runs at the rate of the
// products and only fewer of them are faster (docs/notes.md). Products of bfloat16, sums in float; its error against
// float64 is twice that of torch's. Knows neither torch nor Python. Left out: every other convolution.
#pragma once

#include <cstdint>

namespace cxrfast {

struct Line;  // winograd_tiles.h

// A kernel wherever it lies: its tap (y, x) from one channel to another is at[y * y_stride + x * x_stride + in *
// in_stride + out * out_stride]. A gradient's is the convolution's own, turned by half a circle, its channels swapped.
struct KernelView {
  const float* at;
  int64_t in_stride, out_stride, y_stride, x_stride;
};

struct WinogradConvJob {
  int64_t N, H, W;
  int64_t in, out;             // channels; multiples of kWinogradChannels
  const uint16_t* x;           // (N, H, W, in)
  const float *scale, *shift;  // (in): it is relu(x * scale + shift) that is convolved; null: x
  KernelView kernel;
  Line* packed;      // (in * out / 2): winograd_pack's
  uint16_t* result;  // (N, H, W, out)
};

constexpr int64_t kWinogradChannels = 32;

// Transforms the kernel for the output channels [32 begin, 32 end).
void winograd_pack(const WinogradConvJob& job, int64_t begin, int64_t end);

// Chunks that a job falls into; any split of [0, chunks) over threads gives the same result.
int64_t winograd_conv_chunks(const WinogradConvJob& job);

// Does the chunks [begin, end).
void winograd_conv_run(const WinogradConvJob& job, int64_t begin, int64_t end);

}  // namespace cxrfast
