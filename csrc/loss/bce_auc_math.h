// bce_auc_math.h - the arithmetic of weighted_bce_auc, once, for the CPU and the CUDA file.
//
// Promises: every function is a fixed sequence of IEEE operations without fused multiply-add (both files are compiled
// with contraction off), and the order of every sum is fixed by the tile geometry below, never by threads or vector
// width. So the CPU, whatever its instruction set, and CUDA give the same bits for the same batch.
// Left out: soft targets (1, 0, and everything else unknown), weights per sample.
#pragma once

#include <cmath>
#include <cstdint>

#include "../half.h"

namespace cxrfast {

// ---- types ----

// The type that a logit is computed in.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

CXRFAST_INLINE double to_real(double value) { return value; }
CXRFAST_INLINE void from_real(double value, double* out) { *out = value; }

// ---- the loss of one entry ----

// exp(-m) for m >= 0 or NaN; 0 from 87.7 on, where the value is subnormal. Cody & Waite: 2^-k * exp(r), |r| <= ln2 / 2;
// exp(r) = 1 + r + r^2 q(r) with q fitted for relative error 3e-9.
CXRFAST_INLINE float exp_minus(float m) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kRound = 12582912.0f;     // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  constexpr float kLn2High = 0.693359375f;  // 9 significant bits: its product with k < 2^8 is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  float t = m > 88.0f ? 88.0f : m;  // so written that NaN stays NaN
  float rounded = t * kLog2e + kRound;
  float k = rounded - kRound;
  float r = (k * kLn2High - t) + k * kLn2Low;
  // Estrin's order: a loop over entries is bound by the length of this chain, not by the number of operations.
  float r2 = r * r;
  float q = (0.499999940f + 0.166665211f * r) + r2 * ((0.0416683890f + 0.00836871751f * r) + r2 * 0.00138145966f);
  float p = 1.0f + (r + r2 * q);
  // k = 127, which t > 87.7 gives, makes the exponent field 0: times zero.
  float scale = float_of((127u + bits_of(kRound) - bits_of(rounded)) << 23);
  return p * scale;
}
CXRFAST_INLINE double exp_minus(double m) { return exp(-m); }

// log(1 + z) for z in [0, 1]: 2 atanh(s), s = z / (2 + z) <= 1/3; the series of atanh refitted for relative error 5e-9.
CXRFAST_INLINE float log1p_unit(float z) {
  float s = z / (2.0f + z);
  float u = s * s;
  float g = (0.333332062f + 0.200108498f * u) + (u * u) * (0.139995635f + 0.140122667f * u);
  float twice = s + s;
  return twice + (twice * u) * g;
}
CXRFAST_INLINE double log1p_unit(double z) { return log1p(z); }

template <class R>
struct Entry {
  R loss;
  R grad;  // d loss / d logit
};

// class_weight * (pos_weight * y * softplus(-x) + (1 - y) * softplus(x)) and its derivative, for logit x and target y;
// w_pos = class_weight * pos_weight, w_neg = class_weight. With a = -x for a positive and x for a negative, the loss is
// w * softplus(a) and the derivative +-w * sigmoid(a), neither with a cancellation. z = exp_minus(|x|) is handed in, so
// that a loop can do it first: two short chains keep a CPU busier than a long one.
template <class R>
CXRFAST_INLINE R bce_decay(R x) {
  return exp_minus(x < R(0) ? -x : x);
}

template <class R>
CXRFAST_INLINE Entry<R> bce_entry(R x, R z, float y, float w_pos, float w_neg) {
  bool positive = y == 1.0f;
  bool known = positive | (y == 0.0f);
  R a = positive ? -x : x;
  R w = R(positive ? w_pos : w_neg);
  R softplus = (a < R(0) ? R(0) : a) + log1p_unit(z);
  R sigmoid = (a < R(0) ? z : R(1)) / (R(1) + z);
  R slope = (positive ? -w : w) * sigmoid;
  return {known ? w * softplus : R(0), known ? slope : R(0)};
}

// ---- the score's place in the counts ----

constexpr int kCodes = 1 << 16;
constexpr uint32_t kNanCode = kCodes - 1;        // fp16's canonical NaN; no number has it
constexpr uint32_t kUnknown = 0x80000000u;       // set in a place: do not count
constexpr uint32_t kPlaceMask = 2 * kCodes - 1;  // label * kCodes + code

// Where logit x with target y is counted inside its class: label * kCodes + order-preserving code of the fp16 score.
CXRFAST_INLINE uint32_t count_place(float x, float y) {
  bool positive = y == 1.0f;
  bool known = positive | (y == 0.0f);
  uint32_t bits = bits_of(x);
  uint32_t h = half_magnitude(x);
  // Negative numbers count down from the middle; -0 is 0.
  uint32_t flip = uint32_t(int32_t(bits) >> 31) & 0xFFFFu;
  uint32_t code = (0x8000u | h) ^ (h != 0 ? flip : 0u);
  code = (bits & 0x7FFFFFFFu) > 0x7F800000u ? kNanCode : code;
  return code | (positive ? uint32_t(kCodes) : 0u) | (known ? 0u : kUnknown);
}
// Rounding a double in two steps keeps the order, which is all that a code promises.
CXRFAST_INLINE uint32_t count_place(double x, float y) { return count_place(float(x), y); }

// ---- the order of the sums ----

// Entries are taken in tiles of whole rows (or, for more classes than kTile, of one row's next kTile classes). Entry i
// of a tile goes to lane i % kLanes, the lanes are added as a binary tree, tile t goes to lane t % kLanes of a last sum
// over the tiles, which ends in the same tree. All in double.
constexpr int kTile = 1024;
constexpr int kLanes = 256;

struct Tiling {
  int64_t N, C;    // rows and classes
  int64_t width;   // classes in a tile
  int64_t rows;    // rows in a tile
  int64_t blocks;  // tiles side by side
  int64_t tiles;
};

CXRFAST_INLINE Tiling tiling_of(int64_t N, int64_t C) {
  Tiling t{N, C, C < kTile ? C : kTile, 1, 0, 0};
  if (N == 0 || C == 0) return t;
  t.rows = kTile / t.width;
  t.blocks = (C + t.width - 1) / t.width;
  t.tiles = (N + t.rows - 1) / t.rows * t.blocks;
  return t;
}

struct Tile {
  int64_t row, column;  // of its first entry
  int rows, width;
};

CXRFAST_INLINE Tile tile_at(const Tiling& t, int64_t index) {
  Tile tile;
  tile.row = index / t.blocks * t.rows;
  tile.column = index % t.blocks * t.width;
  tile.rows = int(t.N - tile.row < t.rows ? t.N - tile.row : t.rows);
  tile.width = int(t.C - tile.column < t.width ? t.C - tile.column : t.width);
  return tile;
}

}  // namespace cxrfast
