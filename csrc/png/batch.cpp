// batch.cpp - the thread pool: each thread takes the next film until none is left.
#include "batch.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <iterator>
#include <mutex>
#include <thread>
#include <vector>

namespace cxrfast::png {

namespace {

constexpr size_t kKeptFileNbytes = size_t{4} << 20;  // an NIH film is 0.7 MB at most

const char* read_reason(int error) {
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return reason::kNoSuchFile;
    case EACCES:
    case EPERM:
      return reason::kNoPermission;
    case EISDIR:
      return reason::kNotRegularFile;
    default:
      return reason::kReadError;
  }
}

Status unreadable(const char* message) { return {Code::kCorrupt, message, -1}; }

Status read_open_file(int descriptor, const Limits& limits, Buffer* buffer, size_t* file_nbytes_ret) {
  struct stat info{};
  if (fstat(descriptor, &info) != 0) return unreadable(read_reason(errno));
  if (!S_ISREG(info.st_mode)) return unreadable(reason::kNotRegularFile);
  if (static_cast<uint64_t>(info.st_size) > limits.max_memory_nbytes) {
    return {Code::kTooLarge, reason::kMemoryLimit, -1};
  }
  const auto wanted = static_cast<size_t>(info.st_size);
  if (!buffer->reserve(wanted)) return {Code::kTooLarge, reason::kOutOfMemory, -1};
  size_t done = 0;
  while (done < wanted) {  // a file that shrinks meanwhile is judged by what is left of it
    const ssize_t got = read(descriptor, buffer->data() + done, wanted - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return unreadable(read_reason(errno));
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  *file_nbytes_ret = done;
  return {};
}

}  // namespace

Status read_file(const char* path, const Limits& limits, Buffer* buffer, size_t* file_nbytes_ret) {
  // O_NONBLOCK: opening a pipe must not wait for its writer; it is then refused as no regular file.
  const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return unreadable(read_reason(errno));
  const Status status = read_open_file(descriptor, limits, buffer, file_nbytes_ret);
  close(descriptor);
  return status;
}

FilmJob* Worker::next() {
  while (true) {
    const size_t i = work_->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= work_->count) return nullptr;
    BatchFilm& film = work_->films[i];
    Place& place = *std::find_if(std::begin(places_), std::end(places_), [](const Place& p) { return !p.film; });
    static_cast<FilmJob&>(place) = {film.file, film.file_nbytes, film.out, 0, 0, {}};
    if (film.path != nullptr) {
      film.status = read_file(film.path, decoder_.limits(), &place.buffer, &place.file_nbytes);
      if (!film.status.ok()) {
        film.sum = film.sumsq = 0;
        std::memset(film.out, 0, size_t{work_->size} * work_->size);
        continue;
      }
      place.file = place.buffer.data();
    }
    place.film = &film;
    return &place;
  }
}

void Worker::finished(FilmJob& job) {
  auto& place = static_cast<Place&>(job);
  place.film->sum = job.sum;
  place.film->sumsq = job.sumsq;
  place.film->status = job.status;
  place.film = nullptr;
  place.buffer.release_above(kKeptFileNbytes);
}

struct Batch::State {
  explicit State(const Limits& limits_) : limits(limits_) {}

  const Limits limits;
  const pid_t owner = getpid();                  // fork() copies this object, but not its threads
  std::vector<std::unique_ptr<Worker>> workers;  // [0] is the calling thread's
  std::vector<std::thread> threads;              // threads[i] runs workers[i + 1]
  std::mutex call;                               // held during decode_resize

  std::mutex mutex;  // guards the next three
  std::condition_variable wake, done;
  uint64_t round = 0;  // counts calls; a thread works once for each
  size_t busy = 0;     // threads that have not finished this round
  bool stopping = false;

  Work work;  // written before `round` changes, under the mutex

  void serve(Worker& worker) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex);
    while (true) {
      wake.wait(lock, [&] { return stopping || round != seen; });
      if (stopping) return;
      seen = round;
      lock.unlock();
      worker.run(work);
      lock.lock();
      if (--busy == 0) done.notify_one();
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex);
      stopping = true;
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }
};

Batch::Batch(unsigned threads, const Limits& limits) : state_(new State(limits)) {
  for (unsigned i = 0; i < threads; ++i) state_->workers.push_back(std::make_unique<Worker>(limits));
  try {
    for (unsigned i = 1; i < threads; ++i) {
      state_->threads.emplace_back([state = state_.get(), i] { state->serve(*state->workers[i]); });
    }
  } catch (...) {
    state_->stop();
    throw;
  }
}

Batch::~Batch() {
  if (getpid() == state_->owner) {
    state_->stop();
  } else {
    state_.release();  // its threads can neither be joined nor be destroyed here
  }
}

void Batch::decode_resize(BatchFilm* films, size_t count, uint32_t size, Isa isa) {
  const std::lock_guard one_call(state_->call);
  const size_t helpers = getpid() == state_->owner ? state_->threads.size() : 0;
  {
    const std::lock_guard lock(state_->mutex);
    state_->work.films = films;
    state_->work.count = count;
    state_->work.size = size;
    state_->work.isa = isa;
    state_->work.next.store(0, std::memory_order_relaxed);
    state_->busy = helpers;
    ++state_->round;
  }
  state_->wake.notify_all();
  state_->workers[0]->run(state_->work);
  std::unique_lock lock(state_->mutex);
  state_->done.wait(lock, [&] { return state_->busy == 0; });
}

}  // namespace cxrfast::png
