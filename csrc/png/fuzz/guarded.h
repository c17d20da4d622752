// guarded.h - buffers that end at a page nobody may touch, so that the first
// byte over-read or over-written is a crash.
//
// ASan sees what the compiler wrote; it does not see into assembly or into a
// read that stays inside a larger buffer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cxrfast::png::fuzz {

// Memory mapped once, for at most `capacity` bytes, between two pages without
// access.
class Guarded {
 public:
  explicit Guarded(size_t capacity) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    capacity_ = (capacity + page - 1) / page * page;
    void* map = mmap(nullptr, capacity_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) std::abort();
    first_ = static_cast<uint8_t*>(map) + page;
    if (mprotect(first_, capacity_, PROT_READ | PROT_WRITE) != 0) std::abort();
  }

  // nbytes bytes directly before the guard page.
  uint8_t* before_guard(size_t nbytes) {
    if (nbytes > capacity_) std::abort();
    return first_ + (capacity_ - nbytes);
  }

  // The same, holding a copy of `data`.
  uint8_t* copy_before_guard(const uint8_t* data, size_t nbytes) {
    uint8_t* target = before_guard(nbytes);
    if (nbytes > 0) std::memcpy(target, data, nbytes);
    return target;
  }

 private:
  uint8_t* first_;
  size_t capacity_;
};

// A number that a changed bit changes (FNV-1a): which of several checks an
// input gets, so that its next mutant gets another.
inline uint32_t draw(const uint8_t* data, size_t nbytes) {
  uint32_t hash = 2166136261;
  for (size_t i = 0; i < nbytes; ++i) hash = (hash ^ data[i]) * 16777619;
  return hash >> 8;
}

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

}  // namespace cxrfast::png::fuzz
