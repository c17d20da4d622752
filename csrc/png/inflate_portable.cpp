// inflate_portable.cpp - the inflate kernel for any 64-bit little-endian CPU.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <utility>

#include "adler32.h"
#include "deflate_format.h"
#include "inflate_kernels.h"

namespace cxrfast::png {
namespace {

#include "inflate_kernel.h"

}  // namespace

void inflate_portable(InflateFeed& feed) { run_streams(feed, Isa::kPortable); }

}  // namespace cxrfast::png
