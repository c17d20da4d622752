// decode_resize.cpp - chunks, inflate, un-filter, grey and resample put together, for several films at once.
#include "decode_resize.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "grey.h"
#include "unfilter.h"

namespace cxrfast::png {

namespace {

constexpr size_t kPad = std::max(kInflatePad, kPixelPad);

// What a film's place keeps for the next one: an NIH film needs 0.8 MiB in all, its RGBA variant 6 MiB.
constexpr size_t kKeptNbytes = size_t{8} << 20;

// Source sizes whose coefficients are kept. A data set has one; a mixed folder may have many.
constexpr size_t kKeptResamplers = 16;

// The least that is un-filtered at a time, so that sliding inflate's window (32 KiB) costs little beside it; with three
// films under way all of it stays in a second-level cache of 512 KiB.
constexpr size_t kLeastSegmentNbytes = size_t{64} << 10;

bool is_grey8(const Header& header) {
  return header.color_type == ColorType::kGrey && header.bit_depth == 8 && !header.interlaced;
}

uint64_t pixels_of(const Header& header) { return uint64_t{header.width} * header.height; }

// The memory that a film takes at most, in bytes, its file included. size 0: not resized. Fits: sides and pixels are
// within their limits.
uint64_t memory_of(size_t file_nbytes, bool joined_in_place, const Chunks& chunks, uint32_t size) {
  const Header& header = chunks.header;
  uint64_t nbytes = file_nbytes + header.filtered_nbytes() + chunks.idat_count * sizeof(uint32_t) + 3 * kPad;
  if (!joined_in_place) nbytes += chunks.idat_nbytes;
  if (!is_grey8(header)) nbytes += pixels_of(header) + header.height;
  nbytes += size > 0 ? resample_nbytes(header.width, header.height, size) : unfilter_nbytes(header.width);
  return nbytes;
}

Status too_large(const char* message) { return {Code::kTooLarge, message, -1}; }

// Un-filters the rows in place and writes them as grey. line: header.width bytes of scratch.
Status rows_to_grey(const Chunks& chunks, uint8_t* rows, uint8_t* line, uint8_t* grey) {
  const Header& header = chunks.header;
  const auto offset = static_cast<int64_t>(chunks.idat_offset);  // the fault has no byte of its own in the file
  Pass passes[kMaxPasses];
  const int pass_count = passes_of(header, passes);
  for (int i = 0; i < pass_count; ++i) {
    const Pass& pass = passes[i];
    if (pass.width == 0 || pass.height == 0) continue;
    const size_t row_nbytes = header.row_nbytes(pass.width);
    const Status status = unfilter(rows, pass.height, row_nbytes, header.filter_distance());
    if (!status.ok()) return {status.code, status.message, offset};
    for (uint32_t y = 0; y < pass.height; ++y, rows += 1 + row_nbytes) {
      uint8_t* target = grey + size_t{pass.y0 + y * pass.dy} * header.width + pass.x0;
      uint8_t* row = pass.dx == 1 ? target : line;
      if (!grey_row(chunks, rows + 1, pass.width, row)) return {Code::kCorrupt, reason::kPaletteIndex, offset};
      if (pass.dx > 1) {
        for (size_t x = 0; x < pass.width; ++x) target[x * pass.dx] = line[x];
      }
    }
  }
  return {};
}

// The film's grey image is one plane of its bytes, or is likely to be.
bool expects_plane(const Header& header) { return !is_grey8(header) && may_be_one_plane(header); }

// Filtered rows that go from inflate to the pixels at a time, in bytes: groups of an 8-bit grey film, the power of two
// of another film's rows that is nearest to as much.
size_t segment_nbytes_of(const Header& header, Isa isa) {
  const size_t row_nbytes = 1 + header.row_nbytes(header.width), group_rows = RowGroups::group_rows(isa);
  const size_t group = group_rows * row_nbytes;
  if (is_grey8(header)) return group * ((kLeastSegmentNbytes + group - 1) / group);
  size_t rows = group_rows;
  while (rows > 1 && rows * row_nbytes >= 2 * kLeastSegmentNbytes) rows /= 2;
  return rows * row_nbytes;
}

}  // namespace

struct FilmDecoder::Film {
  FilmJob* job = nullptr;  // nullptr: this place is free
  uint64_t memory = 0;     // what the film counts for
  Chunks chunks;
  InflateJob stream;
  std::shared_ptr<const Resampler> resampler;  // shared: the decoder may forget it while the film is under way

