// pixel_kernels_impl.h - un-filter as a wavefront and resample by multiply-adds, over any vector width.
//
// Each instruction set's file defines `Lanes`, its vectors of kBytes pixels, and includes this file where its
// instructions are switched on. Operations are within 128-bit parts wherever the instruction set has them so; the order
// of rows is chosen so that it comes out right (part q holds rows 16 q .. 16 q + 15).
#include <algorithm>
#include <cstring>

#include "pixel_kernels.h"
#include "unfilter.h"

namespace cxrfast::png {

namespace {

constexpr size_t kPart = 16;  // bytes of a 128-bit part
static_assert(kTransposeColumns == kPart);

// Transposes 16 x 16 bytes in each part: four rounds that interleave the upper half of the vectors with the lower one.
template <typename V>
inline __attribute__((always_inline)) void transpose(typename V::U8 (&v)[kPart]) {
  typename V::U8 t[kPart];
  for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      t[2 * i] = V::interleave_low(v[i], v[i + 8]);
      t[2 * i + 1] = V::interleave_high(v[i], v[i + 8]);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      v[2 * i] = V::interleave_low(t[i], t[i + 8]);
      v[2 * i + 1] = V::interleave_high(t[i], t[i + 8]);
    }
  }
}

// Note [un-filter as a wavefront]
// A pixel needs its left neighbour, so a row is one chain of dependent steps; but a row may follow the one above one
// column behind. Lane k is row k: in step t it un-filters column t - k. What lies above it then is lane k - 1's result
// of step t - 1, what lies above left that of step t - 2.
//
// Only the first lane of each 128-bit part stays one column further behind, and with it all that follow: lane k is at
// column t - delay(k), delay(k) = k + k / 16. Moving a pixel from one part to the next takes the processor several
// cycles, and so it has a whole step of time for it.
//
// Lanes hold complements (255 - value): with those, pavgb's rounding up is the rounding down that Average asks for, and
// the other predictors do not change, for they only compare and choose. value = x + predictor becomes
// ~value = ~predictor - x.
//
// The filter of a lane is three masks that turn neighbours into zero before one Paeth predictor for all: None sees only
// zeros, Sub only a, Up only b. Average sees a and b, but not c: so c is at least both (zero is 255 as a complement),
// and the lower one is chosen; in its place lies the mean.
template <typename V, size_t kVectors>
struct Wavefront {
  using U8 = typename V::U8;
  static constexpr size_t kBytes = V::kBytes;
  static constexpr size_t kRows = kBytes * kVectors;
  static constexpr size_t delay(size_t k) { return k + k / kPart; }
  static_assert(kRows <= kMaxGroupRows && delay(kRows - 1) <= kMaxDelay && kBytes <= kAboveLead);

  // Steps between two transpositions: four parts, so that a cache line of a row is read at one go. (Rows of 1025 bytes,
  // each read one column further left, lie 1024 bytes apart, and a first-level cache has only four places for those.)
  static constexpr size_t kBlock = kBlockColumns;

  // Of two vectors the second one rests until its first lane begins, the first one once its last lane has ended. (With
  // shorter vectors it costs what it spares.)
  static constexpr bool kRests = kVectors == 2 && kBytes == 64;

  // A mask is a vector of 0xff and 0, or a register of its own kind with operations that take one.
  static constexpr bool kByteMasks = sizeof(typename V::Where) == kBytes;

  struct Masks {
    alignas(64) uint8_t a[kRows], b[kRows], c[kRows];  // 0xff where that neighbour counts as zero
    alignas(64) uint8_t mean[kRows];                   // 0xff where the filter is Average
  };

  static void set_masks(const uint8_t* rows, size_t count, size_t row_nbytes, Masks& masks) {
    uint8_t filters[kRows];
    for (size_t k = 0; k < kRows; ++k) filters[k] = k < count ? rows[k * row_nbytes] : static_cast<uint8_t>(kNone);
    for (size_t k = 0; k < kRows; ++k) {  // by vectors, for what it reads lies side by side
      const uint8_t filter = filters[k];
      masks.a[k] = filter == kSub || filter == kPaeth || filter == kAverage ? 0 : 0xff;
      masks.b[k] = filter == kUp || filter == kPaeth || filter == kAverage ? 0 : 0xff;
      masks.c[k] = filter == kPaeth ? 0 : 0xff;
      masks.mean[k] = filter == kAverage ? 0xff : 0;
    }
  }

