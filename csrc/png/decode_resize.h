// decode_resize.h - PNG files in memory to grey images: the decoder as a library. Start reading here.
//
//   cxrfast::png::FilmDecoder decoder{cxrfast::png::Limits{}};
//   cxrfast::png::FilmJob job;
//   job.file = file, job.file_nbytes = file_nbytes, job.out = image;  // image: 224 * 224 bytes
//   decoder.decode_resize(&job, 1, 224, cxrfast::png::best_isa());
//   if (!job.status.ok()) std::puts(job.status.message);
//
// Input: any bytes at all. Output: the image of the rule "pillow-bilinear" (grey.h, resample.h), or a Status that says
// why not; nothing in between. Never throws, never reads outside the file's bytes, never allocates more than the limits
// allow. Threads: one FilmDecoder for each; it keeps its scratch memory from call to call (batch.h has a pool of them).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "chunks.h"
#include "inflate.h"
#include "isa.h"
#include "limits.h"
#include "resample.h"
#include "status.h"

namespace cxrfast::png {

// Films of one thread that are under way at once: the streams that inflate interleaves.
constexpr size_t kFilmsInFlight = kInflateStreams;

constexpr uint32_t kMinSize = 8, kMaxSize = 1024;  // side of a prepared image, pixels

struct FilmJob {
  const uint8_t* file = nullptr;  // the PNG file; needs no padding; may be null when file_nbytes is 0
  size_t file_nbytes = 0;
  // nullptr, or the file again, if it and kInflatePad bytes behind it may be written over: then its payloads are joined
  // where they are, and leave more of the second-level cache to the rest of the work.
  uint8_t* writable_file = nullptr;
  uint8_t* out = nullptr;  // size * size bytes, row by row; all zeros when status is not ok
  int64_t sum = 0;         // of the image's pixels; 0 when status is not ok
  int64_t sumsq = 0;       // of their squares
  Status status;           // offset: byte of the file, for errors inside the zlib stream too
};

// Films that need not all be in memory at once.
class FilmSource {
 public:
  virtual FilmJob* next() = 0;              // a film to begin, or nullptr: no more will come
  virtual void finished(FilmJob& job) = 0;  // the job is done, in any order; the decoder forgets it

 protected:
  ~FilmSource() = default;
};

class FilmDecoder {
 public:
  explicit FilmDecoder(const Limits& limits);
  ~FilmDecoder();
  FilmDecoder(const FilmDecoder&) = delete;
  FilmDecoder& operator=(const FilmDecoder&) = delete;

  // Decodes films and resizes each to size x size (kMinSize .. kMaxSize), up to kFilmsInFlight of them under way at a
  // time, fewer where they would exceed limits.max_memory_nbytes together. Each film's result depends on that film
  // alone. The jobs' outs must not overlap. Both functions of the source are called in the caller's thread.
  void decode_resize(FilmSource& source, uint32_t size, Isa isa);
  void decode_resize(FilmJob* jobs, size_t count, uint32_t size, Isa isa);

  // The whole grey image of one film. chunks: what read_chunks(file, ...) returned with status ok under this decoder's
  // limits. grey: width * height bytes, row by row; unspecified when the status is not ok.
  Status decode(const uint8_t* file, const Chunks& chunks, uint8_t* grey, Isa isa);

  const Limits& limits() const { return limits_; }

 private:
  struct Film;  // one of the films under way, with its buffers
  class Run;    // one call of decode_resize

  std::shared_ptr<const Resampler> resampler_for(const Header& header, uint32_t size);

  Limits limits_;
  std::unique_ptr<Film[]> films_;                             // kFilmsInFlight
  std::vector<std::shared_ptr<const Resampler>> resamplers_;  // of the last source sizes
  Scratch scratch_;
};

}  // namespace cxrfast::png