  Buffer idat;       // the payloads, joined, where the file must stay as it is
  Buffer lengths;    // of each payload, uint32_t
  Buffer rows;       // filtered rows: all of them, or inflate's window
  Buffer grey;       // the plane of a film that has several, all of it or a group's rows; or its grey image
  Buffer line;       // one row of a pass
  RowGroups groups;  // where rows go
  size_t plane_rows = 0, group_rows = 0;  // of a plane by segments: in `grey`, and how many there can be

  // segment_nbytes: 0 where the rows are wanted as a whole.
  bool reserve(bool needs_grey, size_t segment_nbytes) {
    const Header& header = chunks.header;
    const size_t all_nbytes = static_cast<size_t>(header.filtered_nbytes());
    const size_t grey_rows = segment_nbytes > 0 ? std::min<size_t>(group_rows, header.height) : header.height;
    if (!rows.reserve(segment_nbytes > 0 ? inflate_window_nbytes(segment_nbytes) : all_nbytes + kPad)) return false;
    if (needs_grey && !grey.reserve(grey_rows * (size_t{header.width} + 1) + kPad)) return false;
    return !header.interlaced || line.reserve(header.width);
  }

  uint32_t* payload_lengths() { return reinterpret_cast<uint32_t*>(lengths.data()); }

  // Joins the payloads and describes the stream. The limits were checked. writable_file: as in FilmJob.
  Status open_stream(const uint8_t* file, uint8_t* writable_file, bool needs_grey, size_t segment_nbytes, Isa isa) {
    if (!reserve(needs_grey, segment_nbytes) || !lengths.reserve(chunks.idat_count * sizeof(uint32_t)) ||
        (writable_file == nullptr && !idat.reserve(chunks.idat_nbytes + kPad))) {
      return too_large(reason::kOutOfMemory);
    }
    uint8_t* const joined = writable_file != nullptr ? writable_file + chunks.idat_offset : idat.data();
    stream = {};
    stream.in = joined;
    stream.in_nbytes = chunks.idat_nbytes;
    stream.out = rows.data();
    stream.out_nbytes = static_cast<size_t>(chunks.header.filtered_nbytes());
    stream.segment_nbytes = segment_nbytes;
    return join_idat(file, chunks, isa, joined, payload_lengths());
  }

  // The stream's end, told in offsets of the file.
  Status stream_status() {
    Status status = stream.status;
    if (status.offset >= 0) status.offset = file_offset_of(chunks, payload_lengths(), status.offset);
    return status;
  }

  void trim() {
    for (Buffer* buffer : {&idat, &lengths, &rows, &grey, &line}) buffer->release_above(kKeptNbytes);
    groups.release_above(kKeptNbytes);
  }
};

FilmDecoder::FilmDecoder(const Limits& limits) : limits_(limits), films_(new Film[kFilmsInFlight]) {}
FilmDecoder::~FilmDecoder() = default;

// Films on their way: source -> chunks -> inflate (which asks for the next one whenever a stream has ended) -> pixels.
class FilmDecoder::Run final : public InflateFeed {
 public:
  Run(FilmDecoder& decoder, FilmSource& source, uint32_t size, Isa isa)
      : decoder_(decoder), source_(source), size_(size), isa_(isa) {}

  void to_the_end() {
    do {
      inflate_zlib(*this, isa_);
    } while (postponed_ != nullptr);
  }