  // For the vector of steps k, kPart + k, .. of a part's lanes: what k must reach for those to be pixels of the row.
  struct Waits {
    alignas(64) uint8_t of[kRows / kPart][kBytes];
  };
  static constexpr Waits kWaits = [] {
    Waits waits{};
    for (size_t k = 0; k < kRows; ++k) {
      for (size_t i = k % kPart; i < kBytes; i += kPart) {
        const size_t first_step = i / kPart * kPart;
        waits.of[k / kPart][i] = static_cast<uint8_t>(std::max(delay(k), first_step) - first_step);
      }
    }
    return waits;
  }();

  // The neighbour nearest to a + b - c. With low <= high the values of a and b: if c - low >= 2 (high - c), the sum
  // lies at or below low; if high - c >= 2 (c - low), at or above high; else c is nearest. Subtraction that stops at 0
  // makes that right outside [low, high] too, and equal distances fall as the specification has them (tested over all
  // 2^24 triples). The doubles would not fit into bytes: n >= 2 k is k < n / 2 + 1, which is the mean of n and 1.
  // `low_or_mean` takes the place of low. The result is that less x.
  static inline __attribute__((always_inline)) U8 unfilter(U8 a, U8 b, U8 c, typename V::Where is_average, U8 x) {
    const U8 low = V::min(a, b), high = V::max(a, b);
    const U8 below = V::subtract_to_zero(c, low), over = V::subtract_to_zero(high, c);
    const U8 one = V::fill(1), below_half = V::mean(below, one), over_half = V::mean(over, one);
    if constexpr (kByteMasks) {
      const U8 low_or_mean = V::max(low, V::both(V::mean(a, b), is_average));
      const U8 high_or_c = V::where_not_less(below, over_half, c, high);
      return V::subtract(V::where_not_less(over, below_half, high_or_c, low_or_mean), x);
    } else {
      return V::nearest_less(x, over, below_half, V::mean_where(is_average, a, b, low), below, over_half, high, c);
    }
  }

