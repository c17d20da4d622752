// status.h - how the decoding of one film ended, and the sentences that say why.
//
// Three ends are kept apart, because a caller does three different things: kCorrupt (the file is broken: reject it,
// with the reason and the byte), kUnsupported (valid, but not this decoder's: try another), kTooLarge (a limit, checked
// before anything is allocated). Messages are static strings, so a Status is copied freely and never allocates.
#pragma once

#include <cstdint>

namespace cxrfast::png {

enum class Code : uint8_t { kOk = 0, kCorrupt = 1, kUnsupported = 2, kTooLarge = 3 };

struct Status {
  Code code = Code::kOk;
  const char* message = "";
  int64_t offset =
      -1;  // the byte at which it was seen, counted from the start of what the function was given; -1: none

  bool ok() const { return code == Code::kOk; }
};

// The reasons, in one place: the binding, the tests and the Pillow backend's validator use the same words.
namespace reason {

// kCorrupt: the container
inline constexpr char kEmptyFile[] = "empty file";
inline constexpr char kTruncatedChunk[] = "truncated chunk";
inline constexpr char kChunkLength[] = "invalid chunk length";
inline constexpr char kChunkType[] = "invalid chunk type";
inline constexpr char kChunkOrder[] = "chunk out of order";
inline constexpr char kCrcIhdr[] = "CRC-32 mismatch in IHDR";
inline constexpr char kCrcPlte[] = "CRC-32 mismatch in PLTE";
inline constexpr char kCrcIdat[] = "CRC-32 mismatch in IDAT";
inline constexpr char kCrcIend[] = "CRC-32 mismatch in IEND";
inline constexpr char kCrcUnknown[] = "CRC-32 mismatch in an unknown critical chunk";
inline constexpr char kInvalidIhdr[] = "invalid IHDR";
inline constexpr char kInvalidPalette[] = "invalid PLTE";
inline constexpr char kNoPalette[] = "no PLTE chunk";
inline constexpr char kNoIdat[] = "no IDAT chunk";
inline constexpr char kNoIend[] = "no IEND chunk";

// kCorrupt: the zlib stream
inline constexpr char kZlibHeader[] = "invalid zlib header";
inline constexpr char kDeflateBlock[] = "invalid deflate block";
inline constexpr char kDataEndsEarly[] = "image data ends early";
inline constexpr char kTooMuchData[] = "too much image data";
inline constexpr char kAdler[] = "Adler-32 mismatch";

// kCorrupt: the rows
inline constexpr char kRowFilter[] = "bad row filter";
inline constexpr char kPaletteIndex[] = "palette index out of range";

// kCorrupt: the file itself
inline constexpr char kNoSuchFile[] = "cannot be read (No such file or directory)";
inline constexpr char kNoPermission[] = "cannot be read (Permission denied)";
inline constexpr char kNotRegularFile[] = "cannot be read (not a regular file)";
inline constexpr char kReadError[] = "cannot be read (Input/output error)";

// kUnsupported
inline constexpr char kNotPng[] = "not a PNG file";
inline constexpr char kUnknownCritical[] = "unknown critical chunk";

// kTooLarge
inline constexpr char kPixelLimit[] = "more than the pixel limit";
inline constexpr char kSideLimit[] = "a side longer than the side limit";
inline constexpr char kMemoryLimit[] = "more than the memory limit";
inline constexpr char kChunkLimit[] = "a chunk longer than the chunk limit";
inline constexpr char kOutOfMemory[] = "out of memory";

}  // namespace reason

}  // namespace cxrfast::png
