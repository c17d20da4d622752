// pixel_levels.cpp - times of un-filter and resample at each level, for bench_pixels.py.
//
// stdin: films of 8-bit grey, each width, height (uint32) and its filtered rows. Arguments: the size of the result,
// rounds. stdout: lines "method TAB film TAB ms", CPU time of the thread. Methods take turns on each film; before every
// one of them the film's rows are copied, as inflate would just have written them.
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "png/resample.h"
#include "png/unfilter.h"

using namespace cxrfast::png;

namespace {

double now_ms() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) * 1e-6;
}

struct Film {
  uint32_t width, height;
  std::vector<uint8_t> rows;
};

// The wavefront alone, into a window that is used again.
void unfilter_only(const Film& film, const uint8_t* rows, const PixelKernels& kernels, std::vector<uint8_t>& window,
                   std::vector<uint8_t>& above) {
  const size_t width = film.width, stride = (kWindowLead + width + kWindowTail + 127) / 128 * 128 + 64;
  window.resize(stride * kernels.group_rows);
  above.assign(kAboveLead + width + kAboveTail, 0xff);
  for (size_t y = 0; y < film.height; y += kernels.group_rows) {
    const size_t count = film.height - y < kernels.group_rows ? film.height - y : kernels.group_rows;
    kernels.unfilter_rows(rows + y * (width + 1), count, width, above.data() + kAboveLead, window.data() + kWindowLead,
                          stride);
  }
}

}  // namespace

int main(int, char** arguments) {
  const uint32_t size = static_cast<uint32_t>(std::atoi(arguments[1]));
  const int rounds = std::atoi(arguments[2]);
  std::vector<Film> films;
  for (uint32_t sides[2]; std::fread(sides, sizeof sides, 1, stdin) == 1;) {
    Film film{sides[0], sides[1], std::vector<uint8_t>(size_t{sides[1]} * (sides[0] + 1) + kPixelPad)};
    if (std::fread(film.rows.data(), film.rows.size() - kPixelPad, 1, stdin) != 1) return 1;
    films.push_back(std::move(film));
  }

  Scratch scratch;
  RowGroups groups;
  std::vector<uint8_t> rows, window, above, out(size_t{size} * size), plain(out.size());
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < films.size(); ++i) {
      const Film& film = films[i];
      const Resampler resampler(film.width, film.height, size);
      const auto time = [&](const std::string& method, const std::function<void()>& run) {
        rows = film.rows;
        const double start = now_ms();
        run();
        std::printf("%s\t%zu\t%.6f\n", method.c_str(), i, now_ms() - start);
      };
      time("plain un-filter", [&] { unfilter(rows.data(), film.height, film.width, 1); });
      std::vector<uint8_t> grey = rows;
      for (int level = 0; level <= static_cast<int>(cpu_isa()); ++level) {
        const Isa isa = static_cast<Isa>(level);
        const std::string name = isa_name(isa);
        time(name + " un-filter", [&] { unfilter_only(film, rows.data(), pixel_kernels(isa), window, above); });
        time(name + " resample",
             [&] { resample(resampler, grey.data() + 1, size_t{film.width} + 1, plain.data(), groups, scratch, isa); });
        time(name + " both", [&] {
          PixelJob job;
          job.rows = rows.data();
          job.resampler = &resampler;
          job.out = out.data();
          unfilter_resample_grey8(job, groups, scratch, isa);
        });
        if (out != plain) return 1;  // two ways that share no un-filter
      }
    }
  }
  return 0;
}
