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

// An output pixel's reach is at most 2 scale + 2 pixels wide and may begin and end in the middle of a cell.
constexpr uint64_t most_weights(uint64_t in, uint64_t out) { return 2 * in + 2 * out; }
constexpr uint64_t most_cells(uint64_t in, uint64_t out, uint64_t taps) {
  return most_weights(in, out) / taps + 2 * out;
}

// The words of one cell, its digits from the highest on: two 16-bit numbers each or four 8-bit ones.
void append_cell(const uint32_t* weights, size_t taps, std::vector<int32_t>& words) {
  const size_t digits = digits_of(taps), bits = 32 / taps;
  uint32_t word[3] = {};
  for (size_t i = 0; i < taps; ++i) {
    uint32_t rest = weights[i];
    for (size_t d = digits - 1; d > 0; --d) {
      const uint32_t digit = rest & ((1u << kDigitBits) - 1);
      word[d] |= digit << i * bits;
      rest >>= kDigitBits;
      if (taps == 4) rest += digit >> (kDigitBits - 1);  // as a signed number the digit is 256 less
    }
    word[0] |= rest << i * bits;
  }
  for (size_t d = 0; d < digits; ++d) words.push_back(static_cast<int32_t>(word[d]));
}

PackedWeights packed(const Axis& axis, size_t taps) {
  PackedWeights result;
  result.spans.reserve(axis.out);
  result.words.reserve(most_cells(axis.in, axis.out, taps) * digits_of(taps));
  for (const Axis::Reach& reach : axis.reaches) {
    const size_t end = reach.first + reach.count, first_cell = reach.first / taps;
    const size_t cells = (end + taps - 1) / taps - first_cell;
    result.spans.push_back({static_cast<uint32_t>(first_cell), static_cast<uint32_t>(cells), result.words.size()});
    for (size_t x = first_cell * taps; x < end; x += taps) {
      uint32_t weights[4] = {};
      for (size_t i = 0; i < taps; ++i) {
        if (x + i >= reach.first && x + i < end) weights[i] = axis.weights[reach.weights_at + x + i - reach.first];
      }
      append_cell(weights, taps, result.words);
    }
    result.longest_span = std::max(result.longest_span, static_cast<uint32_t>(cells));
  }
  return result;
}

}  // namespace

Axis::Axis(uint32_t in_, uint32_t out_) : in(in_), out(out_) {
  // Every step in double and in this order: the bits of the weights are part of the contract.
  const double scale = static_cast<double>(in) / out;
  const double reach = std::max(scale, 1.0);  // half the width of the triangle, source pixels
  const double shrink = 1.0 / reach;
  reaches.reserve(out);
  weights.reserve(most_weights(in, out));
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
    reaches.push_back({first, end - first, weights.size()});
    for (const double weight : exact) weights.push_back(static_cast<uint32_t>(0.5 + weight / sum * (1 << kWeightBits)));
  }
  pairs = packed(*this, 2);
  fours = packed(*this, 4);
}

Resampler::Resampler(uint32_t in_w, uint32_t in_h, uint32_t size) : horizontal(in_w, size), vertical(in_h, size) {
  const int64_t shrink_w = int64_t{in_w} - size, shrink_h = int64_t{in_h} - size;
  vertical_first = shrink_h > 0 && shrink_h > 2 * shrink_w;
}

