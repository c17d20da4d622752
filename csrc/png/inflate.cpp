#include "inflate.h"

namespace cxrfast::png {

void inflate_zlib(InflateJob* jobs, size_t count, Isa) {
  for (size_t i = 0; i < count; ++i) inflate_zlib_careful(jobs[i]);
}

}  // namespace cxrfast::png
