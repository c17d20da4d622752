// bce_auc_cpu.cpp - weighted BCE, its gradient and the AUC counts on the CPU (bce_auc_cpu.h).
//
// The loops over a tile are plain; the compiler vectorises them, once for the baseline and once for AVX2. The formula
// and the order of the sums are bce_auc_math.h's, so both give the same bits. CXRFAST_ISA=portable picks the first.
#include "bce_auc_cpu.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "bce_auc_math.h"

namespace cxrfast {
namespace {

// Tiles between their computation and their counting, which is also the distance of the threads' barriers: enough to
// hide a barrier of about 5 us, few enough for their places (128 KiB) to stay in the cache and on any thread's stack.
constexpr int kGroup = 32;

// The lanes end as sum[0]; a binary tree.
CXRFAST_INLINE double add_lanes(double* sum) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

// ---- one tile ----
// Indices are 64-bit: Python's build flags give int a defined overflow (-fwrapv), which would forbid vectors.

// T's values of a tile as a row of R; the tile itself where it already is one.
template <class R, class T>
CXRFAST_INLINE const R* tile_values(const T* base, const int64_t* stride, const Tile& tile, R* buffer) {
  const T* first = base + tile.row * stride[0] + tile.column * stride[1];
  const bool dense = stride[1] == 1 && (tile.rows == 1 || stride[0] == tile.width);
  if constexpr (sizeof(T) == sizeof(R))
    if (dense) return reinterpret_cast<const R*>(first);
  if (dense) {
    for (int64_t i = 0; i < int64_t(tile.rows) * tile.width; ++i) buffer[i] = to_real(first[i]);
  } else {
    for (int64_t row = 0; row < tile.rows; ++row)
      for (int64_t c = 0; c < tile.width; ++c)
        buffer[row * tile.width + c] = to_real(first[row * stride[0] + c * stride[1]]);
  }
  return buffer;
}

// weights: w_pos then w_neg, kTile each, laid out like a tile. places: kTile, written where the batch has counts.
template <class T>
CXRFAST_INLINE BceAucSums tile_body(const BceAucBatch& batch, const Tile& tile, const float* weights,
                                    uint32_t* places) {
  using R = Real<T>;
  R x_buffer[kTile], grad_buffer[kTile], decay[kLanes], loss[kLanes];
  float y_buffer[kTile];
  const R* x = tile_values<R>(static_cast<const T*>(batch.logits), batch.logits_stride, tile, x_buffer);
  const float* y = tile_values<float>(batch.targets, batch.targets_stride, tile, y_buffer);
  const int64_t n = int64_t(tile.rows) * tile.width;
  BceAucSums sums{0, 0};

  if (batch.counts)
    for (int64_t i = 0; i < n; ++i) places[i] = count_place(x[i], y[i]);
  if (!batch.grad) return sums;

  const bool whole_rows = tile.width == batch.C;
  R* grad_out = static_cast<R*>(batch.grad) + tile.row * batch.C + tile.column;
  R* grad = whole_rows ? grad_out : grad_buffer;
  double lanes[kLanes] = {};
  int known = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    for (int64_t j = 0; j < m; ++j) decay[j] = bce_decay<R>(x[i + j]);
    for (int64_t j = 0; j < m; ++j) {
      Entry<R> entry = bce_entry<R>(x[i + j], decay[j], y[i + j], weights[i + j], weights[kTile + i + j]);
      grad[i + j] = entry.grad;
      loss[j] = entry.loss;
      known += (y[i + j] == 1.0f) | (y[i + j] == 0.0f);
    }
    for (int64_t j = 0; j < m; ++j) lanes[j] += double(loss[j]);
  }
  if (!whole_rows)
    for (int64_t row = 0; row < tile.rows; ++row)
      memcpy(grad_out + row * batch.C, grad + row * tile.width, sizeof(R) * size_t(tile.width));
  sums.known = known;
  sums.loss = add_lanes(lanes);
  return sums;
}

template <class T>
using TileFunction = BceAucSums (*)(const BceAucBatch&, const Tile&, const float*, uint32_t*);

template <class T>
BceAucSums tile_portable(const BceAucBatch& b, const Tile& t, const float* w, uint32_t* p) {
  return tile_body<T>(b, t, w, p);
}

template <class T>
CXRFAST_INLINE void scale_body(const Real<T>* grad, Real<T> scale, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_real(grad[i] * scale, &out[i]);
}

template <class T>
void scale_portable(const Real<T>* grad, Real<T> scale, T* out, int64_t n) {
  scale_body<T>(grad, scale, out, n);
}

#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2"))) BceAucSums tile_avx2(const BceAucBatch& b, const Tile& t, const float* w, uint32_t* p) {
  return tile_body<T>(b, t, w, p);
}

template <class T>
__attribute__((target("avx2"))) void scale_avx2(const Real<T>* grad, Real<T> scale, T* out, int64_t n) {
  scale_body<T>(grad, scale, out, n);
}

bool use_avx2() {
  static const bool use = [] {
    const char* isa = std::getenv("CXRFAST_ISA");
    return !(isa && std::strcmp(isa, "portable") == 0) && __builtin_cpu_supports("avx2");
  }();
  return use;
}
#endif

template <class T>
TileFunction<T> tile_function() {
#if defined(__x86_64__)
  if (use_avx2()) return tile_avx2<T>;
#endif
  return tile_portable<T>;
}

void run_serial(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) { body(0, n, context); }

