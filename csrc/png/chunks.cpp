// chunks.cpp - walks the chunks of a file (PNG specification, sections 5 and 11).
#include "chunks.h"

#include <algorithm>
#include <cstring>

#include "crc32.h"
#include "grey.h"

namespace cxrfast::png {

namespace {

constexpr uint8_t kSignature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
constexpr size_t kChunkOverhead = 12;  // length, type, CRC
constexpr uint32_t kMaxChunk = 0x7FFFFFFF;

// Above any limit that a caller may set: 8 bytes a pixel and a filter byte a row then still fit in 64 bits.
constexpr uint64_t kMaxPixels = uint64_t{1} << 48;

// Deflate's best case is 258 bytes from a length code and a distance code of one bit each.
constexpr uint64_t kMaxDeflateRatio = 258 * 8 / 2;

// No encoder expands: stored blocks add 5 bytes to 65,535. Empty blocks and bytes behind the checksum are tolerated up
// to here, so that a small image cannot ask for much memory.
constexpr uint64_t kMaxExpansion = 2, kExpansionSlack = 1 << 16;

constexpr uint32_t type_of(const char (&name)[5]) {
  return static_cast<uint32_t>(name[0]) << 24 | static_cast<uint32_t>(name[1]) << 16 |
         static_cast<uint32_t>(name[2]) << 8 | static_cast<uint32_t>(name[3]);
}
constexpr uint32_t kIhdr = type_of("IHDR"), kPlte = type_of("PLTE"), kIdat = type_of("IDAT"), kIend = type_of("IEND");

uint32_t big32(const uint8_t* data) {
  return static_cast<uint32_t>(data[0]) << 24 | static_cast<uint32_t>(data[1]) << 16 |
         static_cast<uint32_t>(data[2]) << 8 | data[3];
}

Status corrupt(const char* message, size_t offset) { return {Code::kCorrupt, message, static_cast<int64_t>(offset)}; }

bool is_critical(uint32_t type) { return (type & 0x20000000) == 0; }  // bit 5 of the first letter

bool is_letters(uint32_t type) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t letter = (type >> shift & 255) | 0x20;
    if (letter < 'a' || letter > 'z') return false;
  }
  return true;
}

struct Chunk {
  size_t offset;  // of its length field
  uint32_t type, nbytes;
  const uint8_t* data;

  size_t end() const { return offset + kChunkOverhead + nbytes; }
};

// The chunk at `offset` <= nbytes, whole inside the file.
Status read_chunk(const uint8_t* file, size_t nbytes, size_t offset, const Limits& limits, Chunk* chunk_ret) {
  const size_t left = nbytes - offset;
  if (left < kChunkOverhead) return corrupt(reason::kTruncatedChunk, offset);
  const uint32_t length = big32(file + offset);
  const uint32_t type = big32(file + offset + 4);
  if (length > kMaxChunk) return corrupt(reason::kChunkLength, offset);
  if (!is_letters(type)) return corrupt(reason::kChunkType, offset);
  if (length > left - kChunkOverhead) return corrupt(reason::kTruncatedChunk, offset);
  if (length > limits.max_chunk_nbytes) {
    return {Code::kTooLarge, reason::kChunkLimit, static_cast<int64_t>(offset)};
  }
  *chunk_ret = {offset, type, length, file + offset + 8};
  return {};
}

bool crc_matches(const Chunk& chunk, Isa isa) {
  return crc32(0, chunk.data - 4, chunk.nbytes + size_t{4}, isa) == big32(chunk.data + chunk.nbytes);
}

