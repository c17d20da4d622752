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

// What a film's place keeps for the next one: an NIH film needs 1.5 MiB in all, its RGBA variant 6 MiB.
constexpr size_t kKeptNbytes = size_t{8} << 20;

// Source sizes whose coefficients are kept. A data set has one; a mixed folder may have many.
constexpr size_t kKeptResamplers = 16;
static_assert(kKeptResamplers > kFilmsInFlight, "the films under way hold pointers to as many");

bool is_grey8(const Header& header) {
  return header.color_type == ColorType::kGrey && header.bit_depth == 8 && !header.interlaced;
}

uint64_t pixels_of(const Header& header) { return uint64_t{header.width} * header.height; }

// The memory that a film takes at most, in bytes, its file included. size 0: not resized. Fits: sides and pixels are
// within their limits.
uint64_t memory_of(size_t file_nbytes, const Chunks& chunks, uint32_t size) {
  const Header& header = chunks.header;
  uint64_t nbytes = file_nbytes + chunks.idat_nbytes + header.filtered_nbytes() + 3 * kPad;
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

// Of the pixels and of their squares.
void add_sums(const uint8_t* image, size_t nbytes, int64_t* sum_ret, int64_t* sumsq_ret) {
  int64_t sum = 0, sumsq = 0;
  constexpr size_t kBlock = 4096;  // 4096 * 255^2 fits in 32 bits, which vectorises twice as wide
  for (size_t at = 0; at < nbytes; at += kBlock) {
    uint32_t block_sum = 0, block_sumsq = 0;
    for (size_t i = at; i < std::min(at + kBlock, nbytes); ++i) {
      block_sum += image[i];
      block_sumsq += uint32_t{image[i]} * image[i];
    }
    sum += block_sum;
    sumsq += block_sumsq;
  }
  *sum_ret = sum;
  *sumsq_ret = sumsq;
}

}  // namespace

struct FilmDecoder::Film {
  FilmJob* job = nullptr;  // nullptr: this place is free
  uint64_t memory = 0;     // what the film counts for
  Chunks chunks;
  InflateJob stream;
  const Resampler* resampler = nullptr;
  uint8_t* plane = nullptr;  // the filtered rows of an 8-bit grey film, once they are there

  Buffer idat;  // the payloads, joined
  Buffer rows;  // filtered rows
  Buffer grey;  // the plane of a film that has several, or its grey image
  Buffer line;  // one row of a pass

  bool reserve(bool needs_grey) {
    const Header& header = chunks.header;
    if (!idat.reserve(chunks.idat_nbytes + kPad)) return false;
    if (!rows.reserve(static_cast<size_t>(header.filtered_nbytes()) + kPad)) return false;
    if (needs_grey && !grey.reserve(static_cast<size_t>(pixels_of(header)) + header.height + kPad)) return false;
    return !header.interlaced || line.reserve(header.width);
  }

  // Joins the payloads and describes the stream. The limits were checked.
  Status open_stream(const uint8_t* file, bool needs_grey, Isa isa) {
    if (!reserve(needs_grey)) return too_large(reason::kOutOfMemory);
    stream = {idat.data(), chunks.idat_nbytes, rows.data(), static_cast<size_t>(chunks.header.filtered_nbytes()), {}};
    return join_idat(file, chunks, isa, idat.data());
  }

  // The stream's end, told in offsets of the file.
  Status stream_status(const uint8_t* file) const {
    Status status = stream.status;
    if (status.offset >= 0) status.offset = file_offset_of(file, chunks, status.offset);
    return status;
  }

  void trim() {
    for (Buffer* buffer : {&idat, &rows, &grey, &line}) buffer->release_above(kKeptNbytes);
  }
};