// Adds the places of `size` tiles from `first` on to the counts of the classes in [begin, end). Class by class, so that
// one class's counters (some 100 KB in use) stay in the cache while they are added to; row by row, the counters of one
// code in all classes, which lie a multiple of 1 MiB apart, would also meet in one set of it.
void count_classes(const BceAucBatch& batch, const Tiling& tiling, int64_t first, int size,
                   const uint32_t (*places)[kTile], int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    int64_t* counts = batch.counts + c * (2 * kCodes);
    for (int i = 0; i < size; ++i) {
      const Tile tile = tile_at(tiling, first + i);
      if (c < tile.column || c >= tile.column + tile.width) continue;
      const uint32_t* place = places[i] + (c - tile.column);
      for (int row = 0; row < tile.rows; ++row, place += tile.width)
        counts[*place & kPlaceMask] += (*place & kUnknown) == 0;
    }
  }
}

// w_pos and w_neg of the tile's classes, repeated for each of its rows, so that the loop over entries knows no classes.
void lay_out_weights(const BceAucBatch& batch, int64_t column, int width, int rows, float* weights) {
  for (int c = 0; c < width; ++c) {
    const float whole = batch.class_weight ? batch.class_weight[(column + c) * batch.class_weight_stride] : 1.0f;
    const float positive = batch.pos_weight ? batch.pos_weight[(column + c) * batch.pos_weight_stride] : 1.0f;
    weights[c] = whole * positive;
    weights[kTile + c] = whole;
  }
  for (int done = width, n = rows * width; done < n; done *= 2)
    for (float* first : {weights, weights + kTile})
      memcpy(first + done, first, sizeof(float) * size_t(done < n - done ? done : n - done));
}

// ---- groups of tiles ----

template <class T>
struct Group {
  const BceAucBatch* batch;
  const Tiling* tiling;
  TileFunction<T> tile_function;
  const float* weights;  // of all tiles, where they lie in one column
  int64_t first;         // tile
  int size;              // tiles
  BceAucSums sums[kGroup];
  uint32_t places[kGroup][kTile];

  static void run_tiles(int64_t begin, int64_t end, void* context) {
    Group& group = *static_cast<Group*>(context);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = tile_at(*group.tiling, group.first + i);
      float own_weights[2 * kTile];
      const float* weights = group.weights;
      if (group.tiling->blocks > 1) {
        lay_out_weights(*group.batch, tile.column, tile.width, tile.rows, own_weights);
        weights = own_weights;
      }
      group.sums[i] = group.tile_function(*group.batch, tile, weights, group.places[i]);
    }
  }

  static void run_classes(int64_t begin, int64_t end, void* context) {
    Group& group = *static_cast<Group*>(context);
    count_classes(*group.batch, *group.tiling, group.first, group.size, group.places, begin, end);
  }
};

}  // namespace

template <class T>
BceAucSums bce_auc_cpu(const BceAucBatch& batch, int threads, ParallelFor parallel_for) {
  const Tiling tiling = tiling_of(batch.N, batch.C);
  BceAucSums total{0, 0};
  if (tiling.tiles == 0) return total;
  float weights[2 * kTile];
  if (tiling.blocks == 1)
    lay_out_weights(batch, 0, int(tiling.width), int(batch.N < tiling.rows ? batch.N : tiling.rows), weights);
  double lanes[kLanes] = {};
  Group<T> group;
  group.batch = &batch;
  group.tiling = &tiling;
  group.tile_function = tile_function<T>();
  group.weights = weights;
  const bool threaded = threads > 1 && batch.N * batch.C >= kThreadedEntries;
  const ParallelFor run = threaded ? parallel_for : run_serial;
  for (group.first = 0; group.first < tiling.tiles; group.first += kGroup) {
    group.size = int(tiling.tiles - group.first < kGroup ? tiling.tiles - group.first : kGroup);
    run(group.size, Group<T>::run_tiles, &group);
    if (batch.counts) run(batch.C, Group<T>::run_classes, &group);
    for (int i = 0; i < group.size; ++i) {
      lanes[(group.first + i) % kLanes] += group.sums[i].loss;
      total.known += group.sums[i].known;
    }
  }
  total.loss = add_lanes(lanes);
  return total;
}

template <class T>
void scale_grad_cpu(const void* grad, double scale, void* out, int64_t n) {
  const auto* in = static_cast<const Real<T>*>(grad);
  auto* scaled = static_cast<T*>(out);
#if defined(__x86_64__)
  if (use_avx2()) return scale_avx2<T>(in, Real<T>(scale), scaled, n);
#endif
  scale_portable<T>(in, Real<T>(scale), scaled, n);
}

void auc_pairs_cpu(const int64_t* counts, int64_t C, double (*pairs)[4]) {
  for (int64_t c = 0; c < C; ++c) {
    const int64_t* negatives = counts + c * (2 * kCodes);
    const int64_t* positives = negatives + kCodes;
    int64_t below = 0, n_positive = 0;
    double won = 0, tied = 0;
    for (int code = 0; code < kCodes; ++code) {
      if (positives[code]) {
        won += double(positives[code]) * double(below);
        tied += double(positives[code]) * double(negatives[code]);
        n_positive += positives[code];
      }
      below += negatives[code];
    }
    pairs[c][0] = won;
    pairs[c][1] = tied;
    pairs[c][2] = double(below);
    pairs[c][3] = double(n_positive);
  }
}

#define CXRFAST_INSTANTIATE(T)                                              \
  template BceAucSums bce_auc_cpu<T>(const BceAucBatch&, int, ParallelFor); \
  template void scale_grad_cpu<T>(const void* grad, double scale, void* out, int64_t n);
CXRFAST_INSTANTIATE(float)
CXRFAST_INSTANTIATE(double)
CXRFAST_INSTANTIATE(Half)
CXRFAST_INSTANTIATE(BFloat16)
#undef CXRFAST_INSTANTIATE

}  // namespace cxrfast
