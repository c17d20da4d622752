// resample.cpp - the weights; films through the kernels: a few rows are un-filtered, then resampled while they are hot.
#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "unfilter.h"

namespace cxrfast::png {

static_assert(kPixelPad >= kBlockColumns);

namespace {

// The compiler must not fuse what follows with the product (as it may on arm64): the bits of the weights would change.
inline double rounded(double product) {
  const volatile double kept = product;
  return kept;
}

// An output pixel's reach is at most 2 scale + 2 pixels wide and may begin and end in the middle of a pair.
constexpr uint64_t most_pairs(uint64_t in, uint64_t out) { return in + 3 * out; }

}  // namespace

Axis::Axis(uint32_t in_, uint32_t out_) : in(in_), out(out_) {
  // Every step in double and in this order: the bits of the weights are part of the contract.
  const double scale = static_cast<double>(in) / out;
  const double reach = std::max(scale, 1.0);  // half the width of the triangle, source pixels
  const double shrink = 1.0 / reach;
  spans.reserve(out);
  weights.reserve(most_pairs(in, out));
  std::vector<double> exact;
  for (uint32_t o = 0; o < out; ++o) {
    const double center = rounded((o + 0.5) * scale);
    const uint32_t first = static_cast<uint32_t>(std::max(0.0, center - reach + 0.5));
    const uint32_t end = std::min(in, static_cast<uint32_t>(center + reach + 0.5));
    exact.clear();
    double sum = 0.0;
    for (uint32_t x = first; x < end; ++x) {
      exact.push_back(std::max(0.0, 1.0 - std::abs(rounded((x - center + 0.5) * shrink))));
      sum += exact.back();
    }
    const uint32_t first_pair = first / 2, pairs = (end + 1) / 2 - first_pair;
    spans.push_back({first_pair, pairs, weights.size()});
    weights.resize(weights.size() + pairs);
    for (uint32_t x = first; x < end; ++x) {
      const int32_t weight = static_cast<int32_t>(0.5 + exact[x - first] / sum * (1 << kWeightBits));
      WeightPair& pair = weights[spans.back().weights_at + x / 2 - first_pair];
      pair.high[x % 2] = static_cast<int16_t>(weight >> kWeightLowBits);
      pair.low[x % 2] = static_cast<int16_t>(weight & ((1 << kWeightLowBits) - 1));
    }
    longest_span = std::max(longest_span, pairs);
  }
}

Resampler::Resampler(uint32_t in_w, uint32_t in_h, uint32_t size) : horizontal(in_w, size), vertical(in_h, size) {
  const int64_t shrink_w = int64_t{in_w} - size, shrink_h = int64_t{in_h} - size;
  vertical_first = shrink_h > 0 && shrink_h > 2 * shrink_w;
}

namespace {

constexpr Status kNoMemory = {Code::kTooLarge, reason::kOutOfMemory, -1};

constexpr size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr size_t kCachedTile = size_t{1} << 14;

// Room for the longest span; apart from that, as much as the first-level cache holds beside the rest.
size_t tile_nbytes(const PixelKernels& kernels, const Axis& axis) {
  const size_t pair_nbytes = 4 * kernels.lines_at_once;
  return pair_nbytes * std::max(kCachedTile / pair_nbytes, round_up(axis.longest_span + kTilePairs - 1, kTilePairs));
}

size_t window_stride(size_t width) { return round_up(kWindowLead + width + kWindowTail, 128) + 64; }

// The film between the passes: one line for each output column. Not a multiple of a page, for the cache's sake.
size_t halved_stride(size_t height) { return round_up(height + kLineTail, 128) + 64; }

// Both passes by the plain sums, for the films whose vertical pass comes first.
Status resample_vertical_first(const Resampler& resampler, const uint8_t* grey, size_t stride_bytes, uint8_t* out,
                               Scratch& scratch) {
  const Axis& horizontal = resampler.horizontal;
  const Axis& vertical = resampler.vertical;
  const size_t width = horizontal.in;
  if (!scratch.halved.reserve(width) || !scratch.tile.reserve(width * sizeof(uint32_t))) return kNoMemory;
  uint8_t* halved = scratch.halved.data();
  uint32_t* sums = reinterpret_cast<uint32_t*>(scratch.tile.data());
  constexpr uint32_t kHalf = 1u << (kWeightBits - 1);
  for (const OutputSpan& row_span : vertical.spans) {
    std::fill_n(sums, width, kHalf);
    for (size_t y = 2 * size_t{row_span.first_pair}, i = 0; i < 2 * size_t{row_span.pairs} && y < vertical.in;
         ++y, ++i) {
      const uint32_t weight = vertical.weight_at(row_span, i);
      const uint8_t* row = grey + y * stride_bytes;
      for (size_t x = 0; x < width; ++x) sums[x] += weight * row[x];
    }
    for (size_t x = 0; x < width; ++x) halved[x] = static_cast<uint8_t>(std::min(sums[x] >> kWeightBits, 255u));
    for (const OutputSpan& span : horizontal.spans) {
      uint32_t sum = kHalf;
      for (size_t x = 2 * size_t{span.first_pair}, i = 0; i < 2 * size_t{span.pairs} && x < width; ++x, ++i) {
        sum += horizontal.weight_at(span, i) * halved[x];
      }
      *out++ = static_cast<uint8_t>(std::min(sum >> kWeightBits, 255u));
    }
  }
  return {};
}

// Calls fill(y, count, window, stride) to put rows y .. y + count - 1 into the window, for all rows from the first one
// on, and resamples them.
template <typename Fill>
Status resample_groups(const Resampler& resampler, const PixelKernels& kernels, uint8_t* out, Scratch& scratch,
                       Fill fill) {
  const Axis& horizontal = resampler.horizontal;
  const Axis& vertical = resampler.vertical;
  const size_t size = horizontal.out, height = vertical.in;
  const size_t stride = window_stride(horizontal.in), between = halved_stride(height);
  const size_t tile = std::max(tile_nbytes(kernels, horizontal), tile_nbytes(kernels, vertical));
  if (!scratch.window.reserve(kernels.group_rows * stride) || !scratch.halved.reserve(size * between) ||
      !scratch.tile.reserve(tile)) {
    return kNoMemory;
  }
  uint8_t* window = scratch.window.data() + kWindowLead;
  uint8_t* halved = scratch.halved.data();
  for (size_t y = 0; y < height; y += kernels.group_rows) {
    const size_t count = std::min(kernels.group_rows, height - y);
    fill(y, count, window, stride);
    kernels.resample_lines(horizontal.spans.data(), size, horizontal.weights.data(), window, stride, count, halved + y,
                           between, scratch.tile.data(), tile);
  }
  kernels.resample_lines(vertical.spans.data(), size, vertical.weights.data(), halved, between, size, out, size,
                         scratch.tile.data(), tile);
  return {};
}

Status check_filters(const uint8_t* rows, size_t width, size_t height) {
  for (size_t y = 0; y < height; ++y) {
    if (rows[y * (width + 1)] > kPaeth) {
      return {Code::kCorrupt, reason::kRowFilter, static_cast<int64_t>(y * (width + 1))};
    }
  }
  return {};
}

// Un-filters rows of 8-bit grey group by group, from the first one on; remembers the last row of the group before.
class GroupUnfilter {
 public:
  GroupUnfilter(const uint8_t* rows, size_t width, const PixelKernels& kernels)
      : rows_(rows), width_(width), kernels_(kernels) {}

