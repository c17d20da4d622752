// adler32.h - the checksum of zlib streams (RFC 1950, section 9).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace cxrfast::png {

// The Adler-32 of nbytes bytes that follow data whose Adler-32 is `adler` (1 at the start).
uint32_t adler32(uint32_t adler, const uint8_t* data, size_t nbytes, Isa isa);

}  // namespace cxrfast::png
