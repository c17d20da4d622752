// batch.h - many films, from memory or from files, on several threads.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

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

// What a worker's films have in common while it has any under way.
struct Target {
  uint32_t size = 0;
  Isa isa = Isa::kPortable;

  bool operator==(const Target&) const = default;
};

// The films of one call. Which of them are taken and finished is the queue's to know.
struct Work {
  Work(BatchFilm* films_, size_t count_, const Target& target_) : films(films_), count(count_), target(target_) {}

  BatchFilm* const films;
  const size_t count;
  const Target target;

 private:
  friend class FilmQueue;
  size_t taken_ = 0, finished_ = 0;
};

// The calls that wait for their films, in order. Several workers share it: whoever is free takes the next film, of
// whichever call it is, so that nobody waits for the last film of a call while there is another one.
class FilmQueue {
 public:
  void add(Work& work);
  void wait_until_finished(const Work& work);  // from then on nobody holds a pointer to it

  // For workers. Each film that was taken is to be finished.
  bool first(Target* target_ret) const;  // of the next film; false: there is none
  // nullptr: the next film has another target, or there is none.
  BatchFilm* take(const Target& target, Work** work_ret);
  void finish(Work& work);  // one film of it

  // For their threads: false when the queue was closed and nothing is left in it.
  bool wait_for_films();
  void close();

 private:
  mutable std::mutex mutex_;  // guards what follows, and the numbers of the works
  std::condition_variable added_, finished_;
  std::deque<Work*> works_;  // with films that nobody has taken
  bool closed_ = false;
};

// What one thread owns. For those who have threads already (csrc/dali); Batch is a pool of its own.
class Worker final : private FilmSource {
 public:
  explicit Worker(const Limits& limits) : decoder_(limits) {}

  // Takes films, beside the other workers of the same queue, until none is left. Their results do not depend on who
  // takes them.
  void run(FilmQueue& queue);

 private:
  // A film under way. FilmJob is a base, so that a job leads back to its place.
  struct Place : FilmJob {
    BatchFilm* film = nullptr;  // nullptr: free
    Work* work = nullptr;       // whose film it is
    Buffer buffer;              // the file, where it is read here
  };

  FilmJob* next() override;
  void finished(FilmJob& job) override;

  FilmDecoder decoder_;
  Place places_[kFilmsInFlight + 1];  // one may be postponed
  FilmQueue* queue_ = nullptr;
  Target target_;
  bool draining_ = false;  // no more films until those under way are done
};

// A pool of threads, each with its own FilmDecoder. The callers wait meanwhile; several may call at once, and the pool
// goes on with the films of the next call while the last ones of a call are under way.
// A film that cannot be opened or read is kCorrupt ("cannot be read (...)"): the rest of the batch goes on.
// In a child made by fork() there are no threads: the caller does the work.
class Batch {
 public:
  // threads >= 1. Throws std::system_error when a thread cannot be started.
  Batch(unsigned threads, const Limits& limits);
  ~Batch();  // no call may be under way
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Returns when every film has its status. Results do not depend on the number of threads or on the order of films.
  void decode_resize(BatchFilm* films, size_t count, uint32_t size, Isa isa);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Reads a whole file into `buffer`. ok: file_nbytes_ret bytes at buffer.data(), kInflatePad writable ones behind them.
// kTooLarge beyond limits.max_memory_nbytes.
Status read_file(const char* path, const Limits& limits, Buffer* buffer, size_t* file_nbytes_ret);

}  // namespace cxrfast::png