  static uint64_t scratch_nbytes(uint64_t width) { return kAboveLead + width + kAboveTail; }

  bool reserve(Scratch& scratch) {
    if (!scratch.above.reserve(scratch_nbytes(width_))) return false;
    std::memset(scratch.above.data(), 0xff, scratch_nbytes(width_));
    above_ = scratch.above.data() + kAboveLead;
    return true;
  }

  // Rows y .. y + count - 1 into the window.
  void operator()(size_t y, size_t count, uint8_t* window, size_t stride) {
    kernels_.unfilter_rows(rows_ + y * (width_ + 1), count, width_, above_, window, stride);
    const uint8_t* last = window + (count - 1) * stride;
    for (size_t x = 0; x < width_; ++x) above_[x] = static_cast<uint8_t>(~last[x]);
  }

 private:
  const uint8_t* rows_;
  const size_t width_;
  const PixelKernels& kernels_;
  uint8_t* above_ = nullptr;
};

Status unfilter_resample(const PixelJob& job, const PixelKernels& kernels, Scratch& scratch) {
  const size_t width = job.width;
  const Status status = check_filters(job.rows, width, job.height);
  if (!status.ok()) return status;
  if (job.resampler->vertical_first) {
    unfilter(job.rows, job.height, width, 1);
    return resample_vertical_first(*job.resampler, job.rows + 1, width + 1, job.out, scratch);
  }
  GroupUnfilter unfilter_group(job.rows, width, kernels);
  if (!unfilter_group.reserve(scratch)) return kNoMemory;
  return resample_groups(*job.resampler, kernels, job.out, scratch, unfilter_group);
}

}  // namespace

uint64_t resample_nbytes(uint32_t width, uint32_t height, uint32_t size) {
  const uint64_t longest = most_pairs(std::max(width, height), size) / size + 2 * kTilePairs;
  const uint64_t axes = (most_pairs(width, size) + most_pairs(height, size)) * sizeof(WeightPair) +
                        2 * uint64_t{size} * sizeof(OutputSpan);
  return axes + unfilter_nbytes(width) + size * halved_stride(height) + kCachedTile + 4 * kMaxLinesAtOnce * longest +
         4 * uint64_t{width};
}

uint64_t unfilter_nbytes(uint32_t width) {
  return kMaxGroupRows * window_stride(width) + GroupUnfilter::scratch_nbytes(width);
}

Status resample(const Resampler& resampler, const uint8_t* grey, size_t stride_bytes, uint8_t* out, Scratch& scratch,
                Isa isa) {
  if (resampler.vertical_first) return resample_vertical_first(resampler, grey, stride_bytes, out, scratch);
  const size_t width = resampler.horizontal.in;
  return resample_groups(resampler, pixel_kernels(isa), out, scratch,
                         [&](size_t y, size_t count, uint8_t* window, size_t stride) {
                           // Copied, because the caller's rows end where they end.
                           for (size_t k = 0; k < count; ++k) {
                             std::memcpy(window + k * stride, grey + (y + k) * stride_bytes, width);
                           }
                         });
}

void unfilter_resample_grey8(PixelJob* jobs, size_t count, Scratch& scratch, Isa isa) {
  const PixelKernels& kernels = pixel_kernels(isa);
  for (PixelJob* job = jobs; job != jobs + count; ++job) {
    job->sum = job->sumsq = 0;
    job->status = unfilter_resample(*job, kernels, scratch);
    if (!job->status.ok()) continue;
    const size_t size = job->resampler->horizontal.out;
    kernels.sum_pixels(job->out, size * size, &job->sum, &job->sumsq);
  }
}

Status unfilter_grey8(const uint8_t* rows, uint32_t width, uint32_t height, uint8_t* grey, Scratch& scratch, Isa isa) {
  const Status status = check_filters(rows, width, height);
  if (!status.ok()) return status;
  const PixelKernels& kernels = pixel_kernels(isa);
  const size_t stride = window_stride(width);
  GroupUnfilter unfilter_group(rows, width, kernels);
  if (!unfilter_group.reserve(scratch) || !scratch.window.reserve(kernels.group_rows * stride)) return kNoMemory;
  uint8_t* window = scratch.window.data() + kWindowLead;
  for (size_t y = 0; y < height; y += kernels.group_rows) {
    const size_t count = std::min<size_t>(kernels.group_rows, height - y);
    unfilter_group(y, count, window, stride);
    for (size_t k = 0; k < count; ++k, grey += width) std::memcpy(grey, window + k * stride, width);
  }
  return {};
}

const PixelKernels& pixel_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return kAvx512PixelKernels;
  if (isa == Isa::kAvx2) return kAvx2PixelKernels;
#endif
  (void)isa;
  return kPortablePixelKernels;
}

}  // namespace cxrfast::png
