// batch_norm.h - what a batch norm is for one channel of one batch, and its derivative, for the CPU and for CUDA.
//
// In double throughout: variance is a small difference of large sums. Knows neither torch nor Python.
#pragma once

#include <cmath>
#include <cstdint>

#include "../half.h"

namespace cxrfast {

// One call for C channels. Statistics are of the batch where `sums` is there, else the running ones.
struct BatchNorm {
  int64_t C;
  const double* sums;   // (2, C): of x and of x * x, over all processes; or null
  const double* total;  // how many values they are of; null where `count` says it
  double count;
  const float* weight;
  const float* bias;
  float* running_mean;  // updated where `sums` is there
  float* running_var;
  int64_t* batches;
  double momentum, eps;
  double* stats;  // (3, C): mean, 1 / deviation, weight / deviation
  float* affine;  // (2, C): the norm of x is affine[0] * x + affine[1]
};

struct BatchNormGrad {
  int64_t C;
  const double* sums;      // (2, C): of g and of g * x, of this process
  const double* all_sums;  // the same over all processes
  const double* total;     // as above
  double count;
  bool training;  // the statistics depend on x too
  const double* stats;
  float* coef;  // (3, C): the gradient of x is coef[0] * g + coef[1] * x + coef[2]
  float* grad_weight;
  float* grad_bias;
};

CXRFAST_INLINE void batch_norm(const BatchNorm& job, int64_t c) {
  const int64_t C = job.C;
  double mean, variance;
  if (job.sums) {
    const double count = job.total ? *job.total : job.count;
    mean = job.sums[c] / count;
    variance = job.sums[C + c] / count - mean * mean;
    if (variance < 0) variance = 0;  // so written that a NaN stays one
    const double unbiased = variance * (count / (count > 2 ? count - 1 : 1));
    job.running_mean[c] += float(job.momentum) * (float(mean) - job.running_mean[c]);
    job.running_var[c] += float(job.momentum) * (float(unbiased) - job.running_var[c]);
    if (c == 0) ++*job.batches;
  } else {
    mean = job.running_mean[c];
    variance = job.running_var[c];
  }
  const double inverse = 1 / sqrt(variance + job.eps), scale = job.weight[c] * inverse;
  job.stats[c] = mean;
  job.stats[C + c] = inverse;
  job.stats[2 * C + c] = scale;
  job.affine[c] = float(scale);
  job.affine[C + c] = float(job.bias[c] - mean * scale);
}

CXRFAST_INLINE void batch_norm_grad(const BatchNormGrad& job, int64_t c) {
  const int64_t C = job.C;
  const double mean = job.stats[c], inverse = job.stats[C + c], scale = job.stats[2 * C + c];
  job.grad_weight[c] = float((job.sums[C + c] - mean * job.sums[c]) * inverse);
  job.grad_bias[c] = float(job.sums[c]);
  double slope = 0, constant = 0;
  if (job.training) {
    const double count = job.total ? *job.total : job.count;
    const double mean_product = (job.all_sums[C + c] - mean * job.all_sums[c]) * inverse / count;
    slope = -scale * inverse * mean_product;
    constant = -scale * (job.all_sums[c] / count) - slope * mean;
  }
  job.coef[c] = float(scale);
  job.coef[C + c] = float(slope);
  job.coef[2 * C + c] = float(constant);
}

}  // namespace cxrfast
