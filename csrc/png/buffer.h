// buffer.h - scratch memory that one thread keeps from film to film.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace cxrfast::png {

// Uninitialised bytes, aligned to 64. Owned by one thread; never throws.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least nbytes bytes; what was there is lost when it must grow. False when memory ran out: then it is empty.
  bool reserve(size_t nbytes) {
    if (nbytes <= nbytes_) return true;
    release();
    constexpr size_t kAlign = 64;
    data_ = static_cast<uint8_t*>(std::aligned_alloc(kAlign, (nbytes + kAlign - 1) / kAlign * kAlign));
    nbytes_ = data_ != nullptr ? nbytes : 0;
    return data_ != nullptr;
  }

  void release() {
    std::free(data_);
    data_ = nullptr;
    nbytes_ = 0;
  }

  // A rare giant must not stay in memory for the rest of the run.
  void release_above(size_t nbytes) {
    if (nbytes_ > nbytes) release();
  }

  uint8_t* data() { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t nbytes_ = 0;
};

}  // namespace cxrfast::png
