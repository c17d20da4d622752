// inflate_avx2.cpp - the inflate kernel for x86-64 CPUs with AVX2 and BMI2.
//
// The whole kernel is compiled for them (anonymous, so that no copy of it can stand in for the portable one); the
// standard headers come before, so that their inline functions stay portable.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <utility>

#include "adler32.h"
#include "deflate_format.h"
#include "inflate_kernels.h"

#ifdef CXRFAST_INFLATE_AVX2
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif
#define CXRFAST_INFLATE_BMI2 1

namespace cxrfast::png {
namespace {

#include "inflate_kernel.h"

}  // namespace

void inflate_avx2(InflateFeed& feed, Isa isa) { run_streams(feed, isa); }

}  // namespace cxrfast::png

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
