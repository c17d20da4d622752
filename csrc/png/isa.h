// isa.h - which instruction sets the decoder may use.
//
// Every level gives the same bits; a level only changes speed. The level is chosen once per call and handed down as a
// value, so that a test can run all of them in one process.
#pragma once

#include <cstdint>

namespace cxrfast::png {

enum class Isa : uint8_t {
  kPortable = 0,  // plain C++: any CPU, arm64 included
  kAvx2 = 1,      // AVX2, BMI1, BMI2, PCLMULQDQ
  kAvx512 = 2,    // kAvx2 and AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI, VPCLMULQDQ
};

// The highest level that this CPU and operating system run.
Isa cpu_isa();

// cpu_isa(), lowered by the environment variable CXRFAST_ISA=portable|avx2|avx512. A name that is not known, or a level
// that the CPU has not, changes nothing. Reads the environment at every call; not safe beside a setenv in another
// thread.
Isa best_isa();

// To be called where work begins in a thread of somebody else's. Code that uses wide registers and leaves their upper
// halves dirty (ISA-L's inflate does) makes all that follows and uses the lower halves alone, as portable code does,
// wait for itself: half as slow again on a Zen 4.
void clear_upper_halves();

// "portable", "avx2" or "avx512".
const char* isa_name(Isa isa);

// The level of that name; false where there is none.
bool isa_from_name(const char* name, Isa* isa_ret);

}  // namespace cxrfast::png
