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
  if (!scratch.window.reserve(width) || !scratch.tile.reserve(width * sizeof(uint32_t))) return kNoMemory;
  uint8_t* halved = scratch.window.data();
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

// A filter byte that there is not, among `count` rows from row y on. No other row has been un-filtered then.
Status check_filters(const uint8_t* rows, size_t width, size_t y, size_t count) {
  for (size_t k = 0; k < count; ++k) {
    if (rows[k * (width + 1)] > kPaeth) {
      return {Code::kCorrupt, reason::kRowFilter, static_cast<int64_t>((y + k) * (width + 1))};
    }
  }
  return {};
}

uint64_t above_nbytes(uint64_t width) { return kAboveLead + width + kAboveTail; }

// The row above the first one: zeros.
bool begin_above(Buffer& above, size_t width) {
  if (!above.reserve(above_nbytes(width))) return false;
  std::memset(above.data(), 0xff, above_nbytes(width));
  return true;
}

// Rows of 8-bit grey into the window; `above` becomes the last of them.
void unfilter_group(const uint8_t* rows, size_t count, size_t width, const PixelKernels& kernels, Buffer& above_buffer,
                    uint8_t* window, size_t stride) {
  uint8_t* above = above_buffer.data() + kAboveLead;
  kernels.unfilter_rows(rows, count, width, above, window, stride);
  const uint8_t* last = window + (count - 1) * stride;
  for (size_t x = 0; x < width; ++x) above[x] = static_cast<uint8_t>(~last[x]);
}

}  // namespace

size_t RowGroups::group_rows(Isa isa) { return pixel_kernels(isa).group_rows; }

bool RowGroups::begin(const Resampler& resampler, Scratch& scratch, Isa isa) {
  resampler_ = &resampler;
  kernels_ = &pixel_kernels(isa);
  scratch_ = &scratch;
  y_ = 0;
  status_ = {};
  return halved_.reserve(resampler.horizontal.out * halved_stride(resampler.vertical.in)) &&
         begin_above(above_, resampler.horizontal.in) && reserve_scratch();
}

// At every use: a larger film that begins meanwhile may have found no memory, and left the thread's scratch empty.
bool RowGroups::reserve_scratch() {
  const Axis &horizontal = resampler_->horizontal, &vertical = resampler_->vertical;
  if (!scratch_->window.reserve(kernels_->group_rows * window_stride(horizontal.in)) ||
      !scratch_->tile.reserve(std::max(tile_nbytes(*kernels_, horizontal), tile_nbytes(*kernels_, vertical)))) {
    status_ = kNoMemory;
  }
  return status_.ok();
}

// Calls fill(first, rows, window, stride) to put rows into the window, first counted from those that come now.
template <typename Fill>
void RowGroups::add(size_t count, Fill fill) {
  if (!reserve_scratch()) return;
  const Axis& horizontal = resampler_->horizontal;
  const size_t stride = window_stride(horizontal.in), between = halved_stride(resampler_->vertical.in);
  uint8_t* window = scratch_->window.data() + kWindowLead;
  for (size_t k = 0; k < count; k += kernels_->group_rows) {
    const size_t rows = std::min(kernels_->group_rows, count - k);
    fill(k, rows, window, stride);
    kernels_->resample_lines(horizontal.spans.data(), horizontal.out, horizontal.weights.data(), window, stride, rows,
                             halved_.data() + y_, between, scratch_->tile.data(), tile_nbytes(*kernels_, horizontal));
    y_ += rows;
  }
}

void RowGroups::add_filtered(const uint8_t* rows, size_t count) {
  const size_t width = resampler_->horizontal.in;
  if (status_.ok()) status_ = check_filters(rows, width, y_, count);
  if (!status_.ok()) return;
  add(count, [&](size_t first, size_t group, uint8_t* window, size_t stride) {
    unfilter_group(rows + first * (width + 1), group, width, *kernels_, above_, window, stride);
  });
}