  // Un-filters rows and calls done(block, step, steps) after each block of steps: block[t][k] is lane k's result of
  // step `step` + t as a complement. A ring holds the last kRing steps; done may read those before the block as well.
  template <size_t kRing, typename Done>
  static inline __attribute__((always_inline)) void run(uint8_t (*ring)[kRows], const uint8_t* rows, size_t count,
                                                        size_t width, uint8_t* above, Done done) {
    static_assert(kRing % kBlock == 0);
    const size_t row_nbytes = width + 1;
    Masks masks;
    set_masks(rows, count, row_nbytes, masks);

    // Column -delay(k) of row k. The lanes of missing rows repeat the last one: their results are never read.
    const uint8_t* source[kRows];
    for (size_t k = 0; k < kRows; ++k) {
      const size_t row = std::min(k, count - 1);
      source[k] = rows + row * row_nbytes + 1 - delay(row);
    }

    // What goes into a block of steps, a part's lanes after another's: whole vectors are stored.
    alignas(64) uint8_t input[kRows / kPart][kBlock][kPart];
    const U8 zeros = V::fill(0xff);  // as complements
    U8 left[kVectors], above_left[kVectors], carried[kVectors];
    for (size_t v = 0; v < kVectors; ++v) left[v] = above_left[v] = carried[v] = zeros;
    carried[0] = V::carry(V::load_unaligned(above + 1 - kBytes), zeros);
    typename V::Where is_average[kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
      const U8 mean = V::load(masks.mean + v * kBytes);
      if constexpr (kByteMasks) {
        is_average[v] = mean;
      } else {
        is_average[v] = V::where(mean);
      }
    }

    const size_t last_delay = delay(count - 1), steps = width + last_delay;
    for (size_t step = 0; step < steps; step += kBlock) {
      uint8_t (*const block)[kRows] = ring + step % kRing;
      const size_t block_steps = std::min(kBlock, (steps - step + kBytes - 1) / kBytes * kBytes);
      for (size_t part = 0; part < kRows; part += kPart) {
        if (kRests && (step + block_steps <= delay(part) || step >= width + delay(part + kPart - 1))) continue;
        for (size_t t = 0; t < block_steps; t += kBytes) {
          U8 x[kPart];
#pragma GCC unroll 16
          for (size_t k = 0; k < kPart; ++k) x[k] = V::load_unaligned(source[part + k] + step + t);
          transpose<V>(x);
          uint8_t* const to = input[part / kPart][t];
#pragma GCC unroll 16
          for (size_t k = 0; k < kPart; ++k) V::store(to + k * kBytes, x[k]);
          if (step + t < delay(part + kPart - 1)) {  // zero up to the first pixel
            const U8 wait = V::load(kWaits.of[part / kPart]);
            for (size_t k = 0; k < kPart; ++k) {
              const U8 now = V::fill(static_cast<uint8_t>(step + t + k));
              V::store(to + k * kBytes, V::where_not_less(now, wait, V::load(to + k * kBytes), V::fill(0)));
            }
          }
        }
      }
      const size_t needed_steps = std::min(block_steps, steps - step);
      // Steps t .. end - 1 of vectors kFirst .. kEnd - 1.
      const auto take = [&]<size_t kFirst, size_t kEnd>(size_t t, size_t end) __attribute__((always_inline)) {
        for (; t < end; ++t) {
          const size_t input_at = t / kBytes * kBytes + t % kPart * (kBytes / kPart) + t % kBytes / kPart;
          U8 up[kVectors];
#pragma GCC unroll 8
          for (size_t v = kFirst; v < kEnd; ++v) {
            up[v] = V::shift_in(carried[v], left[v]);
            carried[v] = V::carry(v > 0 ? left[v - 1] : V::load_unaligned(above + (step + t + 2) - kBytes), left[v]);
          }
#pragma GCC unroll 8
          for (size_t v = kFirst; v < kEnd; ++v) {
            const size_t at = v * kBytes;
            const U8 a = V::either(left[v], V::load(masks.a + at));
            const U8 b = V::either(up[v], V::load(masks.b + at));
            left[v] = unfilter(a, b, above_left[v], is_average[v],
                               V::load_parts(input[at / kPart][input_at], sizeof input[0]));
            above_left[v] = V::either(b, V::load(masks.c + at));
            V::store(block[t] + at, left[v]);
          }
        }
      };
      if constexpr (kRests) {
        // The second one begins early enough to take from the first one what its first lane finds above itself.
        const auto within = [&](size_t at) { return std::clamp(at, step, step + needed_steps) - step; };
        const size_t both = within(delay(kBytes) - 2), second = within(width + delay(kBytes - 1));
        take.template operator()<0, 1>(0, both);
        take.template operator()<0, 2>(both, second);
        take.template operator()<1, 2>(second, needed_steps);
      } else {
        take.template operator()<0, kVectors>(0, needed_steps);
      }
      // The last row is the one above the next group. Its columns were all read as such at least a step ago.
      if (step + block_steps > last_delay) {
        const size_t first = last_delay > step ? last_delay - step : 0;
        const uint8_t* last_row = &block[first][count - 1];
        uint8_t* to = above + (step + first - last_delay);
#pragma GCC unroll 8
        for (size_t t = first; t < block_steps; ++t, last_row += kRows) *to++ = *last_row;
      }
      done(block, step, block_steps);
    }
  }

  static void unfilter_rows(const uint8_t* rows, size_t count, size_t width, uint8_t* above, uint8_t* window,
                            size_t window_stride) {
    alignas(64) uint8_t ring[kBlock][kRows];
    run<kBlock>(ring, rows, count, width, above, [&](const uint8_t (*block)[kRows], size_t step, size_t block_steps) {
      for (size_t part = 0; part < kRows; part += kPart) {
        for (size_t t = 0; t < block_steps; t += kBytes) {
          U8 x[kPart];
#pragma GCC unroll 16
          for (size_t k = 0; k < kPart; ++k) x[k] = V::load_parts(block[t + k] + part, kPart * kRows);
          transpose<V>(x);
          uint8_t* row = window + part * window_stride + step + t - delay(part);
#pragma GCC unroll 16
          for (size_t k = 0; k < kPart; ++k) V::store_unaligned(row + k * (window_stride - 1), V::complement(x[k]));
        }
      }
    });
  }
};

// ---- resample ----

template <typename V>
struct Lines {
  using U8 = typename V::U8;
  using I32 = typename V::I32;
  static constexpr size_t kLines = V::kBytes;           // in one go, as four vectors of 32-bit sums
  static constexpr size_t kCellNbytes = 4 * V::kBytes;  // one cell of all those lines
  static constexpr size_t kChunkCells = kTransposeColumns / V::kTaps;

