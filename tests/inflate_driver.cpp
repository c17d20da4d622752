// inflate_driver.cpp - runs zlib streams through the decoders of csrc/png on behalf of test_inflate.py.
//
// stdin: calls, each one: u8 level (0, 1, 2: inflate_zlib at that Isa; 255: inflate_zlib_careful), u32 number of jobs,
// u32 segment_nbytes (0: whole), then per job u64 in_nbytes, u64 out_nbytes, the stream. stdout: per job u8 code, i64
// offset, u8 whether a job by segments was left to the careful decoder, u8 length of the message, the message, and the
// out_nbytes bytes where the code is ok. Every buffer is an
// allocation of its own with exactly the padding that inflate.h asks for (none for the careful decoder), so that
// AddressSanitizer sees one byte too many.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "png/inflate.h"
#include "png/isa.h"

using namespace cxrfast::png;

namespace {

template <typename T>
bool get(T* value_ret, size_t count = 1) {
  return std::fread(value_ret, sizeof(T), count, stdin) == count;
}

template <typename T>
void put(const T* value, size_t count = 1) {
  if (std::fwrite(value, sizeof(T), count, stdout) != count) std::exit(3);
}

std::unique_ptr<uint8_t[]> bytes(size_t nbytes) { return std::unique_ptr<uint8_t[]>(new uint8_t[nbytes]); }

// Jobs by segments; puts the segments together.
class SegmentFeed final : public InflateFeed {
 public:
  SegmentFeed(std::vector<InflateJob>& jobs, size_t segment_nbytes) : jobs_(jobs), outs_(jobs.size()) {
    for (InflateJob& job : jobs_) {
      windows_.push_back(bytes(inflate_window_nbytes(segment_nbytes)));
      job.out = windows_.back().get();
      job.segment_nbytes = segment_nbytes;
    }
  }
  InflateJob* next() override { return next_ == jobs_.size() ? nullptr : &jobs_[next_++]; }
  bool segment(InflateJob& job, const uint8_t* begin, size_t nbytes) override {
    std::vector<uint8_t>& out = outs_[static_cast<size_t>(&job - jobs_.data())];
    const bool is_last = out.size() + nbytes == job.out_nbytes;
    if (nbytes == 0 || (nbytes != job.segment_nbytes && !(is_last && nbytes < job.segment_nbytes))) std::exit(4);
    volatile uint8_t behind = begin[nbytes + kInflatePad - 1];  // readable
    (void)behind;
    out.insert(out.end(), begin, begin + nbytes);
    return true;
  }
  bool whole(InflateJob& job) override {
    outs_[static_cast<size_t>(&job - jobs_.data())].clear();
    windows_.push_back(bytes(job.out_nbytes));
    job.out = windows_.back().get();
    left_.push_back(&job);
    return true;
  }
  void finished(InflateJob& job) override {
    std::vector<uint8_t>& out = outs_[static_cast<size_t>(&job - jobs_.data())];
    if (job.segment_nbytes > 0) job.out = out.data();
    if (job.status.ok() && job.segment_nbytes > 0 && out.size() != job.out_nbytes) std::exit(5);
  }

  bool left_to_careful(const InflateJob& job) const {
    return std::find(left_.begin(), left_.end(), &job) != left_.end();
  }

 private:
  std::vector<InflateJob>& jobs_;
  std::vector<const InflateJob*> left_;
  std::vector<std::vector<uint8_t>> outs_;
  std::vector<std::unique_ptr<uint8_t[]>> windows_;
  size_t next_ = 0;
};

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    std::puts(isa_name(cpu_isa()));
    return 0;
  }
  for (uint8_t level; get(&level);) {
    const size_t pad = level == 255 ? 0 : kInflatePad;
    uint32_t count = 0, segment_nbytes = 0;
    if (!get(&count) || !get(&segment_nbytes)) return 2;
    std::vector<InflateJob> jobs(count);
    std::vector<std::unique_ptr<uint8_t[]>> buffers;
    for (InflateJob& job : jobs) {
      uint64_t sizes[2];
      if (!get(sizes, 2)) return 2;
      job.in_nbytes = sizes[0];
      job.out_nbytes = sizes[1];
      uint8_t* in = buffers.emplace_back(bytes(sizes[0] + pad)).get();
      job.out = buffers.emplace_back(bytes(sizes[1] + pad)).get();
      std::memset(in + sizes[0], 0xFF, pad);
      if (!get(in, sizes[0])) return 2;
      job.in = in;
    }
    std::unique_ptr<SegmentFeed> feed;
    if (level == 255) {
      for (InflateJob& job : jobs) inflate_zlib_careful(job);
    } else if (segment_nbytes > 0) {
      feed = std::make_unique<SegmentFeed>(jobs, segment_nbytes);
      inflate_zlib(*feed, static_cast<Isa>(level));
    } else {
      inflate_zlib(jobs.data(), jobs.size(), static_cast<Isa>(level));
    }
    for (const InflateJob& job : jobs) {
      const uint8_t message_nbytes = static_cast<uint8_t>(std::strlen(job.status.message));
      put(&job.status.code);
      put(&job.status.offset);
      const uint8_t left = feed != nullptr && feed->left_to_careful(job);
      put(&left);
      put(&message_nbytes);
      put(job.status.message, message_nbytes);
      if (job.status.ok() && job.out_nbytes > 0) put(job.out, job.out_nbytes);
    }
  }
}
