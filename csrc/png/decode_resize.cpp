// decode_resize.cpp - chunks, inflate, un-filter, grey and resample put together for a group of films.
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

// What a thread keeps between films: an NIH film needs 1.5 MiB in all, its RGBA variant 6 MiB.
constexpr size_t kKeptNbytes = size_t{8} << 20;

// Source sizes whose coefficients are kept. A data set has one; a mixed folder may have many.
constexpr size_t kKeptResamplers = 16;
static_assert(kKeptResamplers > kFilmsAtOnce, "a group holds pointers to as many");

bool is_grey8(const Header& header) {
  return header.color_type == ColorType::kGrey && header.bit_depth == 8 && !header.interlaced;
}

uint64_t pixels_of(const Header& header) { return uint64_t{header.width} * header.height; }

// The memory that a film takes at most, in bytes. size 0: not resized. Fits: sides and pixels are within their limits.
uint64_t memory_of(const Chunks& chunks, uint32_t size) {
  const Header& header = chunks.header;
  uint64_t nbytes = chunks.idat_nbytes + header.filtered_nbytes() + 3 * kPad;
  if (!is_grey8(header)) nbytes += pixels_of(header) + header.height;
  if (size > 0) nbytes += uint64_t{size} * header.height + uint64_t{16} * (header.width + header.height + size);
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
  Chunks chunks;
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

  void trim() {
    for (Buffer* buffer : {&idat, &rows, &grey, &line}) buffer->release_above(kKeptNbytes);
  }

  // Joins the payloads and describes the stream. film_nbytes and the limits were checked.
  Status open_stream(const uint8_t* file, bool needs_grey, Isa isa, InflateJob* job_ret) {
    if (!reserve(needs_grey)) return too_large(reason::kOutOfMemory);
    *job_ret = {idat.data(), chunks.idat_nbytes, rows.data(), static_cast<size_t>(chunks.header.filtered_nbytes()), {}};
    return join_idat(file, chunks, isa, idat.data());
  }
};

struct FilmDecoder::CachedResampler {
  uint32_t width, height, size;
  Resampler resampler;
};

FilmDecoder::FilmDecoder(const Limits& limits) : limits_(limits), films_(new Film[kFilmsAtOnce]) {}
FilmDecoder::~FilmDecoder() = default;

void FilmDecoder::decode_resize(FilmJob* jobs, size_t count, uint32_t size, Isa isa) {
  for (size_t at = 0; at < count; at += kFilmsAtOnce) {
    const size_t group = std::min(kFilmsAtOnce, count - at);
    decode_group(jobs + at, group, size, isa);
    for (size_t i = at; i < at + group; ++i) {
      if (jobs[i].status.ok()) continue;
      jobs[i].sum = jobs[i].sumsq = 0;
      std::memset(jobs[i].out, 0, size_t{size} * size);
    }
  }
}

void FilmDecoder::decode_group(FilmJob* jobs, size_t count, uint32_t size, Isa isa) {
  uint64_t memory = 0;
  for (size_t i = 0; i < count; ++i) {
    Chunks& chunks = films_[i].chunks;
    jobs[i].status = read_chunks(jobs[i].file, jobs[i].file_nbytes, limits_, isa, &chunks);
    if (!jobs[i].status.ok()) continue;
    const uint64_t film_memory = memory_of(chunks, size);
    if (film_memory > limits_.max_memory_nbytes) jobs[i].status = too_large(reason::kMemoryLimit);
    memory += film_memory;
  }
  if (memory > limits_.max_memory_nbytes && count > 1) {
    for (size_t i = 0; i < count; ++i) decode_group(jobs + i, 1, size, isa);
    return;
  }

  InflateJob streams[kFilmsAtOnce];
  size_t owner[kFilmsAtOnce];  // streams[k] and, later, pixels[k] belong to jobs[owner[k]]
  size_t open = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!jobs[i].status.ok()) continue;
    const bool needs_grey = !is_grey8(films_[i].chunks.header);
    jobs[i].status = films_[i].open_stream(jobs[i].file, needs_grey, isa, &streams[open]);
    if (jobs[i].status.ok()) owner[open++] = i;
  }
  inflate_zlib(streams, open, isa);

  PixelJob pixels[kFilmsAtOnce];
  size_t planes = 0;
  for (size_t k = 0; k < open; ++k) {
    const size_t i = owner[k];
    Film& film = films_[i];
    const Header& header = film.chunks.header;
    Status& status = jobs[i].status;
    status = streams[k].status;
    if (!status.ok()) {
      if (status.offset >= 0) status.offset = file_offset_of(jobs[i].file, film.chunks, status.offset);
      continue;
    }
    const Resampler* resampler = resampler_for(header, size);
    if (resampler == nullptr) {
      status = too_large(reason::kOutOfMemory);
      continue;
    }
    uint8_t* plane = nullptr;  // the filtered rows of an 8-bit grey film
    if (is_grey8(header)) {
      plane = film.rows.data();
    } else if (may_be_one_plane(header) && extract_plane(header, film.rows.data(), film.grey.data())) {
      plane = film.grey.data();
    }
    if (plane != nullptr) {
      owner[planes] = i;
      PixelJob& pixel = pixels[planes++];
      pixel.rows = plane;
      pixel.width = header.width;
      pixel.height = header.height;
      pixel.resampler = resampler;
      pixel.out = jobs[i].out;
      continue;
    }
    status = rows_to_grey(film.chunks, film.rows.data(), film.line.data(), film.grey.data());
    if (status.ok()) status = resample(*resampler, film.grey.data(), header.width, jobs[i].out, scratch_, isa);
    if (status.ok()) add_sums(jobs[i].out, size_t{size} * size, &jobs[i].sum, &jobs[i].sumsq);
  }
  unfilter_resample_grey8(pixels, planes, scratch_, isa);
  for (size_t k = 0; k < planes; ++k) {
    FilmJob& job = jobs[owner[k]];
    job.sum = pixels[k].sum;
    job.sumsq = pixels[k].sumsq;
    job.status = pixels[k].status;
    if (job.status.code == Code::kCorrupt) {
      job.status.offset = static_cast<int64_t>(films_[owner[k]].chunks.idat_offset);
    }
  }
  for (size_t i = 0; i < count; ++i) films_[i].trim();
}

Status FilmDecoder::decode(const uint8_t* file, const Chunks& chunks, uint8_t* grey, Isa isa) {
  if (memory_of(chunks, 0) > limits_.max_memory_nbytes) return too_large(reason::kMemoryLimit);
  Film& film = films_[0];
  film.chunks = chunks;
  InflateJob stream;
  Status status = film.open_stream(file, false, isa, &stream);
  if (status.ok()) {
    inflate_zlib(&stream, 1, isa);
    status = stream.status;
    if (status.offset >= 0) status.offset = file_offset_of(file, chunks, status.offset);
  }
  if (status.ok()) status = rows_to_grey(chunks, film.rows.data(), film.line.data(), grey);
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
  // Last used comes last, so the group in hand holds pointers to none of those that are dropped next.
  std::rotate(found, found + 1, resamplers_.end());
  return &resamplers_.back()->resampler;
} catch (const std::bad_alloc&) {
  return nullptr;
}

}  // namespace cxrfast::png