Status read_ihdr(const Chunk& chunk, const Limits& limits, Isa isa, Header* header_ret) {
  if (chunk.nbytes != 13) return corrupt(reason::kInvalidIhdr, chunk.offset);
  if (!crc_matches(chunk, isa)) return corrupt(reason::kCrcIhdr, chunk.offset);
  Header header;
  header.width = big32(chunk.data);
  header.height = big32(chunk.data + 4);
  header.bit_depth = chunk.data[8];
  header.color_type = static_cast<ColorType>(chunk.data[9]);
  header.interlaced = chunk.data[12] == 1;
  const uint32_t depth = header.bit_depth;
  const bool small = depth == 1 || depth == 2 || depth == 4, whole = depth == 8 || depth == 16;
  bool depth_fits = false;
  switch (header.color_type) {
    case ColorType::kGrey:
      depth_fits = small || whole;
      break;
    case ColorType::kPalette:
      depth_fits = small || depth == 8;
      break;
    case ColorType::kRgb:
    case ColorType::kGreyAlpha:
    case ColorType::kRgba:
      depth_fits = whole;
      break;
  }
  const bool sides_fit = header.width - 1 < kMaxChunk && header.height - 1 < kMaxChunk;
  if (!depth_fits || !sides_fit || chunk.data[10] != 0 || chunk.data[11] != 0 || chunk.data[12] > 1) {
    return corrupt(reason::kInvalidIhdr, chunk.offset);
  }
  const auto too_large = [&](const char* message) {
    return Status{Code::kTooLarge, message, static_cast<int64_t>(chunk.offset)};
  };
  if (header.width > limits.max_side || header.height > limits.max_side) return too_large(reason::kSideLimit);
  const uint64_t pixels = uint64_t{header.width} * header.height;
  if (pixels > std::min(limits.max_pixels, kMaxPixels)) return too_large(reason::kPixelLimit);
  *header_ret = header;
  return {};
}

Status read_palette(const Chunk& chunk, Isa isa, Chunks* chunks_ret) {
  if (!crc_matches(chunk, isa)) return corrupt(reason::kCrcPlte, chunk.offset);
  if (chunk.nbytes == 0 || chunk.nbytes % 3 != 0 || chunk.nbytes > 3 * 256) {
    return corrupt(reason::kInvalidPalette, chunk.offset);
  }
  chunks_ret->palette_size = static_cast<int>(chunk.nbytes / 3);
  for (int i = 0; i < chunks_ret->palette_size; ++i) {
    chunks_ret->palette_grey[i] = grey_of(chunk.data[3 * i], chunk.data[3 * i + 1], chunk.data[3 * i + 2]);
  }
  return {};
}

}  // namespace

int Header::channels() const {
  switch (color_type) {
    case ColorType::kGrey:
    case ColorType::kPalette:
      return 1;
    case ColorType::kGreyAlpha:
      return 2;
    case ColorType::kRgb:
      return 3;
    case ColorType::kRgba:
      return 4;
  }
  return 0;
}

uint64_t Header::filtered_nbytes() const {
  Pass passes[kMaxPasses];
  const int count = passes_of(*this, passes);
  uint64_t nbytes = 0;
  for (int i = 0; i < count; ++i) {
    if (passes[i].width > 0) nbytes += uint64_t{passes[i].height} * (1 + row_nbytes(passes[i].width));
  }
  return nbytes;
}

int passes_of(const Header& header, Pass passes[kMaxPasses]) {
  if (!header.interlaced) {
    passes[0] = {header.width, header.height, 0, 0, 1, 1};
    return 1;
  }
  // PNG specification, section 8.2: x0, y0, dx, dy of each pass
  constexpr uint32_t kAdam7[kMaxPasses][4] = {{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4},
                                              {0, 2, 2, 4}, {1, 0, 2, 2}, {0, 1, 1, 2}};
  for (int i = 0; i < kMaxPasses; ++i) {
    const auto [x0, y0, dx, dy] = kAdam7[i];
    passes[i] = {(header.width + dx - 1 - x0) / dx, (header.height + dy - 1 - y0) / dy, x0, y0, dx, dy};
  }
  return kMaxPasses;
}

