// decode.cpp - fuzz target: the whole decoder, any bytes as a file, against
// libpng.
//
// Never a crash or an over-read; the same verdict and image at any level, alone
// and in a group; when libpng accepts a file too, the grey image made of its
// bytes. The mutator repairs CRCs, and packs changed rows again, because a
// fuzzer would not get past those.
#include <zlib.h>

#include <algorithm>
#include <random>
#include <vector>

#include "png/decode_resize.h"
#include "png/fuzz/guarded.h"
#include "png/resample.h"
#include "tests/libpng_oracle.cpp"

using namespace cxrfast::png;
using cxrfast::png::fuzz::draw;
using cxrfast::png::fuzz::Guarded;
using cxrfast::png::fuzz::require;

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t nbytes, size_t max_nbytes);

namespace {

constexpr size_t kMaxFile = 1 << 16;
constexpr Limits kLimits = {
    .max_pixels = 1 << 14, .max_side = 1 << 12, .max_chunk_nbytes = 1 << 15, .max_memory_nbytes = 1 << 19};
constexpr uint32_t kSizes[] = {8, 16, 33, 64};

uint32_t big32(const uint8_t* data) {
  return uint32_t{data[0]} << 24 | uint32_t{data[1]} << 16 | uint32_t{data[2]} << 8 | data[3];
}

void put_big32(uint8_t* data, uint32_t value) {
  for (int i = 0; i < 4; ++i) data[i] = static_cast<uint8_t>(value >> (24 - 8 * i));
}

// Calls use(chunk, payload_nbytes) for each whole chunk.
template <typename Use>
void for_each_chunk(uint8_t* file, size_t nbytes, Use use) {
  for (size_t at = 8; at + 12 <= nbytes;) {
    const size_t length = big32(file + at);
    if (length > nbytes - at - 12) return;
    use(file + at, length);
    at += 12 + length;
  }
}

void repair_crcs(uint8_t* file, size_t nbytes) {
  for_each_chunk(file, nbytes, [](uint8_t* chunk, size_t length) {
    put_big32(chunk + 8 + length, static_cast<uint32_t>(::crc32(0, chunk + 4, static_cast<uInt>(length + 4))));
  });
}

// Inflates the file's rows, mutates them and packs them again in one IDAT
// chunk. Returns the new length, 0 if it did not fit.
size_t mutate_rows(uint8_t* file, size_t nbytes, size_t max_nbytes, std::minstd_rand& random) {
  std::vector<uint8_t> stream, rows(kMaxFile);
  size_t head = 0, tail = 0;
  for_each_chunk(file, nbytes, [&](uint8_t* chunk, size_t length) {
    if (std::memcmp(chunk + 4, "IDAT", 4) != 0) return;
    if (head == 0) head = static_cast<size_t>(chunk - file);
    stream.insert(stream.end(), chunk + 8, chunk + 8 + length);
    tail = static_cast<size_t>(chunk - file) + 12 + length;
  });
  if (head == 0) return 0;
  uLongf rows_nbytes = rows.size();
  if (uncompress(rows.data(), &rows_nbytes, stream.data(), stream.size()) != Z_OK) return 0;
  const size_t kept = rows_nbytes;
  rows_nbytes = std::max(LLVMFuzzerMutate(rows.data(), rows_nbytes, rows.size()), random() % 8 == 0 ? 0 : kept);
  std::vector<uint8_t> packed(compressBound(rows_nbytes));
  uLongf packed_nbytes = packed.size();
  compress2(packed.data(), &packed_nbytes, rows.data(), rows_nbytes, random() % 2 == 0 ? 0 : 6);
  const std::vector<uint8_t> behind(file + tail, file + nbytes);
  if (head + 12 + packed_nbytes + behind.size() > max_nbytes) return 0;
  put_big32(file + head, static_cast<uint32_t>(packed_nbytes));
  std::memcpy(file + head + 4, "IDAT", 4);
  std::copy_n(packed.begin(), packed_nbytes, file + head + 8);
  std::copy(behind.begin(), behind.end(), file + head + 12 + packed_nbytes);
  return head + 12 + packed_nbytes + behind.size();
}

// Pixel x of libpng's row as grey, by the words of the contract.
int plain_grey(const Chunks& chunks, const uint8_t* row, uint32_t x) {
  const int depth = chunks.header.bit_depth, channels = chunks.header.channels();
  const auto sample = [&](int channel) -> int {
    const size_t bit = (size_t{x} * channels + channel) * depth;
    return depth >= 8 ? row[bit / 8] : row[bit / 8] >> (8 - depth - bit % 8) & ((1 << depth) - 1);
  };
  if (chunks.header.color_type == ColorType::kPalette) return chunks.palette_grey[sample(0)];
  if (channels >= 3) return (sample(0) * 19595 + sample(1) * 38470 + sample(2) * 7471 + 0x8000) >> 16;
  return depth < 8 ? sample(0) * 255 / ((1 << depth) - 1) : sample(0);
}

void compare_with_libpng(const uint8_t* file, size_t nbytes, const Chunks& chunks, const uint8_t* grey) {
  const Header& header = chunks.header;
  const size_t row_nbytes = header.row_nbytes(header.width);
  static std::vector<uint8_t> rows;
  rows.assign(row_nbytes * header.height, 0);
  const int verdict = libpng_decode(file, nbytes, header.width, header.height, static_cast<int>(header.color_type),
                                    header.bit_depth, rows.data(), row_nbytes);
  require(verdict != 2, "the header is libpng's");
  if (verdict != 0) return;  // it also reads ancillary chunks, and has limits of its own
  for (uint32_t y = 0; y < header.height; ++y) {
    for (uint32_t x = 0; x < header.width; ++x) {
      require(grey[size_t{y} * header.width + x] == plain_grey(chunks, rows.data() + y * row_nbytes, x),
              "the image is libpng's");
    }
  }
}

// 8-bit grey, 3 x 2: stands beside the file under test.
constexpr uint8_t kNeighbour[] = {
    0x89, 'P', 'N', 'G',  '\r', '\n', 0x1A, '\n', 0,    0,    0,    13,   'I',  'H',  'D', 'R',  0,    0,    0,
    3,    0,   0,   0,    2,    8,    0,    0,    0,    0,    0xB8, 0x1F, 0x39, 0xC6, 0,   0,    0,    19,   'I',
    'D',  'A', 'T', 0x78, 0x01, 1,    8,    0,    0xF7, 0xFF, 0,    1,    2,    3,    2,   4,    5,    6,    0,
    0x52, 0,   24,  0,    0,    0,    0,    0,    0,    0,    0,    'I',  'E',  'N',  'D', 0xAE, 0x42, 0x60, 0x82};

const std::vector<uint8_t>& neighbour() {
  static const std::vector<uint8_t> file = [] {
    std::vector<uint8_t> made(std::begin(kNeighbour), std::end(kNeighbour));
    put_big32(made.data() + 56, static_cast<uint32_t>(::adler32(1, made.data() + 48, 8)));
    repair_crcs(made.data(), made.size());
    return made;
  }();
  return file;
}

Guarded* file_memory;
Guarded* own_memory;
Guarded* image_memory[4];
Guarded* grey_memory;

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  file_memory = new Guarded(kMaxFile);
  own_memory = new Guarded(kMaxFile + kInflatePad);
  for (Guarded*& memory : image_memory) memory = new Guarded(64 * 64);
  grey_memory = new Guarded(kLimits.max_pixels);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t nbytes, size_t max_nbytes, unsigned seed) {
  std::minstd_rand random(seed);
  size_t mutated = random() % 3 == 0 ? mutate_rows(data, nbytes, max_nbytes, random) : 0;
  if (mutated == 0) mutated = LLVMFuzzerMutate(data, nbytes, max_nbytes);
  if (random() % 8 != 0) repair_crcs(data, mutated);
  return mutated;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  if (nbytes > kMaxFile) return 0;
  const uint8_t* file = file_memory->copy_before_guard(data, nbytes);
  const uint32_t size = kSizes[nbytes % std::size(kSizes)];
  const size_t image_nbytes = size_t{size} * size;
  static FilmDecoder decoder(kLimits);

  // One film at a time, slowly: whole image, checked against libpng, then
  // resize.
  Chunks chunks;
  Status first = read_chunks(file, nbytes, kLimits, Isa::kPortable, &chunks);
  static std::vector<uint8_t> expected;
  expected.assign(image_nbytes, 0);  // no image is left where there is a reason
  if (first.ok()) {
    const uint32_t width = chunks.header.width, height = chunks.header.height;
    uint8_t* grey = grey_memory->before_guard(size_t{width} * height);
    first = decoder.decode(file, chunks, grey, Isa::kPortable);
    if (first.ok()) {
      compare_with_libpng(file, nbytes, chunks, grey);
      static Scratch scratch;
      static RowGroups groups;
      const Resampler resampler(width, height, size);
      require(resample(resampler, grey, width, expected.data(), groups, scratch, Isa::kPortable).ok(),
              "resample works");
    }
  }
  int64_t sum = 0, sumsq = 0;
  for (const uint8_t pixel : expected) sum += pixel, sumsq += pixel * pixel;

  // At one level, in a group of three and alone.
  const uint32_t turn = draw(data, nbytes);
  const size_t stranger = turn / 8 % 3;
  FilmJob jobs[4];
  for (size_t i = 0; i < 4; ++i) {
    jobs[i].file = i == stranger ? neighbour().data() : file;
    jobs[i].file_nbytes = i == stranger ? neighbour().size() : nbytes;
    jobs[i].out = image_memory[i]->before_guard(image_nbytes);
    std::memset(jobs[i].out, 0xEE, image_nbytes);
  }
  const size_t writable = turn / 32 % 4;
  if (writable != stranger) {
    uint8_t* const own = own_memory->before_guard(nbytes + kInflatePad);
    std::copy_n(data, nbytes, own);
    jobs[writable].file = jobs[writable].writable_file = own;
  }
  decoder.decode_resize(jobs, 4, size, static_cast<Isa>(turn % (static_cast<uint32_t>(cpu_isa()) + 1)));
  for (size_t i = 0; i < 4; ++i) {
    const Status& status = jobs[i].status;
    if (i == stranger) {
      require(status.ok(), "a bad film does not spoil its neighbour");
      continue;
    }
    require(status.ok() || (*status.message != '\0' && status.offset <= static_cast<int64_t>(nbytes)),
            "there is a reason, inside the file");
    // How much memory a film needs depends on the way: the limit may stop it on
    // one and not on the other.
    if (status.message == reason::kMemoryLimit || first.message == reason::kMemoryLimit) continue;
    require(
        status.code == first.code && std::strcmp(status.message, first.message) == 0 && status.offset == first.offset,
        "the verdict depends on the file alone");
    require(std::equal(expected.begin(), expected.end(), jobs[i].out), "the image depends on the file alone");
    require(jobs[i].sum == sum && jobs[i].sumsq == sumsq, "the sums are the image's");
  }
  return 0;
}