  // 16 columns from `column` on of kLines lines, as cells. Vector v, part q holds lines 16 q + 4 v .. + 3, so that
  // packing four vectors of sums to bytes leaves the lines in order.
  static inline __attribute__((always_inline)) void spread(const uint8_t* const* lines, size_t column, uint8_t* tile) {
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; ++v) {
      const typename V::Cells cells = V::cells(lines + 4 * v, column);
#pragma GCC unroll 8
      for (size_t i = 0; i < kChunkCells; ++i) V::store(tile + i * kCellNbytes + v * V::kBytes, cells.v[i]);
    }
  }

  // Outputs first .. last - 1 of the lines in the tile, which begins with cell tile_start; the first `count` lines of
  // each go to out. A function of its own, so that its sums keep the registers to themselves.
  static __attribute__((noinline)) void weigh(const OutputSpan* first, const OutputSpan* last, const int32_t* weights,
                                              const uint8_t* tile, ptrdiff_t tile_start, uint8_t* out,
                                              size_t out_stride, size_t count) {
    constexpr size_t kDigits = digits_of(V::kTaps);
    for (const OutputSpan* span = first; span != last; ++span, out += out_stride) {
      I32 sums[kDigits][4];
#pragma GCC unroll 3
      for (size_t d = 0; d < kDigits; ++d) {
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; ++v) sums[d][v] = V::fill32(d + 1 < kDigits ? 0 : 1 << (kWeightBits - 1));
      }
      const int32_t* weight = weights + span->weights_at;
      const int32_t* const end = weight + span->cells * kDigits;
      const uint8_t* pixels_at = tile + (static_cast<ptrdiff_t>(span->first_cell) - tile_start) * kCellNbytes;
      do {
        I32 digit[kDigits];
#pragma GCC unroll 3
        for (size_t d = 0; d < kDigits; ++d) digit[d] = V::fill32(weight[d]);
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; ++v) {
          const I32 pixels = V::loaded(V::load(pixels_at + v * V::kBytes));
#pragma GCC unroll 3
          for (size_t d = 0; d < kDigits; ++d) sums[d][v] = V::loaded(V::multiply_add(sums[d][v], pixels, digit[d]));
        }
        pixels_at += kCellNbytes;
        weight += kDigits;
      } while (weight != end);
#pragma GCC unroll 3
      for (size_t d = 1; d < kDigits; ++d) {
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; ++v) sums[d][v] = V::template shift_add<kDigitBits>(sums[d - 1][v], sums[d][v]);
      }
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; ++v) sums[0][v] = V::template shift_down<kWeightBits>(sums[kDigits - 1][v]);
      const U8 result = V::pack(sums[0][0], sums[0][1], sums[0][2], sums[0][3]);
      if (count == kLines) {
        V::store_unaligned(out, result);
      } else {
        alignas(64) uint8_t some[kLines];
        V::store(some, result);
        std::memcpy(out, some, count);
      }
    }
  }

  static void resample_lines(const PackedWeights& packed, const uint8_t* lines, size_t line_stride, size_t count,
                             uint8_t* out, size_t out_stride, uint8_t* tile, size_t tile_nbytes) {
    const OutputSpan* spans = packed.spans.data();
    const size_t outputs = packed.spans.size(), tile_cells = tile_nbytes / kCellNbytes / kChunkCells * kChunkCells;
    for (size_t first_line = 0; first_line < count; first_line += kLines) {
      const size_t line_count = std::min(kLines, count - first_line);
      const uint8_t* line[kLines];
      for (size_t i = 0; i < kLines; ++i) {
        line[i] = lines + (first_line + std::min(i, line_count - 1)) * line_stride;
      }
      uint8_t* to = out + first_line;
      for (size_t o = 0; o < outputs;) {
        // A tile of columns, and all output pixels that need no other column.
        const size_t tile_start = spans[o].first_cell / kChunkCells * kChunkCells;
        size_t end = o + 1, tile_end = spans[o].end_cell();
        while (end < outputs && spans[end].end_cell() <= tile_start + tile_cells) {
          tile_end = std::max(tile_end, spans[end].end_cell());
          ++end;
        }
        for (size_t cell = tile_start; cell < tile_end; cell += kChunkCells) {
          spread(line, V::kTaps * cell, tile + (cell - tile_start) * kCellNbytes);
        }
        weigh(spans + o, spans + end, packed.words.data(), tile, static_cast<ptrdiff_t>(tile_start),
              to + o * out_stride, out_stride, line_count);
        o = end;
      }
    }
  }
};

