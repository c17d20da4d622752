// norm_kernels.h - batch norm with what follows it in a block of the network (ReLU; or 2x2 max-pool, ReLU and dropout),
// forward and backward, on the CPU, each as one pass over memory.
//
// Maps are channels-last and dense: x[n][h][w][c], float or bfloat16, computed in float. Statistics are sums in float
// over a few pixels, then in double, taken per chunk of a fixed size and added up in order: the same bits whatever the
// number of threads. Knows neither torch nor Python. Left out: other pool sizes, and NaN inside a pool window of an
// otherwise finite map.
#pragma once

#include <cstdint>

namespace cxrfast {

enum class NormKind {
  kSums,              // sums[0][c] = sum of x, sums[1][c] = sum of x^2
  kRelu,              // out = relu(x * scale + shift)
  kReluBackwardSums,  // g = grad where x * scale + shift > 0; sums[0] = sum of g, sums[1] = sum of g * x
  kReluBackward,      // out = coef[0] * g + coef[1] * x + coef[2]; out may be grad
  kPool,              // out = dropout(relu(max-pool(x * scale + shift))), place = which of the four, or kNowhere
  kPoolBackwardSums,  // g = grad * keep_scale at its place, 0 elsewhere; sums as above
  kPoolBackward,      // out = coef[0] * g + coef[1] * x + coef[2] over the whole map
};

constexpr uint8_t kNowhere = 4;  // place of a pooled value that ReLU or dropout made 0: it has no gradient

// One call. Pointers that a kind does not name are unused.
struct NormJob {
  NormKind kind;
  bool bf16;           // element type of x, grad and out
  int64_t N, H, W, C;  // of x; pooled maps are (N, H / 2, W / 2, C)
  const void* x;
  const void* grad;      // of out: like x, or pooled
  const float* scale;    // (C)
  const float* shift;    // (C)
  const float* coef;     // (3, C)
  const uint8_t* bytes;  // pooled, random: below `threshold` the value is dropped; null drops nothing
  int threshold;
  float keep_scale;  // what is kept is multiplied by this
  void* out;
  uint8_t* place;   // pooled
  double* partial;  // (chunks, 2, C) scratch for the kinds that sum
};

// Chunks that a job falls into; any split of [0, chunks) over threads gives the same result.
int64_t norm_chunks(const NormJob& job);

// Does the chunks [begin, end).
void norm_run(const NormJob& job, int64_t begin, int64_t end);

}  // namespace cxrfast
