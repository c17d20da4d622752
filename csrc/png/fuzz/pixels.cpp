// pixels.cpp - fuzz target: un-filter and resample against the plainest way to
// do both, at any level.
//
// Input: width, height, size (two bytes each, folded into small ranges), then
// filtered rows; missing bytes count as zeros.
#include <algorithm>
#include <cmath>
#include <vector>

#include "png/fuzz/guarded.h"
#include "png/resample.h"
#include "png/unfilter.h"

using namespace cxrfast::png;
using cxrfast::png::fuzz::draw;
using cxrfast::png::fuzz::Guarded;
using cxrfast::png::fuzz::require;

namespace {

constexpr uint32_t kMaxSide = 300, kMaxPixels = 6000, kSizes = 80;
constexpr size_t kMaxRows = kMaxPixels + 2 * kMaxSide;
constexpr size_t kFilms = 3;

Guarded* rows_of[kFilms];
Guarded* outs[kFilms];

int paeth(int a, int b, int c) {
  const int p = a + b - c, pa = std::abs(p - a), pb = std::abs(p - b), pc = std::abs(p - c);
  return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

// PNG specification, section 9.2, one byte at a time. False at a filter byte
// above 4.
bool plain_unfilter(const std::vector<uint8_t>& rows, uint32_t width, uint32_t height, std::vector<uint8_t>* grey) {
  grey->assign(size_t{width} * height, 0);
  for (uint32_t y = 0; y < height; ++y) {
    const uint8_t* row = rows.data() + size_t{y} * (width + 1);
    for (uint32_t x = 0; x < width; ++x) {
      const auto at = [&](uint32_t column, uint32_t line) { return int{(*grey)[size_t{line} * width + column]}; };
      const int a = x > 0 ? at(x - 1, y) : 0, b = y > 0 ? at(x, y - 1) : 0;
      const int c = x > 0 && y > 0 ? at(x - 1, y - 1) : 0;
      const int predicted[] = {0, a, b, (a + b) / 2, paeth(a, b, c)};
      if (row[0] > 4) return false;
      (*grey)[size_t{y} * width + x] = static_cast<uint8_t>(row[1 + x] + predicted[row[0]]);
    }
  }
  return true;
}

// One pass of Pillow's bilinear resize: for each output pixel the weights of a
// triangle, as 22-bit fixed point. columns/lines are those of the source;
// `along` says how far apart two pixels of the axis lie.
void plain_pass(const std::vector<uint8_t>& source, uint32_t in, uint32_t out, uint32_t others, size_t along_source,
                size_t across_source, size_t along_target, size_t across_target, std::vector<uint8_t>* target) {
  if (in == out) {
    *target = source;
    return;
  }
  target->assign(size_t{out} * others, 0);
  const double scale = static_cast<double>(in) / out, filter_scale = std::max(scale, 1.0);
  for (uint32_t o = 0; o < out; ++o) {
    const double center = (o + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - filter_scale + 0.5), 0);
    const int last = std::min(static_cast<int>(center + filter_scale + 0.5), static_cast<int>(in));
    static std::vector<double> weights;
    weights.clear();
    double total = 0;
    for (int i = first; i < last; ++i) {
      const double distance = std::abs((i - center + 0.5) * (1.0 / filter_scale));
      weights.push_back(distance < 1 ? 1 - distance : 0);
      total += weights.back();
    }
    static std::vector<int64_t> fixed;
    fixed.clear();
    for (const double weight : weights) {
      fixed.push_back(static_cast<int64_t>((total != 0 ? weight / total : weight) * (1 << 22) + 0.5));
    }
    for (uint32_t other = 0; other < others; ++other) {
      int64_t sum = 1 << 21;
      for (size_t k = 0; k < fixed.size(); ++k) {
        sum += fixed[k] * source[(static_cast<size_t>(first) + k) * along_source + other * across_source];
      }
      (*target)[o * along_target + other * across_target] =
          static_cast<uint8_t>(std::clamp<int64_t>(sum >> 22, 0, 255));
    }
  }
}

std::vector<uint8_t> plain_resample(const std::vector<uint8_t>& grey, uint32_t width, uint32_t height, uint32_t size,
                                    bool vertical_first) {
  std::vector<uint8_t> halved, image;
  if (vertical_first) {
    plain_pass(grey, height, size, width, width, 1, width, 1, &halved);
    plain_pass(halved, width, size, size, 1, width, 1, size, &image);
  } else {
    plain_pass(grey, width, size, height, 1, width, 1, size, &halved);
    plain_pass(halved, height, size, size, size, 1, size, 1, &image);
  }
  return image;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  for (size_t i = 0; i < kFilms; ++i) {
    rows_of[i] = new Guarded(kMaxRows + kPixelPad);
    outs[i] = new Guarded(size_t{kSizes + 8} * (kSizes + 8));
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  if (nbytes < 6) return 0;
  const auto word = [&](size_t i) { return static_cast<uint32_t>(data[i] | data[i + 1] << 8); };
  const uint32_t width = 1 + word(0) % kMaxSide;
  const uint32_t height = 1 + word(2) % std::min(kMaxSide, kMaxPixels / width);
  const uint32_t size = 8 + word(4) % kSizes;

  std::vector<uint8_t> rows(size_t{height} * (width + 1));
  std::copy_n(data + 6, std::min(nbytes - 6, rows.size()), rows.begin());
  for (uint32_t y = 0; y < height; ++y) {  // mostly valid filters; 255 stays as it is
    uint8_t& filter = rows[size_t{y} * (width + 1)];
    if (filter != 255) filter %= 5;
  }
  static std::vector<uint8_t> grey;
  const bool valid = plain_unfilter(rows, width, height, &grey);
  const Resampler resampler(width, height, size);
  std::vector<uint8_t> image;
  if (valid) image = plain_resample(grey, width, height, size, resampler.vertical_first);
  int64_t sum = 0, sumsq = 0;
  for (const uint8_t pixel : image) sum += pixel, sumsq += pixel * pixel;

  static Scratch scratch;
  const uint32_t turn = draw(data, nbytes);
  const Isa isa = static_cast<Isa>(turn % (static_cast<uint32_t>(cpu_isa()) + 1));
  PixelJob jobs[kFilms];
  static RowGroups groups[kFilms];
  const size_t films = 1 + turn / 8 % kFilms;
  for (size_t i = 0; i < films; ++i) {
    jobs[i].rows = rows_of[i]->before_guard(rows.size() + kPixelPad);
    std::copy(rows.begin(), rows.end(), jobs[i].rows);
    jobs[i].resampler = &resampler;
    jobs[i].out = outs[i]->before_guard(size_t{size} * size);
  }
  if (films > 1 && !resampler.vertical_first) {  // films whose rows come a few at a time, in turns
    for (size_t i = 0; i < films; ++i) require(groups[i].begin(resampler, scratch, isa), "there is memory");
    const size_t step = RowGroups::group_rows(isa) * (1 + turn / 256 % 3);
    for (size_t y = 0; y < height; y += step) {
      for (size_t i = 0; i < films; ++i) {
        groups[i].add_filtered(jobs[i].rows + y * (width + 1), std::min<size_t>(step, height - y));
      }
    }
    for (size_t i = 0; i < films; ++i) {
      jobs[i].status = groups[i].finish(jobs[i].out);
      if (valid) sum_pixels(jobs[i].out, size_t{size} * size, &jobs[i].sum, &jobs[i].sumsq, isa);
    }
  } else {
    for (size_t i = 0; i < films; ++i) unfilter_resample_grey8(jobs[i], groups[i], scratch, isa);
  }
  for (size_t i = 0; i < films; ++i) {
    require(jobs[i].status.ok() == valid, "a filter byte above 4 is refused, others are not");
    if (!valid) continue;
    require(std::equal(image.begin(), image.end(), jobs[i].out), "the image is the reference's");
    require(jobs[i].sum == sum && jobs[i].sumsq == sumsq, "so are the sums");
  }
  if (valid && turn / 32 % 4 == 0) {
    uint8_t* out = outs[0]->before_guard(image.size());
    require(resample(resampler, grey.data(), width, out, groups[0], scratch, isa).ok(), "resample works");
    require(std::equal(image.begin(), image.end(), out), "resample alone gives the same");
  }

  // The general un-filter, at the distance of one byte.
  require(unfilter(rows.data(), height, width, 1).ok() == valid, "unfilter gives the same verdict");
  if (valid) {
    for (uint32_t y = 0; y < height; ++y) {
      require(std::equal(rows.begin() + y * (width + 1) + 1, rows.begin() + (y + 1) * (width + 1),
                         grey.begin() + y * width),
              "unfilter gives the same rows");
    }
  }
  return 0;
}
