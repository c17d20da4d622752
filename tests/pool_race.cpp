// pool_race.cpp - the thread pool under ThreadSanitizer: pools of one to five threads, films from memory and from
// files, two callers of one pool at once, of one size and of two. Arguments: PNG files, good and bad. Exit code 0:
// every result was the one thread's.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "png/batch.h"

using namespace cxrfast::png;

namespace {

struct Call {
  std::vector<BatchFilm> films;
  std::vector<uint8_t> images;
};

// Every second film is read by the pool, the others are in memory.
Call decode(Batch& pool, const std::vector<const char*>& paths, const std::vector<std::vector<uint8_t>>& files,
            uint32_t size) {
  const size_t image_nbytes = size_t{size} * size;
  Call call;
  call.films.resize(paths.size());
  call.images.assign(paths.size() * image_nbytes, 1);
  for (size_t i = 0; i < paths.size(); ++i) {
    call.films[i].out = call.images.data() + i * image_nbytes;
    call.films[i].path = i % 2 == 0 ? paths[i] : nullptr;
    call.films[i].file = files[i].data();
    call.films[i].file_nbytes = files[i].size();
  }
  pool.decode_resize(call.films.data(), call.films.size(), size, best_isa());
  return call;
}

bool same(const Call& one, const Call& other) {
  for (size_t i = 0; i < one.films.size(); ++i) {
    const BatchFilm &a = one.films[i], &b = other.films[i];
    if (a.sum != b.sum || a.status.code != b.status.code || a.status.offset != b.status.offset) return false;
  }
  return one.images == other.images;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<const char*> paths(argv + 1, argv + argc);
  std::vector<std::vector<uint8_t>> files;
  for (const char* path : paths) {
    Buffer buffer;
    size_t nbytes = 0;
    read_file(path, Limits{}, &buffer, &nbytes);
    files.emplace_back(buffer.data(), buffer.data() + nbytes);
  }
  Batch alone(1, Limits{});
  const Call expected = decode(alone, paths, files, 24), smaller = decode(alone, paths, files, 9);
  bool right = true;
  for (unsigned threads = 1; threads <= 5; ++threads) {
    Batch pool(threads, Limits{});
    for (int round = 0; round < 20; ++round) {
      const bool of_one_size = round % 2 == 0;
      Call others;
      std::thread second([&] { others = decode(pool, paths, files, of_one_size ? 24 : 9); });
      const Call own = decode(pool, paths, files, 24);
      second.join();
      right = right && same(own, expected) && same(others, of_one_size ? expected : smaller);
    }
  }
  if (!right) std::fputs("results differ\n", stderr);
  return right ? 0 : 1;
}
