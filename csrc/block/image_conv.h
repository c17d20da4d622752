// image_conv.h - the network's first convolution, 3x3 with padding 1 from one channel to C, with what its neighbours
// need of it: forward it sums up its result for the batch norm behind it, backward it takes the gradient from behind
// that batch norm and ReLU, so that the gradient of its own result, the largest map of all, is never written.
//
// The image and the kernel are float; the result and its gradient are channels-last, float or bfloat16. Sums are in
// float over one row of pixels, then in double in a fixed order: the same bits whatever the number of threads.
// Knows neither torch nor Python. Left out: the gradient of the image.
#pragma once

#include <cstdint>

namespace cxrfast {

struct ImageConvJob {
  bool backward;
  bool bf16;  // element type of x and grad
  int64_t N, H, W, C;
  const float* image;  // (N, H, W)
  // forward
  const float* kernel;  // (3, 3, C)
  void* out;            // (N, H, W, C)
  // backward
  const void* x;       // what `out` was
  const void* grad;    // like x, of relu(x * scale + shift)
  const float* scale;  // (C)
  const float* shift;  // (C)
  const float*
      coef;  // (3, C): the gradient of x is coef[0] * g + coef[1] * x + coef[2], where g is what ReLU leaves of grad
  // (chunks, 2, C) forward: sums of out and of out^2; (chunks, 9, C) backward: the kernel's gradient
  double* partial;
};

// Values of each chunk's part of `partial`.
int64_t image_conv_sums(const ImageConvJob& job);

// Chunks that a job falls into; any split of [0, chunks) over threads gives the same result.
int64_t image_conv_chunks(const ImageConvJob& job);

// Does the chunks [begin, end).
void image_conv_run(const ImageConvJob& job, int64_t begin, int64_t end);

}  // namespace cxrfast
