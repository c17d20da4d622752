// resample.cpp - the weights, and both passes one pixel at a time.
#include "resample.h"

#include <algorithm>
#include <cmath>

#include "unfilter.h"

namespace cxrfast::png {

namespace {

// The compiler must not fuse what follows with the product (as it may on arm64): the bits of the weights would change.
inline double rounded(double product) {
  const volatile double kept = product;
  return kept;
}

}  // namespace

Axis::Axis(uint32_t in_, uint32_t out_) : in(in_), out(out_) {
  // Every step in double and in this order: the bits of the weights are part of the contract.
  const double scale = static_cast<double>(in) / out;
  const double reach = std::max(scale, 1.0);  // half the width of the triangle, source pixels
  const double shrink = 1.0 / reach;
  spans.reserve(out);
  std::vector<double> exact;
  for (uint32_t o = 0; o < out; ++o) {
    const double center = rounded((o + 0.5) * scale);
    const uint32_t first = static_cast<uint32_t>(std::max(0.0, center - reach + 0.5));
    const uint32_t end = std::min(in, static_cast<uint32_t>(center + reach + 0.5));
    exact.clear();
    double sum = 0.0;
    for (uint32_t x = first; x < end; ++x) {
      const double distance = std::abs(rounded((x - center + 0.5) * shrink));
      exact.push_back(std::max(0.0, 1.0 - distance));
      sum += exact.back();
    }
    spans.push_back({first, end - first, weights.size()});
    for (const double weight : exact) {
      weights.push_back(static_cast<int32_t>(0.5 + weight / sum * (1 << kWeightBits)));
    }
  }
}

Resampler::Resampler(uint32_t in_w, uint32_t in_h, uint32_t size) : horizontal(in_w, size), vertical(in_h, size) {
  const int64_t shrink_w = int64_t{in_w} - size, shrink_h = int64_t{in_h} - size;
  vertical_first = shrink_h > 0 && shrink_h > 2 * shrink_w;
}

namespace {

// out[o] for one line of pixels that lie `step` bytes apart, in the source and in the result.
void resample_line(const Axis& axis, const uint8_t* source, size_t step, uint8_t* out, size_t out_step) {
  for (const Axis::Span& span : axis.spans) {
    int64_t sum = 1 << (kWeightBits - 1);
    for (uint32_t i = 0; i < span.count; ++i) {
      sum += int64_t{axis.weights[span.weight_at + i]} * source[(span.first + i) * step];
    }
    *out = static_cast<uint8_t>(std::min<int64_t>(sum >> kWeightBits, 255));
    out += out_step;
  }
}

}  // namespace

Status resample(const Resampler& resampler, const uint8_t* grey, size_t stride_bytes, uint8_t* out, Scratch& scratch,
                Isa) {
  const Axis& horizontal = resampler.horizontal;
  const Axis& vertical = resampler.vertical;
  const size_t size = horizontal.out;
  if (!scratch.halved.reserve(size * std::max(horizontal.in, vertical.in))) {
    return {Code::kTooLarge, reason::kOutOfMemory, -1};
  }
  uint8_t* halved = scratch.halved.data();
  if (resampler.vertical_first) {
    const size_t width = horizontal.in;
    for (size_t x = 0; x < width; ++x) resample_line(vertical, grey + x, stride_bytes, halved + x, width);
    for (size_t y = 0; y < size; ++y) resample_line(horizontal, halved + y * width, 1, out + y * size, 1);
  } else {
    for (size_t y = 0; y < vertical.in; ++y)
      resample_line(horizontal, grey + y * stride_bytes, 1, halved + y * size, 1);
    for (size_t x = 0; x < size; ++x) resample_line(vertical, halved + x, size, out + x, size);
  }
  return {};
}

void unfilter_resample_grey8(PixelJob* jobs, size_t count, Scratch& scratch, Isa isa) {
  for (PixelJob* job = jobs; job != jobs + count; ++job) {
    job->sum = job->sumsq = 0;
    job->status = unfilter(job->rows, job->height, job->width, 1);
    if (!job->status.ok()) continue;
    job->status = resample(*job->resampler, job->rows + 1, size_t{job->width} + 1, job->out, scratch, isa);
    if (!job->status.ok()) continue;
    const size_t pixels = size_t{job->resampler->horizontal.out} * job->resampler->vertical.out;
    for (size_t i = 0; i < pixels; ++i) {
      job->sum += job->out[i];
      job->sumsq += job->out[i] * job->out[i];
    }
  }
}

}  // namespace cxrfast::png
