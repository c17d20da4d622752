// inflate.cpp - chooses the kernel, and gives a list of jobs the shape of a supply.
#include "inflate.h"

#include <bit>

#include "inflate_kernels.h"

namespace cxrfast::png {
namespace {

constexpr bool kHasKernel = sizeof(void*) == 8 && std::endian::native == std::endian::little;

class ListFeed final : public InflateFeed {
 public:
  ListFeed(InflateJob* jobs, size_t count) : next_(jobs), end_(jobs + count) {}
  InflateJob* next() override { return next_ == end_ ? nullptr : next_++; }
  void finished(InflateJob&) override {}

 private:
  InflateJob* next_;
  InflateJob* end_;
};

}  // namespace

void inflate_zlib(InflateFeed& feed, Isa isa) {
  if constexpr (!kHasKernel) {
    while (InflateJob* job = feed.next()) {
      inflate_carefully(feed, *job);
      feed.finished(*job);
    }
    return;
  }
#ifdef CXRFAST_INFLATE_AVX2
  if (isa != Isa::kPortable) return inflate_avx2(feed, isa);
#endif
  (void)isa;
  inflate_portable(feed);
}

void inflate_zlib(InflateJob* jobs, size_t count, Isa isa) {
  ListFeed feed(jobs, count);
  inflate_zlib(feed, isa);
}

}  // namespace cxrfast::png