  InflateJob* next() override {
    while (FilmJob* job = postponed_ != nullptr ? std::exchange(postponed_, nullptr) : source_.next()) {
      Film& film = free_place();
      job->status = read_chunks(job->file, job->file_nbytes, decoder_.limits_, isa_, &film.chunks);
      if (job->status.ok()) {
        film.memory = memory_of(job->file_nbytes, job->writable_file != nullptr, film.chunks, size_);
        if (film.memory > decoder_.limits_.max_memory_nbytes) {
          job->status = too_large(reason::kMemoryLimit);
        } else if (memory_ + film.memory > decoder_.limits_.max_memory_nbytes) {
          postponed_ = job;  // until all that is under way has ended
          return nullptr;
        } else {
          job->status = open(film, *job);
        }
      }
      if (job->status.ok()) {
        film.job = job;
        memory_ += film.memory;
        return &film.stream;
      }
      film.trim();
      end(*job);
    }
    return nullptr;
  }

  bool segment(InflateJob& stream, const uint8_t* bytes, size_t nbytes) override {
    Film& film = film_of(stream);
    const Header& header = film.chunks.header;
    const size_t plane_row_nbytes = size_t{header.width} + 1, count = nbytes / (1 + header.row_nbytes(header.width));
    if (is_grey8(header)) {
      film.groups.add_filtered(bytes, count);
      return true;
    }
    if (!extract_plane(header, bytes, count, film.grey.data() + film.plane_rows * plane_row_nbytes)) return false;
    film.plane_rows += count;
    if (film.plane_rows == film.group_rows) add_plane(film);
    return true;
  }

  bool whole(InflateJob& stream) override {
    Film& film = film_of(stream);
    if (!film.reserve(!is_grey8(film.chunks.header), 0)) return stream.status = too_large(reason::kOutOfMemory), false;
    stream.out = film.rows.data();
    return true;
  }

  void finished(InflateJob& stream) override {
    Film& film = film_of(stream);
    FilmJob& job = *film.job;
    job.status = film.stream_status();
    if (job.status.ok()) to_pixels(film);
    leave(film);
  }

 private:
  Film& free_place() {
    return *std::find_if(decoder_.films_.get(), decoder_.films_.get() + kFilmsInFlight,
                         [](const Film& film) { return film.job == nullptr; });
  }

  Film& film_of(const InflateJob& stream) {
    return *std::find_if(decoder_.films_.get(), decoder_.films_.get() + kFilmsInFlight,
                         [&](const Film& candidate) { return &candidate.stream == &stream; });
  }

  Status open(Film& film, const FilmJob& job) {
    const Header& header = film.chunks.header;
    film.resampler = decoder_.resampler_for(header, size_);
    if (film.resampler == nullptr) return too_large(reason::kOutOfMemory);
    size_t segment_nbytes = 0;
    film.plane_rows = 0;
    film.group_rows = RowGroups::group_rows(isa_);
    if (may_be_one_plane(header) && !film.resampler->vertical_first) {
      segment_nbytes = segment_nbytes_of(header, isa_);
      if (inflate_window_nbytes(segment_nbytes) >= header.filtered_nbytes()) segment_nbytes = 0;
    }
    if (segment_nbytes > 0 && !film.groups.begin(*film.resampler, decoder_.scratch_, isa_)) {
      return too_large(reason::kOutOfMemory);
    }
    return film.open_stream(job.file, job.writable_file, !is_grey8(header), segment_nbytes, isa_);
  }

  void add_plane(Film& film) { film.groups.add_filtered(film.grey.data(), std::exchange(film.plane_rows, 0)); }

  void to_pixels(Film& film) {
    FilmJob& job = *film.job;
    const Header& header = film.chunks.header;
    const bool by_segments = film.stream.segment_nbytes > 0;
    const bool is_plane = !by_segments && expects_plane(header) &&
                          extract_plane(header, film.rows.data(), header.height, film.grey.data());
    if (by_segments) {
      if (film.plane_rows > 0) add_plane(film);
      job.status = film.groups.finish(job.out);
      if (job.status.ok()) sum_pixels(job.out, size_t{size_} * size_, &job.sum, &job.sumsq, isa_);
    } else if (is_grey8(header) || is_plane) {
      PixelJob pixels;
      pixels.rows = is_plane ? film.grey.data() : film.rows.data();
      pixels.resampler = film.resampler.get();
      pixels.out = job.out;
      unfilter_resample_grey8(pixels, film.groups, decoder_.scratch_, isa_);
      job.status = pixels.status;
      job.sum = pixels.sum;
      job.sumsq = pixels.sumsq;
    } else {
      job.status = rows_to_grey(film.chunks, film.rows.data(), film.line.data(), film.grey.data());
      if (!job.status.ok()) return;
      job.status =
          resample(*film.resampler, film.grey.data(), header.width, job.out, film.groups, decoder_.scratch_, isa_);
      if (job.status.ok()) sum_pixels(job.out, size_t{size_} * size_, &job.sum, &job.sumsq, isa_);
    }
    // A filter byte has no byte of its own in the file.
    if (job.status.code == Code::kCorrupt) job.status.offset = static_cast<int64_t>(film.chunks.idat_offset);
  }

