// limits.h - what one film may cost. Every limit is checked before anything is allocated for the film.
#pragma once

#include <cstdint>

namespace cxrfast::png {

struct Limits {
  // 2^26: an 8192 x 8192 film, twice the largest detector. Width * height is computed in 64 bits.
  uint64_t max_pixels = uint64_t{1} << 26;
  // Longest side. Bounds the resampler's coefficients (8 bytes for each source column and row: 1 MiB).
  uint32_t max_side = uint32_t{1} << 16;
  // Longest chunk, IDAT included. PNG itself allows 2^31 - 1.
  uint32_t max_chunk_nbytes = uint32_t{1} << 28;
  // Working memory of a film: file (where the decoder reads it itself), joined IDAT payloads, filtered rows, the grey
  // image of films that are not 8-bit grey, the rows between the two passes of the resampler. Also bounds a group of
  // films that one thread decodes together: a group over it is decoded one film at a time.
  uint64_t max_memory_nbytes = uint64_t{1} << 28;
};

}  // namespace cxrfast::png
