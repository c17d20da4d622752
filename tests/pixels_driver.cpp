// pixels_driver.cpp - un-filter and resample behind a C interface, so that test_pixels.py can call them through ctypes.
#include <cstring>

#include "png/resample.h"
#include "png/unfilter.h"

using namespace cxrfast::png;

extern "C" {

struct Ending {
  int32_t code;
  int64_t offset, sum, sumsq;
};

size_t pixel_pad() { return kPixelPad; }

int best_level() { return static_cast<int>(best_isa()); }

void run_unfilter(uint8_t* rows, uint32_t height, size_t row_nbytes, int bpp, Ending* ending) {
  const Status status = unfilter(rows, height, row_nbytes, bpp);
  *ending = {static_cast<int32_t>(status.code), status.offset, 0, 0};
}

void run_resample(const uint8_t* grey, uint32_t width, uint32_t height, size_t stride_bytes, uint32_t size,
                  uint8_t* out, int isa) {
  Scratch scratch;
  resample(Resampler(width, height, size), grey, stride_bytes, out, scratch, static_cast<Isa>(isa));
}

// count films of one size of result; rows, widths, heights, outs and endings have one entry each.
void run_films(uint8_t** rows, const uint32_t* widths, const uint32_t* heights, uint32_t size, uint8_t** outs,
               size_t count, int isa, Ending* endings) {
  std::vector<Resampler> resamplers;
  std::vector<PixelJob> jobs(count);
  for (size_t i = 0; i < count; ++i) resamplers.emplace_back(widths[i], heights[i], size);
  for (size_t i = 0; i < count; ++i) {
    jobs[i].rows = rows[i];
    jobs[i].width = widths[i];
    jobs[i].height = heights[i];
    jobs[i].resampler = &resamplers[i];
    jobs[i].out = outs[i];
  }
  Scratch scratch;
  unfilter_resample_grey8(jobs.data(), count, scratch, static_cast<Isa>(isa));
  for (size_t i = 0; i < count; ++i) {
    endings[i] = {static_cast<int32_t>(jobs[i].status.code), jobs[i].status.offset, jobs[i].sum, jobs[i].sumsq};
  }
}

}  // extern "C"
