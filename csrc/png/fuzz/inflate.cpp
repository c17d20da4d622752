// inflate.cpp - fuzz target: inflate against zlib, verdict and bytes, at every
// level, alone or beside other streams.
//
// Input: raw deflate data. The target puts the zlib header in front and the
// right Adler-32 behind, which a fuzzer could never guess, and says how many
// bytes must come out: what zlib makes of it, and one more and one less.
#include "png/inflate.h"

#include <zlib.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "png/fuzz/guarded.h"

using namespace cxrfast::png;
using cxrfast::png::fuzz::draw;
using cxrfast::png::fuzz::Guarded;
using cxrfast::png::fuzz::require;

namespace {

constexpr size_t kMaxIn = 1 << 16, kMaxOut = 1 << 18;
constexpr size_t kStreams = 4;  // one more than are interleaved
constexpr size_t kNeighbourNbytes = 500;

Guarded* ins[kStreams];
Guarded* outs[kStreams];
std::vector<uint8_t> expected(kMaxOut);

// What zlib says of raw deflate data.
struct Verdict {
  bool ok = false;  // a complete stream of at most kMaxOut bytes
  size_t in_nbytes = 0, out_nbytes = 0;
};

Verdict ask_zlib(const uint8_t* data, size_t nbytes) {
  static z_stream stream;
  static const bool ready = inflateInit2(&stream, -15) == Z_OK;
  require(ready && inflateReset(&stream) == Z_OK, "zlib works");
  stream.next_in = const_cast<uint8_t*>(data);
  stream.avail_in = static_cast<uInt>(nbytes);
  stream.next_out = expected.data();
  stream.avail_out = static_cast<uInt>(expected.size());
  const int end = ::inflate(&stream, Z_FINISH);
  return {end == Z_STREAM_END, nbytes - stream.avail_in, expected.size() - stream.avail_out};
}

// A stream that is in order, to stand beside the one under test.
const std::string& neighbour() {
  static const std::string stream = [] {
    std::string rows(kNeighbourNbytes, '\0');
    uint32_t state = 1;
    for (char& c : rows) c = static_cast<char>((state = state * 1664525 + 1013904223) >> 28);
    std::string packed(compressBound(rows.size()), '\0');
    uLongf nbytes = packed.size();
    compress2(reinterpret_cast<Bytef*>(packed.data()), &nbytes, reinterpret_cast<const Bytef*>(rows.data()),
              rows.size(), 6);
    packed.resize(nbytes);
    return packed;
  }();
  return stream;
}

InflateJob make_job(size_t slot, const uint8_t* stream, size_t nbytes, size_t out_nbytes) {
  InflateJob job;
  job.in = ins[slot]->before_guard(nbytes + kInflatePad);
  std::memcpy(const_cast<uint8_t*>(job.in), stream, nbytes);
  job.in_nbytes = nbytes;
  job.out = outs[slot]->before_guard(out_nbytes + kInflatePad);
  job.out_nbytes = out_nbytes;
  return job;
}

// One stream by segments, its window before a guard page too.
class SegmentFeed final : public InflateFeed {
 public:
  // wanted: so many bytes by segments, then the job as a whole.
  SegmentFeed(InflateJob& job, size_t segment_nbytes, size_t wanted) : job_(job), wanted_(wanted) {
    job.segment_nbytes = segment_nbytes;
    job.out = outs[1]->before_guard(inflate_window_nbytes(segment_nbytes));
  }
  InflateJob* next() override { return std::exchange(begun_, true) ? nullptr : &job_; }
  bool segment(InflateJob&, const uint8_t* bytes, size_t nbytes) override {
    require(nbytes == job_.segment_nbytes || done_ + nbytes == job_.out_nbytes, "only the last segment is shorter");
    require(done_ + nbytes <= job_.out_nbytes && std::equal(bytes, bytes + nbytes, expected.data() + done_),
            "the segments are zlib's bytes, as far as those go");
    done_ += nbytes;
    return done_ < wanted_;
  }
  bool whole(InflateJob&) override {
    done_ = job_.out_nbytes;
    job_.out = outs[0]->before_guard(job_.out_nbytes + kInflatePad);
    return true;
  }
  void finished(InflateJob&) override {
    if (job_.status.ok()) require(done_ == job_.out_nbytes, "nothing is left out");
  }

