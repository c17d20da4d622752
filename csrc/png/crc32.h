// crc32.h - the CRC-32 that PNG puts behind every chunk (ISO 3309; PNG specification, annex D).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace cxrfast::png {

// The CRC-32 of nbytes bytes that follow data whose CRC-32 is `crc` (0 at the start).
uint32_t crc32(uint32_t crc, const uint8_t* data, size_t nbytes, Isa isa);

// The same, and copies the bytes to `out`, which lies before them or does not overlap them.
uint32_t crc32_and_copy(uint32_t crc, const uint8_t* data, size_t nbytes, uint8_t* out, Isa isa);

}  // namespace cxrfast::png
