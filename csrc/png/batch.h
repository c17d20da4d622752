// batch.h - many films, from memory or from files, on several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "decode_resize.h"

namespace cxrfast::png {

struct BatchFilm {
  const char* path = nullptr;     // read by the thread that decodes it, when not null
  const uint8_t* file = nullptr;  // otherwise the file's bytes
  size_t file_nbytes = 0;
  uint8_t* out = nullptr;  // as in FilmJob, and so are the next three
  int64_t sum = 0;
  int64_t sumsq = 0;
  Status status;
};

// The films of one call; `next` is shared by the threads, the rest is read only.
struct Work {
  BatchFilm* films = nullptr;
  size_t count = 0;
  uint32_t size = 0;
  Isa isa = Isa::kPortable;
  std::atomic<size_t> next{0};
};

// What one thread owns. For those who have threads already (csrc/dali); Batch is a pool of its own.
class Worker final : private FilmSource {
 public:
  explicit Worker(const Limits& limits) : decoder_(limits) {}

  // Takes films, beside the other workers of the same work, until none is left. Their results do not depend on who
  // takes them.
  void run(Work& work) {
    work_ = &work;
    decoder_.decode_resize(*this, work.size, work.isa);
  }

 private:
  // A film under way. FilmJob is a base, so that a job leads back to its place.
  struct Place : FilmJob {
    BatchFilm* film = nullptr;  // nullptr: free
    Buffer buffer;              // the file, where it is read here
  };

  FilmJob* next() override;
  void finished(FilmJob& job) override;

  FilmDecoder decoder_;
  Place places_[kFilmsInFlight + 1];  // one may be postponed
  Work* work_ = nullptr;
};

// A pool of threads, each with its own FilmDecoder. The calling thread is one of them, so a pool of one starts none.
// A film that cannot be opened or read is kCorrupt ("cannot be read (...)"): the rest of the batch goes on.
// One call at a time: a second one waits. In a child made by fork() the pool has the calling thread only.
class Batch {
 public:
  // threads >= 1. Throws std::system_error when a thread cannot be started.
  Batch(unsigned threads, const Limits& limits);
  ~Batch();
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Returns when every film has its status. Results do not depend on the number of threads or on the order of films.
  void decode_resize(BatchFilm* films, size_t count, uint32_t size, Isa isa);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Reads a whole file into `buffer`. ok: file_nbytes_ret bytes at buffer.data(). kTooLarge beyond
// limits.max_memory_nbytes.
Status read_file(const char* path, const Limits& limits, Buffer* buffer, size_t* file_nbytes_ret);

}  // namespace cxrfast::png
