// winograd_conv.h - a 3x3 convolution with padding 1 over channels-last bfloat16 maps, or the gradient of its input, by
// Winograd's F(2x2, 3x3): for CPUs with AVX512_BF16 and no matrix unit, where torch's own runs at the rate of the
// products and only fewer of them are faster (docs/notes.md). Products of bfloat16, sums in float; its error against
// float64 is twice that of torch's. Knows neither torch nor Python. Left out: every other convolution.
#pragma once

#include <cstdint>

namespace cxrfast {

struct Line;  // winograd_tiles.h

// Element (y, x) of the kernel for one channel in and one out is at[y * y_stride + x * x_stride + in * in_stride + out
// * out_stride]. A gradient's kernel is the convolution's own, turned by half a circle and with its channels swapped.
struct KernelView {
  const float* at;
  int64_t in_stride, out_stride, y_stride, x_stride;
};

struct WinogradConvJob {
  int64_t N, H, W;
  int64_t in, out;             // channels; multiples of kWinogradIn and kWinogradOut
  const uint16_t* x;           // (N, H, W, in)
  const float *scale, *shift;  // (in): it is relu(x * scale + shift) that is convolved; null: x
  const Line* kernel;          // winograd_pack's
  uint16_t* result;            // (N, H, W, out)
};

constexpr int64_t kWinogradIn = 32, kWinogradOut = 16;

// Transforms the kernel for the output channels [16 begin, 16 end); packed holds winograd_kernel_lines.
int64_t winograd_kernel_lines(int64_t in, int64_t out);
void winograd_pack(const KernelView& kernel, int64_t in, int64_t begin, int64_t end, Line* packed);

// Chunks that a job falls into; any split of [0, chunks) over threads gives the same result.
int64_t winograd_conv_chunks(const WinogradConvJob& job);

// Does the chunks [begin, end).
void winograd_conv_run(const WinogradConvJob& job, int64_t begin, int64_t end);

}  // namespace cxrfast
