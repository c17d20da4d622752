// isa.cpp - asks the CPU (and the operating system, which must save the wide registers) what it runs.
#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace cxrfast::png {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa detect() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("pclmul"))) {
    return Isa::kPortable;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("vpclmulqdq"))) {
    return Isa::kAvx2;
  }
  return Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa best_isa() {
  Isa wanted = cpu_isa();
  if (const char* name = std::getenv("CXRFAST_ISA")) isa_from_name(name, &wanted);
  return std::min(wanted, cpu_isa());
}

void clear_upper_halves() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (cpu_isa() != Isa::kPortable) asm volatile("vzeroupper");
#endif
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const char* name, Isa* isa_ret) {
  for (int level = 0; level < 3; ++level) {
    if (std::strcmp(name, kNames[level]) == 0) {
      *isa_ret = static_cast<Isa>(level);
      return true;
    }
  }
  return false;
}

}  // namespace cxrfast::png