// ---- both ----

// Note [resample along the wavefront]
// The wavefront leaves one column after the other of many rows, which is what resample wants: no need to turn its
// results back into rows first. Only the lanes' delays must go. Lane k of step t is column t - delay(k); with
// k = 16 q + 4 j + i, that is column y - 4 j of row k where y = t - (delay(16 q) + i).
// - delay(16 q): each part of a vector is loaded from a step of its own.
// - i: two selections between neighbouring steps, one for each bit of i.
// - 4 j: interleaving a few columns to cells puts those lanes into vector j of four; it is stored 4 j columns further
//   left.
template <typename V, size_t kVectors>
struct Columns {
  using U8 = typename V::U8;
  using W = Wavefront<V, kVectors>;
  using L = Lines<V>;
  static constexpr size_t kBytes = V::kBytes, kTaps = V::kTaps, kChunk = kTransposeColumns;
  static constexpr size_t kRing = 2 * W::kBlock;
  static constexpr size_t kAhead = kChunk + 2;  // a chunk of kChunk columns takes its last pixel so many steps on
  static constexpr ptrdiff_t kLeadCells = 12 / kTaps;  // cells that the last of four vectors lies behind the first

  // Vector v of a step works on columns that lie so far behind the step: all its parts have got there, and what it
  // needs next is still in the ring when the next block is.
  static constexpr size_t lag(size_t v) {
    return (W::delay((v + 1) * kBytes - kPart) + 3 + kChunk - 1) / kChunk * kChunk;
  }
  static_assert(lag(0) <= kRing - W::kBlock && lag(kVectors - 1) - W::delay((kVectors - 1) * kBytes) <= W::kBlock);

  // The cell of kTaps columns of lines: in each part, vector j holds its lines 4 j .. 4 j + 3.
  static inline __attribute__((always_inline)) void interleave_cell(const U8* columns, U8 (&cell)[4]) {
    const U8 low = V::interleave_low(columns[0], columns[1]), high = V::interleave_high(columns[0], columns[1]);
    if constexpr (kTaps == 2) {
      const U8 zero = V::fill(0);
      cell[0] = V::interleave_low(low, zero);
      cell[1] = V::interleave_high(low, zero);
      cell[2] = V::interleave_low(high, zero);
      cell[3] = V::interleave_high(high, zero);
    } else {
      const U8 low2 = V::interleave_low(columns[2], columns[3]), high2 = V::interleave_high(columns[2], columns[3]);
      cell[0] = V::interleave_pairs_low(low, low2);
      cell[1] = V::interleave_pairs_high(low, low2);
      cell[2] = V::interleave_pairs_low(high, high2);
      cell[3] = V::interleave_pairs_high(high, high2);
    }
  }

