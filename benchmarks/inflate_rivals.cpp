// inflate_rivals.cpp - times inflate_zlib and its rivals on the same streams, for bench_inflate.py.
//
// argv: the number of rounds. stdin: per stream u64 in_nbytes, u64 out_nbytes, the stream, the bytes that must come
// out. stdout, one line per measurement: method, group of films, milliseconds of CPU time per film. In every round,
// every group of films goes through all methods in turn, so that whatever else the machine does hits all of them. All
// outputs are compared with the truth in a round of their own, before the clock runs. Rivals are taken where their
// libraries are installed.
#include <dlfcn.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<isa-l/igzip_lib.h>)
#include <isa-l/igzip_lib.h>
#define HAS_ISAL 1
#endif

#include "png/inflate.h"
#include "png/isa.h"

using namespace cxrfast::png;

namespace {

constexpr size_t kGroup = 20;  // films of one measurement

struct Film {
  std::vector<uint8_t> stream, truth;  // the stream is followed by kInflatePad bytes
  size_t stream_nbytes() const { return stream.size() - kInflatePad; }
};

using Outputs = std::vector<std::vector<uint8_t>>;
using Method = std::function<void(const Film* films, size_t count, Outputs& out)>;  // out: rings of buffers, see below

// As the decoder uses inflate: a stream that has ended makes room for the next one. Output i goes to out[i % size];
// what is still needed is never overwritten while out is larger than the streams under way, and all is kept when it is
// as large as count.
class Feed final : public InflateFeed {
 public:
  Feed(const Film* films, size_t count, Outputs& out) : films_(films), jobs_(count), out_(out) {}
  InflateJob* next() override {
    if (next_ == jobs_.size()) return nullptr;
    const Film& film = films_[next_];
    size_t buffer = 0;
    while (busy_[buffer]) ++buffer;
    const size_t kept = out_.size() == jobs_.size() ? next_ : buffer;
    busy_[buffer] = true;
    InflateJob& job = jobs_[next_++];
    job = {film.stream.data(), film.stream_nbytes(), out_[kept].data(), film.truth.size(), {}, 0};
    buffer_of_.emplace_back(&job, buffer);
    return &job;
  }
  void finished(InflateJob& job) override {
    if (!job.status.ok()) std::exit(4);
    for (const auto& [owner, buffer] : buffer_of_) {
      if (owner == &job) busy_[buffer] = false;
    }
  }

 private:
  const Film* films_;
  std::vector<InflateJob> jobs_;
  std::vector<std::pair<InflateJob*, size_t>> buffer_of_;
  bool busy_[kInflateStreams + 1] = {};
  Outputs& out_;
  size_t next_ = 0;
};

void each(const Film* films, size_t count, Outputs& out, const std::function<bool(const Film&, uint8_t*)>& inflate) {
  for (size_t i = 0; i < count; ++i) {
    if (!inflate(films[i], out[out.size() == count ? i : 0].data())) std::exit(5);
  }
}

template <typename Function>
Function symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_NOW);
  return handle == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(handle, name));
}

std::vector<std::pair<std::string, Method>> methods() {
  std::vector<std::pair<std::string, Method>> all;
  for (int level = 0; level <= static_cast<int>(cpu_isa()); ++level) {
    const Isa isa = static_cast<Isa>(level);
    all.emplace_back(std::string("cxrfast ") + isa_name(isa), [isa](const Film* films, size_t count, Outputs& out) {
      Feed feed(films, count, out);
      inflate_zlib(feed, isa);
    });
  }
  const auto allocate = symbol<void* (*)()>("libdeflate.so.0", "libdeflate_alloc_decompressor");
  const auto libdeflate = symbol<int (*)(void*, const void*, size_t, void*, size_t, size_t*)>(
      "libdeflate.so.0", "libdeflate_zlib_decompress");
  if (allocate != nullptr && libdeflate != nullptr) {
    void* decompressor = allocate();
    all.emplace_back("libdeflate", [=](const Film* films, size_t count, Outputs& out) {
      each(films, count, out, [=](const Film& film, uint8_t* to) {
        return libdeflate(decompressor, film.stream.data(), film.stream_nbytes(), to, film.truth.size(), nullptr) == 0;
      });
    });
  }
  const auto uncompress =
      symbol<int (*)(uint8_t*, unsigned long*, const uint8_t*, unsigned long)>("libz.so.1", "uncompress");
  if (uncompress != nullptr) {
    all.emplace_back("zlib", [=](const Film* films, size_t count, Outputs& out) {
      each(films, count, out, [=](const Film& film, uint8_t* to) {
        unsigned long nbytes = film.truth.size();
        return uncompress(to, &nbytes, film.stream.data(), film.stream_nbytes()) == 0;
      });
    });
  }
#ifdef HAS_ISAL
  const auto start = symbol<void (*)(inflate_state*)>("libisal.so.2", "isal_inflate_init");
  const auto isal = symbol<int (*)(inflate_state*)>("libisal.so.2", "isal_inflate_stateless");
  if (start != nullptr && isal != nullptr) {
    all.emplace_back("ISA-L without Adler-32", [=](const Film* films, size_t count, Outputs& out) {
      each(films, count, out, [=](const Film& film, uint8_t* to) {
        static inflate_state state;
        start(&state);
        state.next_in = const_cast<uint8_t*>(film.stream.data()) + 2;
        state.avail_in = static_cast<uint32_t>(film.stream_nbytes() - 2);
        state.next_out = to;
        state.avail_out = static_cast<uint32_t>(film.truth.size());
        state.crc_flag = ISAL_DEFLATE;
        return isal(&state) == ISAL_DECOMP_OK;
      });
    });
  }
#endif
  return all;
}

double cpu_ms() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
}

}  // namespace

int main(int, char** argv) {
  std::vector<Film> films;
  size_t largest = 0;
  for (uint64_t sizes[2]; std::fread(sizes, sizeof *sizes, 2, stdin) == 2;) {
    Film& film = films.emplace_back();
    film.stream.resize(sizes[0] + kInflatePad);
    film.truth.resize(sizes[1]);
    if (std::fread(film.stream.data(), 1, sizes[0], stdin) != sizes[0]) return 2;
    if (std::fread(film.truth.data(), 1, sizes[1], stdin) != sizes[1]) return 2;
    largest = std::max<size_t>(largest, sizes[1]);
  }
  const auto all = methods();
  const auto group_size = [&](size_t first) { return std::min(kGroup, films.size() - first); };
  for (size_t first = 0; first < films.size(); first += kGroup) {
    for (const auto& [name, method] : all) {
      Outputs out(group_size(first), std::vector<uint8_t>(largest + kInflatePad));
      method(films.data() + first, out.size(), out);
      for (size_t i = 0; i < out.size(); ++i) {
        const std::vector<uint8_t>& truth = films[first + i].truth;
        if (std::memcmp(out[i].data(), truth.data(), truth.size()) != 0) return 6;
      }
    }
  }
  Outputs out(kInflateStreams + 1, std::vector<uint8_t>(largest + kInflatePad));
  for (int round = std::atoi(argv[1]); round > 0; --round) {
    for (size_t first = 0; first < films.size(); first += kGroup) {
      const size_t count = group_size(first);
      if (count <= out.size()) continue;  // too few to be told from a ring that keeps all
      for (const auto& [name, method] : all) {
        const double start = cpu_ms();
        method(films.data() + first, count, out);
        std::printf("%s\t%zu\t%.5f\n", name.c_str(), first / kGroup, (cpu_ms() - start) / static_cast<double>(count));
      }
    }
  }
}
