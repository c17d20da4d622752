// decode_png.cpp - one PNG file to a grey PGM file, by the decoder alone: an example of its use, and a check without
// Python.
//
//   c++ -std=c++20 -O3 -pthread -Icsrc tools/decode_png.cpp $(ls csrc/png/*.cpp | grep -v bind) -o decode_png
//   ./decode_png film.png film.pgm          at its own size
//   ./decode_png film.png film.pgm 224      prepared, 224 x 224
//
// Exit codes: 0 done, 1 the film is not decoded (the reason is on stderr), 2 wrong usage or output that cannot be
// written.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "png/batch.h"

using namespace cxrfast::png;

namespace {

int fail(const Status& status, const char* path) {
  static constexpr const char* kNames[] = {"ok", "corrupt", "unsupported", "too large"};
  std::fprintf(stderr, "decode_png: %s: %s: %s", path, kNames[static_cast<int>(status.code)], status.message);
  if (status.offset >= 0) std::fprintf(stderr, " at byte %lld", static_cast<long long>(status.offset));
  std::fputc('\n', stderr);
  return 1;
}

// Image and sides of the film at its own size (size 0) or prepared.
Status decode(const uint8_t* file, size_t nbytes, uint32_t size, std::vector<uint8_t>* image, uint32_t* width,
              uint32_t* height) {
  const Limits limits;
  const Isa isa = best_isa();
  FilmDecoder decoder(limits);
  if (size > 0) {
    *width = *height = size;
    image->resize(size_t{size} * size);
    FilmJob job;
    job.file = file;
    job.file_nbytes = nbytes;
    job.out = image->data();
    decoder.decode_resize(&job, 1, size, isa);
    return job.status;
  }
  Chunks chunks;
  const Status status = read_chunks(file, nbytes, limits, isa, &chunks);
  if (!status.ok()) return status;
  *width = chunks.header.width;
  *height = chunks.header.height;
  image->resize(size_t{*width} * *height);
  return decoder.decode(file, chunks, image->data(), isa);
}

}  // namespace

int main(int argc, char** argv) {
  const long size = argc == 4 ? std::strtol(argv[3], nullptr, 10) : 0;
  if (argc < 3 || argc > 4 || (argc == 4 && (size < kMinSize || size > kMaxSize))) {
    std::fprintf(stderr, "usage: decode_png FILM.png IMAGE.pgm [SIZE, %u to %u]\n", kMinSize, kMaxSize);
    return 2;
  }
  Buffer file;
  size_t nbytes = 0;
  Status status = read_file(argv[1], Limits{}, &file, &nbytes);
  if (!status.ok()) return fail(status, argv[1]);
  std::vector<uint8_t> image;
  uint32_t width = 0, height = 0;
  status = decode(file.data(), nbytes, static_cast<uint32_t>(size), &image, &width, &height);
  if (!status.ok()) return fail(status, argv[1]);

  std::FILE* out = std::fopen(argv[2], "wb");
  bool written = out != nullptr;
  if (written) {
    std::fprintf(out, "P5\n%u %u\n255\n", width, height);
    written = std::fwrite(image.data(), 1, image.size(), out) == image.size();
    written = std::fclose(out) == 0 && written;
  }
  if (!written) std::fprintf(stderr, "decode_png: %s cannot be written\n", argv[2]);
  return written ? 0 : 2;
}
