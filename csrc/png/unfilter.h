// unfilter.h - undoes PNG's five row filters (PNG specification, section 9), for any pixel layout.
//
// Promises: every byte of the input is defined by the specification or refused; never reads or writes outside the rows.
// Left out: 8-bit grey films, the usual case, which unfilter_grey8 and unfilter_resample_grey8 (resample.h) take many
// rows at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace cxrfast::png {

enum Filter : uint8_t { kNone = 0, kSub = 1, kUp = 2, kAverage = 3, kPaeth = 4 };

// In place. rows: height rows of one filter byte and row_nbytes bytes; the filter bytes stay as they are.
// bpp: bytes per complete pixel, at least 1. The row above the first one is zeros.
// A filter byte above 4 is kCorrupt, offset = its index in `rows`; the rows below it are then left filtered.
Status unfilter(uint8_t* rows, uint32_t height, size_t row_nbytes, int bpp);

}  // namespace cxrfast::png
