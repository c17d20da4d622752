// batch.cpp - the queue of films, and the threads that take the next one until none is left.
#include "batch.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
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
  if (!buffer->reserve(wanted + kInflatePad)) return {Code::kTooLarge, reason::kOutOfMemory, -1};
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

void FilmQueue::add(Work& work) {
  if (work.count == 0) return;
  {
    const std::lock_guard lock(mutex_);
    works_.push_back(&work);
  }
  added_.notify_all();
}

void FilmQueue::wait_until_finished(const Work& work) {
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [&] { return work.finished_ == work.count; });
}

bool FilmQueue::first(Target* target_ret) const {
  const std::lock_guard lock(mutex_);
  if (works_.empty()) return false;
  *target_ret = works_.front()->target;
  return true;
}

BatchFilm* FilmQueue::take(const Target& target, Work** work_ret) {
  const std::lock_guard lock(mutex_);
  if (works_.empty() || works_.front()->target != target) return nullptr;
  Work& work = *works_.front();
  BatchFilm* const film = work.films + work.taken_++;
  if (work.taken_ == work.count) works_.pop_front();
  *work_ret = &work;
  return film;
}

void FilmQueue::finish(Work& work) {
  const std::lock_guard lock(mutex_);  // held while notifying: the work and, with it, the queue may be gone afterwards
  if (++work.finished_ == work.count) finished_.notify_all();
}

bool FilmQueue::wait_for_films() {
  std::unique_lock lock(mutex_);
  added_.wait(lock, [&] { return closed_ || !works_.empty(); });
  return !works_.empty();
}

void FilmQueue::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  added_.notify_all();
}

void Worker::run(FilmQueue& queue) {
  queue_ = &queue;
  while (queue.first(&target_)) {
    draining_ = false;
    decoder_.decode_resize(*this, target_.size, target_.isa);
  }
}

FilmJob* Worker::next() {
  // Once there was none, there is none until those under way are done: the decoder begins all its streams at once.
  while (!draining_) {
    Work* work = nullptr;
    BatchFilm* const film = queue_->take(target_, &work);
    if (film == nullptr) {
      draining_ = true;
      break;
    }
    Place& place = *std::find_if(std::begin(places_), std::end(places_), [](const Place& p) { return !p.film; });
    static_cast<FilmJob&>(place) = {film->file, film->file_nbytes, nullptr, film->out, 0, 0, {}};
    if (film->path != nullptr) {
      film->status = read_file(film->path, decoder_.limits(), &place.buffer, &place.file_nbytes);
      if (!film->status.ok()) {
        film->sum = film->sumsq = 0;
        std::memset(film->out, 0, size_t{target_.size} * target_.size);
        queue_->finish(*work);
        continue;
      }
      place.file = place.writable_file = place.buffer.data();
    }
    place.film = film;
    place.work = work;
    return &place;
  }
  return nullptr;
}

void Worker::finished(FilmJob& job) {
  auto& place = static_cast<Place&>(job);
  place.film->sum = job.sum;
  place.film->sumsq = job.sumsq;
  place.film->status = job.status;
  place.film = nullptr;
  place.buffer.release_above(kKeptFileNbytes);
  queue_->finish(*place.work);
}

struct Batch::State {
  explicit State(const Limits& limits_) : limits(limits_) {}

  const Limits limits;
  const pid_t owner = getpid();  // fork() copies this object, but not its threads
  FilmQueue queue;
  std::vector<std::unique_ptr<Worker>> workers;  // one for each thread
  std::vector<std::thread> threads;

  void stop() {
    queue.close();
    for (std::thread& thread : threads) thread.join();
  }
};

Batch::Batch(unsigned threads, const Limits& limits) : state_(new State(limits)) {
  for (unsigned i = 0; i < threads; ++i) state_->workers.push_back(std::make_unique<Worker>(limits));
  try {
    for (const auto& worker : state_->workers) {
      state_->threads.emplace_back([&queue = state_->queue, worker = worker.get()] {
        while (queue.wait_for_films()) worker->run(queue);
      });
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
  Work work(films, count, {size, isa});
  if (getpid() == state_->owner) {
    state_->queue.add(work);
    state_->queue.wait_until_finished(work);
  } else {
    FilmQueue alone;
    alone.add(work);
    Worker(state_->limits).run(alone);
  }
}

}  // namespace cxrfast::png
