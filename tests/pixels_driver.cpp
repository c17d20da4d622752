// pixels_driver.cpp - un-filter and resample for test_pixels.py: as a library through ctypes, and as a command that
// reads films from stdin, so that a build with sanitizers sees buffers of exactly the promised sizes.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>

#include "png/resample.h"
#include "png/unfilter.h"

using namespace cxrfast::png;

extern "C" {

struct Ending {
  int32_t code;
  int64_t offset, sum, sumsq;
};

size_t pixel_pad() { return kPixelPad; }

int cpu_level() { return static_cast<int>(cpu_isa()); }

// nbytes bytes that end where a page ends that may not be touched. 0 when memory ran out.
size_t guarded(size_t nbytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (nbytes + page - 1) / page * page;
  void* const start = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(static_cast<uint8_t*>(start) + whole, page, PROT_NONE) != 0) return 0;
  return reinterpret_cast<size_t>(start) + whole - nbytes;
}

void unguard(uint8_t* bytes, size_t nbytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (nbytes + page - 1) / page * page;
  munmap(bytes + nbytes - whole, whole + page);
}

void run_unfilter(uint8_t* rows, uint32_t height, size_t row_nbytes, int bpp, Ending* ending) {
  const Status status = unfilter(rows, height, row_nbytes, bpp);
  *ending = {static_cast<int32_t>(status.code), status.offset, 0, 0};
}

// The wavefront alone. rows as in a PixelJob, all filter bytes valid; grey: height * width.
void run_wavefront(const uint8_t* rows, uint32_t height, size_t width, uint8_t* grey, int level) {
  const PixelKernels& kernels = pixel_kernels(static_cast<Isa>(level));
  const size_t stride = kWindowLead + width + kWindowTail;
  std::vector<uint8_t> window(kernels.group_rows * stride), above(kAboveLead + width + kAboveTail, 0xff);
  for (size_t y = 0; y < height; y += kernels.group_rows) {
    const size_t count = height - y < kernels.group_rows ? height - y : kernels.group_rows;
    kernels.unfilter_rows(rows + y * (width + 1), count, width, above.data() + kAboveLead, window.data() + kWindowLead,
                          stride);
    for (size_t k = 0; k < count; ++k) {
      std::memcpy(grey + (y + k) * width, window.data() + kWindowLead + k * stride, width);
    }
  }
}

void run_resample(const uint8_t* grey, uint32_t width, uint32_t height, size_t stride_bytes, uint32_t size,
                  uint8_t* out, int level) {
  Scratch scratch;
  RowGroups groups;
  resample(Resampler(width, height, size), grey, stride_bytes, out, groups, scratch, static_cast<Isa>(level));
}

// count films of one size of result; rows, widths, heights, outs and endings have one entry each.
void run_films(uint8_t* const* rows, const uint32_t* widths, const uint32_t* heights, uint32_t size,
               uint8_t* const* outs, size_t count, int level, Ending* endings) {
  static thread_local Scratch scratch;  // used again with other sizes, as decoders do
  static thread_local RowGroups groups;
  for (size_t i = 0; i < count; ++i) {
    const Resampler resampler(widths[i], heights[i], size);
    PixelJob job;
    job.rows = rows[i];
    job.resampler = &resampler;
    job.out = outs[i];
    unfilter_resample_grey8(job, groups, scratch, static_cast<Isa>(level));
    endings[i] = {static_cast<int32_t>(job.status.code), job.status.offset, job.sum, job.sumsq};
  }
}

}  // extern "C"

namespace {

struct Header {
  uint32_t level, width, height, size;
};

bool read_exactly(void* to, size_t nbytes) { return std::fread(to, 1, nbytes, stdin) == nbytes; }

}  // namespace

// stdin: films, each a Header and its rows. stdout: for each film its Ending, its image by run_films and, where the
// film is whole, its image by unfilter and run_resample. With an argument: the level of this CPU, instead.
int main(int count, char**) {
  if (count > 1) return std::printf("%d\n", cpu_level()) < 0;
  Header header;
  while (read_exactly(&header, sizeof header)) {
    const size_t width = header.width, rows_nbytes = header.height * (width + 1),
                 pixels = size_t{header.size} * header.size;
    const std::unique_ptr<uint8_t[]> rows(new uint8_t[rows_nbytes + kPixelPad]), plain(new uint8_t[rows_nbytes]);
    const std::unique_ptr<uint8_t[]> out(new uint8_t[pixels]);
    if (!read_exactly(rows.get(), rows_nbytes)) return 1;
    std::memcpy(plain.get(), rows.get(), rows_nbytes);
    uint8_t* const row = rows.get();
    uint8_t* const image = out.get();
    Ending ending;
    run_films(&row, &header.width, &header.height, header.size, &image, 1, static_cast<int>(header.level), &ending);
    std::fwrite(&ending, sizeof ending, 1, stdout);
    if (ending.code != 0) continue;
    std::fwrite(image, 1, pixels, stdout);
    run_unfilter(plain.get(), header.height, width, 1, &ending);
    run_resample(plain.get() + 1, header.width, header.height, width + 1, header.size, image,
                 static_cast<int>(header.level));
    std::fwrite(image, 1, pixels, stdout);
  }
  return 0;
}
