// lanes.cpp - asks the CPU what it runs.
#include "lanes.h"

#include <algorithm>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cxrfast {
namespace {

Level detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Level::kPortable;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Level::kAvx512 : Level::kAvx2;
#else
  return Level::kPortable;
#endif
}

}  // namespace

Level best_level() {
  static const Level highest = detect();
  const char* name = std::getenv("CXRFAST_ISA");
  if (name == nullptr) return highest;
  if (std::strcmp(name, "portable") == 0) return Level::kPortable;
  if (std::strcmp(name, "avx2") == 0) return std::min(highest, Level::kAvx2);
  return highest;
}

bool has_bf16_products() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  const bool has_matrix_unit = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
  return detect() == Level::kAvx512 && __builtin_cpu_supports("avx512bf16") && !has_matrix_unit;
#else
  return false;
#endif
}

}  // namespace cxrfast