  // Columns y .. y + 15 of the rows of vector v into the tile, where `at` is the place of column y.
  static inline __attribute__((always_inline)) void align(const uint8_t (*ring)[W::kRows], size_t v, size_t y,
                                                          uint8_t* at) {
    const uint8_t* parts[kBytes / kPart];
    for (size_t q = 0; q < kBytes / kPart; ++q) {
      const size_t lane = v * kBytes + q * kPart;
      parts[q] = ring[(y + W::delay(lane)) % kRing] + lane;
    }
    U8 step[kAhead + 1];
#pragma GCC unroll 19
    for (size_t i = 0; i <= kAhead; ++i) step[i] = V::load_parts_of(parts, i * W::kRows);
#pragma GCC unroll 18
    for (size_t i = 0; i < kAhead; ++i) step[i] = V::odd_lanes(step[i], step[i + 1]);
#pragma GCC unroll 16
    for (size_t i = 0; i < kChunk; ++i) step[i] = V::complement_odd_pairs(step[i], step[i + 2]);
#pragma GCC unroll 8
    for (size_t i = 0; i < kChunk; i += kTaps) {
      U8 cell[4];
      interleave_cell(step + i, cell);
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; ++j) {
        const ptrdiff_t behind = static_cast<ptrdiff_t>(i / kTaps) - static_cast<ptrdiff_t>(j * 4 / kTaps);
        V::store(at + behind * static_cast<ptrdiff_t>(L::kCellNbytes) + j * kBytes, cell[j]);
      }
    }
  }

  // The rows of one vector on their way to outputs.
  struct Part {
    uint8_t* tile;         // room for tile_cells cells
    ptrdiff_t tile_start;  // its first cell
    size_t y;              // columns before this one have been aligned, but for kLeadCells
    size_t output;         // the next one

    void advance(const uint8_t (*ring)[W::kRows], size_t v, size_t end, size_t tile_cells, const PackedWeights& packed,
                 uint8_t* out, size_t out_stride, size_t count) {
      if (output == packed.spans.size()) return;
      const OutputSpan *const spans = packed.spans.data(), *const last = spans + packed.spans.size();
      const OutputSpan* const next = spans + output;
      ptrdiff_t cell = static_cast<ptrdiff_t>(y / kTaps);
      if (static_cast<ptrdiff_t>(end / kTaps) > tile_start + static_cast<ptrdiff_t>(tile_cells)) {
        const ptrdiff_t first = std::min(static_cast<ptrdiff_t>(next->first_cell), cell - kLeadCells);
        std::memmove(tile, tile + (first - tile_start) * L::kCellNbytes, (cell - first) * L::kCellNbytes);
        tile_start = first;
      }
      for (; y < end; y += kChunk, cell += kChunk / kTaps) {
        align(ring, v, y, tile + (cell - tile_start) * L::kCellNbytes);
      }
      const OutputSpan* ready = next;
      while (ready != last && static_cast<ptrdiff_t>(ready->end_cell()) <= cell - kLeadCells) ++ready;
      L::weigh(next, ready, packed.words.data(), tile, tile_start, out + output * out_stride, out_stride, count);
      output = ready - spans;
    }
  };

  static void unfilter_resample(const uint8_t* rows, size_t count, size_t width, uint8_t* above,
                                const PackedWeights& packed, uint8_t* out, size_t out_stride, uint8_t* tile,
                                size_t tile_nbytes) {
    const size_t tile_cells = tile_nbytes / kVectors / L::kCellNbytes, vectors = (count + kBytes - 1) / kBytes;
    Part parts[kVectors];
    for (size_t v = 0; v < kVectors; ++v) parts[v] = {tile + v * tile_cells * L::kCellNbytes, -kLeadCells, 0, 0};
    const auto advance = [&](const uint8_t (*ring)[W::kRows], size_t v, size_t end) {
      parts[v].advance(ring, v, end, tile_cells, packed, out + v * kBytes, out_stride,
                       std::min(kBytes, count - v * kBytes));
    };
    // Behind the ring, the first steps once more, so that a chunk need not wrap round.
    alignas(64) uint8_t ring[kRing + kAhead][W::kRows];
    size_t steps = 0;
    W::template run<kRing>(ring, rows, count, width, above,
                           [&](const uint8_t (*block)[W::kRows], size_t step, size_t block_steps) {
                             if (block == ring) std::memcpy(ring[kRing], ring, kAhead * W::kRows);
                             steps = step + block_steps;
                             for (size_t v = 0; v < vectors; ++v) {
                               if (steps > lag(v)) advance(ring, v, steps - lag(v));
                             }
                           });
    for (size_t v = 0; v < vectors; ++v) {
      while (parts[v].output < packed.spans.size()) advance(ring, v, parts[v].y + kChunk);
    }
  }
};

template <typename V>
void sum_pixels(const uint8_t* pixels, size_t count, int64_t* sum_ret, int64_t* sumsq_ret) {
  constexpr size_t kRun = size_t{1} << 16;  // 2^16 * 255^2 < 2^32
  *sum_ret = *sumsq_ret = 0;
  for (size_t start = 0; start < count; start += kRun) {
    uint32_t sum = 0, sumsq = 0;
    const size_t end = std::min(count, start + kRun);
    for (size_t i = start; i < end; ++i) {
      sum += pixels[i];
      sumsq += uint32_t{pixels[i]} * pixels[i];
    }
    *sum_ret += sum;
    *sumsq_ret += sumsq;
  }
}

template <typename V, size_t kVectors>
constexpr PixelKernels kernels_of() {
  return {Wavefront<V, kVectors>::kRows,           V::kTaps,
          Wavefront<V, kVectors>::unfilter_rows,   Lines<V>::resample_lines,
          Columns<V, kVectors>::unfilter_resample, sum_pixels<V>};
}

}  // namespace

}  // namespace cxrfast::png
