// inflate.h - zlib streams (RFC 1950 around RFC 1951) to bytes, several independent streams at once in one thread.
//
// One Huffman stream is a single chain of dependent look-ups, so one core waits most of the time; streams of different
// films are independent, and interleaving them fills the wait. Two decoders stand behind the two functions:
// - inflate_zlib: the fast one. It never decides that a stream is bad; at the first irregularity it hands the job to
// - inflate_zlib_careful: one stream, every check in sight. Its verdict is the verdict, so speed never decides what
//   is accepted.
// Accepted is what zlib accepts (incomplete code sets included), if it yields exactly the promised number of bytes.
// Bytes behind the stream's checksum are ignored, as zlib and libpng do. Preset dictionaries are corrupt (PNG has
// none). Left out: gzip and raw streams, streaming (the whole input must lie in memory), allocation (there is none).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "status.h"

namespace cxrfast::png {

// Readable bytes that the caller keeps behind `in`, and writable ones behind `out`, whose content does not matter.
constexpr size_t kInflatePad = 320;

// How far back a stream can reach, and its longest match, bytes (RFC 1951).
constexpr size_t kWindow = 32768, kMaxMatch = 258;

struct InflateJob {
  const uint8_t* in = nullptr;  // a whole zlib stream; a PNG's IDAT payloads, joined
  size_t in_nbytes = 0;
  uint8_t* out = nullptr;
  size_t out_nbytes = 0;  // exactly this many bytes must come out: fewer or more is corrupt
  Status status;          // written by the decoder; offset: byte inside the zlib stream where it went wrong
  // 0: out holds all out_nbytes. Otherwise they come by segments of this size, the last one shorter, to the feed's
  // segment(), and out is a window of inflate_window_nbytes(segment_nbytes) bytes, padding included. A megabyte that
  // is written here and read there falls out of the second-level cache in between; a segment does not.
  size_t segment_nbytes = 0;
};

// The window slides by a segment. The kernels may go so far beyond its end before they hand it over: they know how many
// steps are safe, whatever the data, and near the end of their room those become few.
constexpr size_t kSegmentOvershoot = 8192;
static_assert(kSegmentOvershoot >= kMaxMatch + kInflatePad);
constexpr size_t inflate_window_nbytes(size_t segment_nbytes) {
  return kWindow + segment_nbytes + kSegmentOvershoot + kInflatePad;
}

// Decodes any number of jobs, in any mixture of sizes, none by segments. Each job's out and status depend on that job
// alone. If a job's status is not ok, its out holds unspecified bytes. Jobs must not overlap. Touches no byte outside
// in..in_nbytes+pad and out..out_nbytes+pad. Thread-safe: no shared state.
void inflate_zlib(InflateJob* jobs, size_t count, Isa isa);

// The same for a supply of jobs that need not exist all at once: films differ in size threefold, and whoever waits for
// a whole group of them lets streams run alone. The functions are called between the steps of decoding, in the caller's
// thread.
class InflateFeed {
 public:
  virtual InflateJob* next() = 0;  // a job to begin, or nullptr: no more will come; not called again after that
  virtual void finished(
      InflateJob& job) = 0;  // its status is set; in the order in which jobs end, not the order of next()

  // For jobs by segments only. The next bytes of the job, kInflatePad readable ones behind them; the checksum is not
  // yet known, and what follows may turn out to be broken. False: the job is wanted as a whole after all.
  virtual bool segment(InflateJob& job, const uint8_t* bytes, size_t nbytes) {
    return (void)job, (void)bytes, (void)nbytes, true;
  }
  // The stream begins once more, for it is wanted as a whole, or the careful decoder must look at it: forget the
  // segments, and give the job an out for all its bytes. False: it cannot be had, and the job's status says so.
  virtual bool whole(InflateJob& job) { return (void)job, false; }

 protected:
  ~InflateFeed() = default;
};
constexpr int kInflateStreams = 3;  // jobs under way at once, the one that `finished` is told of included
void inflate_zlib(InflateFeed& feed, Isa isa);

// One job, not by segments, plainly. Needs no padding. Several times slower.
void inflate_zlib_careful(InflateJob& job);

}  // namespace cxrfast::png