  void leave(Film& film) {
    end(*std::exchange(film.job, nullptr));
    film.resampler = nullptr;
    memory_ -= film.memory;
    film.trim();
  }

  void end(FilmJob& job) {
    if (!job.status.ok()) {
      job.sum = job.sumsq = 0;
      std::memset(job.out, 0, size_t{size_} * size_);
    }
    source_.finished(job);
  }

  FilmDecoder& decoder_;
  FilmSource& source_;
  const uint32_t size_;
  const Isa isa_;
  uint64_t memory_ = 0;           // of the films under way
  FilmJob* postponed_ = nullptr;  // for want of memory
};

void FilmDecoder::decode_resize(FilmSource& source, uint32_t size, Isa isa) {
  clear_upper_halves();
  Run(*this, source, size, isa).to_the_end();
}

void FilmDecoder::decode_resize(FilmJob* jobs, size_t count, uint32_t size, Isa isa) {
  class List final : public FilmSource {
   public:
    List(FilmJob* begin, FilmJob* end) : next_(begin), end_(end) {}
    FilmJob* next() override { return next_ == end_ ? nullptr : next_++; }
    void finished(FilmJob&) override {}

   private:
    FilmJob *next_, *end_;
  };
  List list(jobs, jobs + count);
  decode_resize(list, size, isa);
}

Status FilmDecoder::decode(const uint8_t* file, const Chunks& chunks, uint8_t* grey, Isa isa) {
  if (memory_of(0, false, chunks, 0) > limits_.max_memory_nbytes) return too_large(reason::kMemoryLimit);
  clear_upper_halves();
  Film& film = films_[0];
  film.chunks = chunks;
  const Header& header = chunks.header;
  const bool may_extract = expects_plane(header);
  Status status = film.open_stream(file, nullptr, may_extract, 0, isa);
  if (status.ok()) {
    inflate_zlib(&film.stream, 1, isa);
    status = film.stream_status();
  }
  if (status.ok()) {
    const uint8_t* plane = nullptr;
    if (is_grey8(header)) {
      plane = film.rows.data();
    } else if (may_extract && extract_plane(header, film.rows.data(), header.height, film.grey.data())) {
      plane = film.grey.data();
    }
    if (plane != nullptr) {
      status = unfilter_grey8(plane, header.width, header.height, grey, scratch_, isa);
      if (status.code == Code::kCorrupt) status.offset = static_cast<int64_t>(chunks.idat_offset);
    } else {
      status = rows_to_grey(chunks, film.rows.data(), film.line.data(), grey);
    }
  }
  film.trim();
  return status;
}

std::shared_ptr<const Resampler> FilmDecoder::resampler_for(const Header& header, uint32_t size) try {
  auto found = std::find_if(resamplers_.begin(), resamplers_.end(), [&](const auto& kept) {
    return kept->horizontal.in == header.width && kept->vertical.in == header.height && kept->horizontal.out == size;
  });
  if (found == resamplers_.end()) {
    auto made = std::make_shared<const Resampler>(header.width, header.height, size);
    if (resamplers_.size() == kKeptResamplers) resamplers_.erase(resamplers_.begin());
    resamplers_.push_back(std::move(made));
    found = resamplers_.end() - 1;
  }
  std::rotate(found, found + 1, resamplers_.end());  // last used comes last
  return resamplers_.back();
} catch (const std::bad_alloc&) {
  return nullptr;
}

}  // namespace cxrfast::png
