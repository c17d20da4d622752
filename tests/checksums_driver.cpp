// checksums_driver.cpp - CRC-32 and Adler-32 at every level, for test_checksums.py through ctypes.
#include <sys/mman.h>

#include "png/adler32.h"
#include "png/crc32.h"

using namespace cxrfast::png;

extern "C" {

int cpu_level() { return static_cast<int>(cpu_isa()); }

int forbid(void* page, size_t nbytes) { return mprotect(page, nbytes, PROT_NONE); }

uint32_t run_crc32(uint32_t crc, const uint8_t* data, size_t nbytes, int level) {
  return crc32(crc, data, nbytes, static_cast<Isa>(level));
}

uint32_t run_crc32_and_copy(uint32_t crc, const uint8_t* data, size_t nbytes, uint8_t* out, int level) {
  return crc32_and_copy(crc, data, nbytes, out, static_cast<Isa>(level));
}

uint32_t run_adler32(uint32_t adler, const uint8_t* data, size_t nbytes, int level) {
  return adler32(adler, data, nbytes, static_cast<Isa>(level));
}
}