namespace {

constexpr Status kNoMemory = {Code::kTooLarge, reason::kOutOfMemory, -1};

constexpr size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr size_t kCachedTile = size_t{1} << 15;

const PackedWeights& weights_for(const PixelKernels& kernels, const Axis& axis) {
  return kernels.taps == 4 ? axis.fours : axis.pairs;
}

// What the kernels ask for; apart from that, as much as the first-level cache holds beside the rest.
constexpr size_t tile_nbytes(size_t group_rows, size_t taps, size_t longest_span) {
  return 4 * group_rows * std::max(kCachedTile / (4 * group_rows), 2 * longest_span + 2 * kBlockColumns / taps);
}

size_t tile_nbytes(const PixelKernels& kernels, const Axis& axis) {
  return tile_nbytes(kernels.group_rows, kernels.taps, weights_for(kernels, axis).longest_span);
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
  for (const Axis::Reach& rows : vertical.reaches) {
    std::fill_n(sums, width, kHalf);
    for (size_t i = 0; i < rows.count; ++i) {
      const uint32_t weight = vertical.weights[rows.weights_at + i];
      const uint8_t* row = grey + (rows.first + i) * stride_bytes;
      for (size_t x = 0; x < width; ++x) sums[x] += weight * row[x];
    }
    for (size_t x = 0; x < width; ++x) halved[x] = static_cast<uint8_t>(std::min(sums[x] >> kWeightBits, 255u));
    for (const Axis::Reach& columns : horizontal.reaches) {
      uint32_t sum = kHalf;
      for (size_t i = 0; i < columns.count; ++i) {
        sum += horizontal.weights[columns.weights_at + i] * halved[columns.first + i];
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
  if (!scratch_->tile.reserve(std::max(tile_nbytes(*kernels_, horizontal), tile_nbytes(*kernels_, vertical)))) {
    status_ = kNoMemory;
  }
  return status_.ok();
}

void RowGroups::add_filtered(const uint8_t* rows, size_t count) {
  const size_t width = resampler_->horizontal.in;
  if (status_.ok()) status_ = check_filters(rows, width, y_, count);
  if (!status_.ok() || !reserve_scratch()) return;
  const Axis& horizontal = resampler_->horizontal;
  for (size_t k = 0; k < count; k += kernels_->group_rows) {
    const size_t group = std::min(kernels_->group_rows, count - k);
    kernels_->unfilter_resample(rows + k * (width + 1), group, width, above_.data() + kAboveLead,
                                weights_for(*kernels_, horizontal), halved_.data() + y_,
                                halved_stride(resampler_->vertical.in), scratch_->tile.data(),
                                tile_nbytes(*kernels_, horizontal));
    y_ += group;
  }
}

void RowGroups::add_grey(const uint8_t* grey, size_t stride_bytes, size_t count) {
  const Axis& horizontal = resampler_->horizontal;
  const size_t stride = window_stride(horizontal.in);
  if (!reserve_scratch()) return;
  if (!scratch_->window.reserve(kernels_->group_rows * stride)) {
    status_ = kNoMemory;
    return;
  }
  uint8_t* window = scratch_->window.data();
  for (size_t k = 0; k < count; k += kernels_->group_rows) {
    const size_t group = std::min(kernels_->group_rows, count - k);
    // Copied, because the caller's rows end where they end.
    for (size_t i = 0; i < group; ++i) std::memcpy(window + i * stride, grey + (k + i) * stride_bytes, horizontal.in);
    kernels_->resample_lines(weights_for(*kernels_, horizontal), window, stride, group, halved_.data() + y_,
                             halved_stride(resampler_->vertical.in), scratch_->tile.data(),
                             tile_nbytes(*kernels_, horizontal));
    y_ += group;
  }
}

Status RowGroups::finish(uint8_t* out) {
  if (!status_.ok() || !reserve_scratch()) return status_;
  const Axis& vertical = resampler_->vertical;
  kernels_->resample_lines(weights_for(*kernels_, vertical), halved_.data(), halved_stride(vertical.in), vertical.out,
                           out, vertical.out, scratch_->tile.data(), tile_nbytes(*kernels_, vertical));
  return {};
}

void RowGroups::release_above(size_t nbytes) {
  halved_.release_above(nbytes);
  above_.release_above(nbytes);
}

uint64_t resample_nbytes(uint32_t width, uint32_t height, uint32_t size) {
  uint64_t nbytes = unfilter_nbytes(width) + size * halved_stride(height) + kCachedTile + 4 * uint64_t{width};
  for (const uint64_t side : {width, height}) {
    nbytes += most_weights(side, size) * sizeof(uint32_t) + size * (sizeof(Axis::Reach) + 2 * sizeof(OutputSpan));
    for (const uint64_t taps : {2, 4}) nbytes += most_cells(side, size, taps) * digits_of(taps) * sizeof(int32_t);
  }
  const uint64_t longest_side = std::max(width, height);
  uint64_t tile = 0;  // four taps go with groups of kMaxGroupRows, two with half of them
  for (const uint64_t taps : {2, 4}) {
    const uint64_t longest_span = most_cells(longest_side, size, taps) / size + 1;
    tile = std::max<uint64_t>(tile, tile_nbytes(kMaxGroupRows * taps / 4, taps, longest_span));
  }
  return nbytes + tile;
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
    kernels.unfilter_rows(rows + y * (size_t{width} + 1), count, width, above.data() + kAboveLead, window, stride);
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