 private:
  InflateJob& job_;
  const size_t wanted_;
  bool begun_ = false;
  size_t done_ = 0;
};

void check(const InflateJob& job, bool must_be_ok) {
  require(job.status.ok() == must_be_ok, "the verdict is zlib's");
  if (must_be_ok) require(std::memcmp(job.out, expected.data(), job.out_nbytes) == 0, "the bytes are zlib's");
  if (!must_be_ok) require(job.status.code == Code::kCorrupt && *job.status.message != '\0', "there is a reason");
  require(job.status.offset <= static_cast<int64_t>(job.in_nbytes), "the offset lies in the stream");
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  for (size_t i = 0; i < kStreams; ++i) {
    ins[i] = new Guarded(kMaxIn + 64 + kInflatePad);
    outs[i] = new Guarded(kMaxOut + 64 + kInflatePad);
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  if (nbytes > kMaxIn) return 0;
  const Verdict verdict = ask_zlib(data, nbytes);
  if (!verdict.ok && verdict.out_nbytes == kMaxOut) return 0;  // longer than the target looks

  static std::vector<uint8_t> stream;
  const size_t used = verdict.ok ? verdict.in_nbytes : nbytes;
  stream.assign({0x78, 0x9C});
  stream.insert(stream.end(), data, data + used);
  const auto adler = static_cast<uint32_t>(::adler32(1, expected.data(), static_cast<uInt>(verdict.out_nbytes)));
  for (int shift = 24; shift >= 0; shift -= 8) stream.push_back(static_cast<uint8_t>(adler >> shift));
  stream.insert(stream.end(), data + used,
                data + nbytes);  // bytes behind the checksum are ignored

  const size_t out_nbytes = verdict.out_nbytes;
  InflateJob careful = make_job(0, stream.data(), stream.size(), out_nbytes);
  inflate_zlib_careful(careful);
  check(careful, verdict.ok);

  // One level, alone or in a group: all of them for every input would let a
  // quarter as many inputs be tried.
  const uint32_t turn = draw(data, nbytes);
  const Isa isa = static_cast<Isa>(turn % (static_cast<uint32_t>(cpu_isa()) + 1));
  if (turn / 8 % 2 == 0) {
    InflateJob alone = make_job(0, stream.data(), stream.size(), out_nbytes);
    if (turn / 16 % 2 == 0) {
      SegmentFeed feed(alone, 2000 + turn / 32 % 60000, turn % 7 == 0 ? turn / 64 % kMaxOut : SIZE_MAX);
      inflate_zlib(feed, isa);
      if (alone.segment_nbytes > 0) {  // compared on the way
        require(verdict.ok && alone.status.ok(), "the verdict is zlib's");
        return 0;
      }
    } else {
      inflate_zlib(&alone, 1, isa);
    }
    check(alone, verdict.ok);
    require(
        std::strcmp(alone.status.message, careful.status.message) == 0 && alone.status.offset == careful.status.offset,
        "the reason does not depend on speed");
    return 0;
  }

  const auto* other = reinterpret_cast<const uint8_t*>(neighbour().data());
  const size_t wrong_nbytes = turn / 16 % 2 == 0 || out_nbytes == 0 ? out_nbytes + 1 : out_nbytes - 1;
  InflateJob group[kStreams] = {
      make_job(0, stream.data(), stream.size(), out_nbytes),
      make_job(1, stream.data(), stream.size(), wrong_nbytes),
      make_job(2, other, neighbour().size(), kNeighbourNbytes),
      make_job(3, other, neighbour().size(), kNeighbourNbytes),
  };
  std::rotate(group, group + nbytes % kStreams, group + kStreams);  // any order
  inflate_zlib(group, kStreams, isa);
  for (const InflateJob& job : group) {
    if (job.in_nbytes == neighbour().size() && std::memcmp(job.in, other, job.in_nbytes) == 0) {
      require(job.status.ok(), "a bad stream does not spoil its neighbour");
    } else {
      check(job, verdict.ok && job.out_nbytes == out_nbytes);
    }
  }
  return 0;
}