struct FilmDecoder::CachedResampler {
  uint32_t width, height, size;
  Resampler resampler;
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
      finish_planes();
    } while (postponed_ != nullptr);
  }

  InflateJob* next() override {
    while (FilmJob* job = postponed_ != nullptr ? std::exchange(postponed_, nullptr) : source_.next()) {
      Film& film = free_place();
      job->status = read_chunks(job->file, job->file_nbytes, decoder_.limits_, isa_, &film.chunks);
      if (job->status.ok()) {
        film.memory = memory_of(job->file_nbytes, film.chunks, size_);
        if (film.memory > decoder_.limits_.max_memory_nbytes) {
          job->status = too_large(reason::kMemoryLimit);
        } else if (memory_ + film.memory > decoder_.limits_.max_memory_nbytes) {
          postponed_ = job;  // until all that is under way has ended
          return nullptr;
        } else {
          job->status = film.open_stream(job->file, !is_grey8(film.chunks.header), isa_);
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

  void finished(InflateJob& stream) override {
    Film& film = *std::find_if(decoder_.films_.get(), decoder_.films_.get() + kFilmsInFlight,
                               [&](const Film& candidate) { return &candidate.stream == &stream; });
    FilmJob& job = *film.job;
    job.status = film.stream_status(job.file);
    if (job.status.ok()) to_pixels(film);
    if (film.plane == nullptr) {
      leave(film);
      return;
    }
    planes_[plane_count_++] = &film;
    if (plane_count_ == kPlanesAtOnce) finish_planes();
  }

 private:
  static constexpr size_t kPlanesAtOnce = 2;

  Film& free_place() {
    return *std::find_if(decoder_.films_.get(), decoder_.films_.get() + kFilmsInFlight,
                         [](const Film& film) { return film.job == nullptr; });
  }

  // Sets film.plane where the fused path can take over; finishes the film itself otherwise.
  void to_pixels(Film& film) {
    FilmJob& job = *film.job;
    const Header& header = film.chunks.header;
    film.resampler = decoder_.resampler_for(header, size_);
    if (film.resampler == nullptr) {
      job.status = too_large(reason::kOutOfMemory);
    } else if (is_grey8(header)) {
      film.plane = film.rows.data();
    } else if (may_be_one_plane(header) && extract_plane(header, film.rows.data(), film.grey.data())) {
      film.plane = film.grey.data();
    } else {
      job.status = rows_to_grey(film.chunks, film.rows.data(), film.line.data(), film.grey.data());
      if (job.status.ok()) {
        job.status = resample(*film.resampler, film.grey.data(), header.width, job.out, decoder_.scratch_, isa_);
      }
      if (job.status.ok()) add_sums(job.out, size_t{size_} * size_, &job.sum, &job.sumsq);
    }
  }

  void finish_planes() {
    PixelJob pixels[kPlanesAtOnce];
    for (size_t i = 0; i < plane_count_; ++i) {
      const Film& film = *planes_[i];
      pixels[i].rows = film.plane;
      pixels[i].width = film.chunks.header.width;
      pixels[i].height = film.chunks.header.height;
      pixels[i].resampler = film.resampler;
      pixels[i].out = film.job->out;
    }
    unfilter_resample_grey8(pixels, plane_count_, decoder_.scratch_, isa_);
    for (size_t i = 0; i < plane_count_; ++i) {
      FilmJob& job = *planes_[i]->job;
      job.sum = pixels[i].sum;
      job.sumsq = pixels[i].sumsq;
      job.status = pixels[i].status;
      // A filter byte has no byte of its own in the file.
      if (job.status.code == Code::kCorrupt) job.status.offset = static_cast<int64_t>(planes_[i]->chunks.idat_offset);
      leave(*planes_[i]);
    }
    plane_count_ = 0;
  }

  void leave(Film& film) {
    end(*std::exchange(film.job, nullptr));
    film.plane = nullptr;
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
  Film* planes_[kPlanesAtOnce];
  size_t plane_count_ = 0;
};

void FilmDecoder::decode_resize(FilmSource& source, uint32_t size, Isa isa) {
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
  if (memory_of(0, chunks, 0) > limits_.max_memory_nbytes) return too_large(reason::kMemoryLimit);
  Film& film = films_[0];
  film.chunks = chunks;
  const Header& header = chunks.header;
  const bool may_extract = !is_grey8(header) && may_be_one_plane(header);
  Status status = film.open_stream(file, may_extract, isa);
  if (status.ok()) {
    inflate_zlib(&film.stream, 1, isa);
    status = film.stream_status(file);
  }
  if (status.ok()) {
    const uint8_t* plane = nullptr;
    if (is_grey8(header)) {
      plane = film.rows.data();
    } else if (may_extract && extract_plane(header, film.rows.data(), film.grey.data())) {
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

const Resampler* FilmDecoder::resampler_for(const Header& header, uint32_t size) try {
  auto found = std::find_if(resamplers_.begin(), resamplers_.end(), [&](const auto& kept) {
    return kept->width == header.width && kept->height == header.height && kept->size == size;
  });
  if (found == resamplers_.end()) {
    auto made = std::make_unique<CachedResampler>(
        CachedResampler{header.width, header.height, size, Resampler(header.width, header.height, size)});
    if (resamplers_.size() == kKeptResamplers) resamplers_.erase(resamplers_.begin());
    resamplers_.push_back(std::move(made));
    found = resamplers_.end() - 1;
  }
  // Last used comes last, so the films under way hold pointers to none of those that are dropped next.
  std::rotate(found, found + 1, resamplers_.end());
  return &resamplers_.back()->resampler;
} catch (const std::bad_alloc&) {
  return nullptr;
}

}  // namespace cxrfast::png