void RowGroups::add_grey(const uint8_t* grey, size_t stride_bytes, size_t count) {
  // Copied, because the caller's rows end where they end.
  add(count, [&](size_t first, size_t group, uint8_t* window, size_t stride) {
    for (size_t k = 0; k < group; ++k) {
      std::memcpy(window + k * stride, grey + (first + k) * stride_bytes, resampler_->horizontal.in);
    }
  });
}

Status RowGroups::finish(uint8_t* out) {
  if (!status_.ok() || !reserve_scratch()) return status_;
  const Axis& vertical = resampler_->vertical;
  kernels_->resample_lines(vertical.spans.data(), vertical.out, vertical.weights.data(), halved_.data(),
                           halved_stride(vertical.in), vertical.out, out, vertical.out, scratch_->tile.data(),
                           tile_nbytes(*kernels_, vertical));
  return {};
}

void RowGroups::release_above(size_t nbytes) {
  halved_.release_above(nbytes);
  above_.release_above(nbytes);
}

uint64_t resample_nbytes(uint32_t width, uint32_t height, uint32_t size) {
  const uint64_t longest = most_pairs(std::max(width, height), size) / size + 2 * kTilePairs;
  const uint64_t axes = (most_pairs(width, size) + most_pairs(height, size)) * sizeof(WeightPair) +
                        2 * uint64_t{size} * sizeof(OutputSpan);
  return axes + unfilter_nbytes(width) + size * halved_stride(height) + kCachedTile + 4 * kMaxLinesAtOnce * longest +
         4 * uint64_t{width};
}

uint64_t unfilter_nbytes(uint32_t width) { return kMaxGroupRows * window_stride(width) + above_nbytes(width); }

Status resample(const Resampler& resampler, const uint8_t* grey, size_t stride_bytes, uint8_t* out, RowGroups& groups,
                Scratch& scratch, Isa isa) {
  if (resampler.vertical_first) return resample_vertical_first(resampler, grey, stride_bytes, out, scratch);
  if (!groups.begin(resampler, scratch, isa)) return kNoMemory;
  groups.add_grey(grey, stride_bytes, resampler.vertical.in);
  return groups.finish(out);
}

void unfilter_resample_grey8(PixelJob& job, RowGroups& groups, Scratch& scratch, Isa isa) {
  const size_t width = job.resampler->horizontal.in, height = job.resampler->vertical.in;
  job.sum = job.sumsq = 0;
  if (job.resampler->vertical_first) {
    job.status = check_filters(job.rows, width, 0, height);
    if (!job.status.ok()) return;
    unfilter(job.rows, height, width, 1);
    job.status = resample_vertical_first(*job.resampler, job.rows + 1, width + 1, job.out, scratch);
  } else if (groups.begin(*job.resampler, scratch, isa)) {
    groups.add_filtered(job.rows, height);
    job.status = groups.finish(job.out);
  } else {
    job.status = kNoMemory;
  }
  const size_t size = job.resampler->horizontal.out;
  if (job.status.ok()) sum_pixels(job.out, size * size, &job.sum, &job.sumsq, isa);
}

void sum_pixels(const uint8_t* image, size_t nbytes, int64_t* sum_ret, int64_t* sumsq_ret, Isa isa) {
  pixel_kernels(isa).sum_pixels(image, nbytes, sum_ret, sumsq_ret);
}

Status unfilter_grey8(const uint8_t* rows, uint32_t width, uint32_t height, uint8_t* grey, Scratch& scratch, Isa isa) {
  const Status status = check_filters(rows, width, 0, height);
  if (!status.ok()) return status;
  const PixelKernels& kernels = pixel_kernels(isa);
  const size_t stride = window_stride(width);
  Buffer& above = scratch.tile;
  if (!begin_above(above, width) || !scratch.window.reserve(kernels.group_rows * stride)) return kNoMemory;
  uint8_t* window = scratch.window.data() + kWindowLead;
  for (size_t y = 0; y < height; y += kernels.group_rows) {
    const size_t count = std::min<size_t>(kernels.group_rows, height - y);
    unfilter_group(rows + y * (size_t{width} + 1), count, width, kernels, above, window, stride);
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