Status read_chunks(const uint8_t* file, size_t nbytes, const Limits& limits, Isa isa, Chunks* chunks_ret) {
  if (nbytes == 0) return corrupt(reason::kEmptyFile, 0);
  if (nbytes < sizeof kSignature && std::memcmp(file, kSignature, nbytes) == 0) {
    return corrupt(reason::kTruncatedChunk, 0);
  }
  if (nbytes < sizeof kSignature || std::memcmp(file, kSignature, sizeof kSignature) != 0) {
    return {Code::kUnsupported, reason::kNotPng, 0};
  }

  Chunks chunks;
  Chunk chunk{};
  Status status = read_chunk(file, nbytes, sizeof kSignature, limits, &chunk);
  if (!status.ok()) return status;
  if (chunk.type != kIhdr) {
    // Apple's CgBI files begin with a critical chunk of their own; anything else is no PNG that was ever written.
    const bool foreign = is_critical(chunk.type) && chunk.type != kIdat && chunk.type != kPlte && chunk.type != kIend;
    if (foreign && crc_matches(chunk, isa)) {
      return {Code::kUnsupported, reason::kUnknownCritical, static_cast<int64_t>(chunk.offset)};
    }
    return corrupt(reason::kInvalidIhdr, chunk.offset);
  }
  status = read_ihdr(chunk, limits, isa, &chunks.header);
  if (!status.ok()) return status;
  const bool needs_palette = chunks.header.color_type == ColorType::kPalette;

  bool saw_palette = false;
  while (true) {
    const size_t offset = chunk.end();
    if (offset == nbytes) return corrupt(chunks.idat_count == 0 ? reason::kNoIdat : reason::kNoIend, offset);
    status = read_chunk(file, nbytes, offset, limits, &chunk);
    if (!status.ok()) return status;
    if (chunk.type == kIdat) {
      if (needs_palette && !saw_palette) return corrupt(reason::kNoPalette, offset);
      if (chunks.idat_count == 0) chunks.idat_offset = offset;
      if (chunks.idat_count > 0 && chunks.idat_end != offset) return corrupt(reason::kChunkOrder, offset);
      chunks.idat_count += 1;
      chunks.idat_nbytes += chunk.nbytes;
      chunks.idat_end = chunk.end();
    } else if (chunk.type == kIend) {
      if (!crc_matches(chunk, isa)) return corrupt(reason::kCrcIend, offset);
      if (chunks.idat_count == 0) return corrupt(reason::kNoIdat, offset);
      break;
    } else if (chunk.type == kPlte) {
      if (saw_palette || chunks.idat_count > 0) return corrupt(reason::kChunkOrder, offset);
      saw_palette = true;
      if (needs_palette) {  // elsewhere it only suggests colours
        status = read_palette(chunk, isa, &chunks);
        if (!status.ok()) return status;
      }
    } else if (chunk.type == kIhdr) {
      return corrupt(reason::kChunkOrder, offset);
    } else if (is_critical(chunk.type)) {
      // A flipped bit in a known name looks like an unknown one; the CRC tells them apart.
      if (!crc_matches(chunk, isa)) return corrupt(reason::kCrcUnknown, offset);
      return {Code::kUnsupported, reason::kUnknownCritical, static_cast<int64_t>(offset)};
    }
  }
  const uint64_t filtered_nbytes = chunks.header.filtered_nbytes();
  if (filtered_nbytes > kMaxDeflateRatio * chunks.idat_nbytes) return corrupt(reason::kDataEndsEarly, chunks.idat_end);
  if (chunks.idat_nbytes > kMaxExpansion * filtered_nbytes + kExpansionSlack) {
    return corrupt(reason::kTooMuchData, chunks.idat_end);
  }
  *chunks_ret = chunks;
  return {};
}

Status join_idat(const uint8_t* file, const Chunks& chunks, Isa isa, uint8_t* out, uint32_t* lengths) {
  size_t offset = chunks.idat_offset;
  for (size_t i = 0; i < chunks.idat_count; ++i) {
    const Chunk chunk{offset, kIdat, big32(file + offset), file + offset + 8};
    const uint32_t expected = big32(chunk.data + chunk.nbytes);
    const uint32_t crc = crc32_and_copy(crc32(0, chunk.data - 4, 4, isa), chunk.data, chunk.nbytes, out, isa);
    if (crc != expected) return corrupt(reason::kCrcIdat, offset);
    out += chunk.nbytes;
    lengths[i] = static_cast<uint32_t>(chunk.nbytes);
    offset = chunk.end();
  }
  return {};
}

int64_t file_offset_of(const Chunks& chunks, const uint32_t* lengths, int64_t offset) {
  auto at = static_cast<int64_t>(chunks.idat_offset);
  for (size_t i = 0; i < chunks.idat_count; ++i) {
    if (offset < lengths[i]) return at + 8 + offset;
    offset -= lengths[i];
    at += static_cast<int64_t>(kChunkOverhead + lengths[i]);
  }
  return static_cast<int64_t>(chunks.idat_end);
}

}  // namespace cxrfast::png
