// bce_auc_kernel.cuh - weighted BCE, its gradient and the AUC counts in one kernel (CUDA). Knows nothing of torch.
//
// One block takes one tile (bce_auc_math.h): it reads the tile's logits and targets once, writes the gradient, adds to
// the counts, and leaves the tile's sum; the block that finishes last adds the sums of all tiles. Every sum has the
// order that bce_auc_math.h fixes, so the result is that of bce_auc_cpu.cpp bit for bit (float64 logits: but for exp
// and log1p of the device's library). No host synchronisation, no allocation.
//
// The same source runs on the CPU, each CUDA thread a real one, in tests/test_loss_cuda_host.py: tests/cuda_host.h
// stands in for the few built-ins used here. All warp operations are made by whole warps.
#pragma once

#include "bce_auc_math.h"

#if defined(__CUDACC__)
#define CXRFAST_SHARED(type, name) __shared__ type name
#endif

namespace cxrfast {

constexpr int kThreads = kLanes;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
static_assert(kThreads % kWarp == 0 && kTile % kThreads == 0);

// Fields as in BceAucBatch (bce_auc_cpu.h), and where the sums go.
struct BceAucArgs {
  const void* logits;
  int64_t logits_stride[2];
  const float* targets;
  int64_t targets_stride[2];
  int64_t N, C;
  const float* pos_weight;
  int64_t pos_weight_stride;
  const float* class_weight;
  int64_t class_weight_stride;
  void* grad;       // or null: only counts
  int64_t* counts;  // or null
  void* loss;       // Real<T>: the mean over the known entries, 0 where there are none
  int64_t* known;
  double* tile_loss;     // (tiles,) workspace, where there are several
  int* tile_known;       // (tiles,) workspace
  unsigned* n_finished;  // workspace, 0 at the start
};

struct BceAucShared {
  uint32_t places[kTile];
  double loss[kThreads];
  int64_t known[kThreads];
  bool last;
};

// The sums of all threads' values, in lane order as a binary tree; valid in thread 0.
template <class Shared>
__device__ void add_threads(Shared& shared, double* loss, int64_t* known) {
  const int thread = int(threadIdx.x);
  shared.loss[thread] = *loss;
  shared.known[thread] = *known;
  __syncthreads();
  for (int half = kThreads / 2; half >= kWarp; half /= 2) {
    if (thread < half) {
      shared.loss[thread] += shared.loss[thread + half];
      shared.known[thread] += shared.known[thread + half];
    }
    __syncthreads();
  }
  if (thread >= kWarp) return;
  double sum = shared.loss[thread];
  int64_t count = shared.known[thread];
  for (int half = kWarp / 2; half > 0; half /= 2) {
    sum += __shfl_down_sync(kWholeWarp, sum, half);
    count += __shfl_down_sync(kWholeWarp, (long long)(count), half);
  }
  *loss = sum;
  *known = count;
}

// Adds the tile's places to the counts. A warp takes 32 rows of one class at a time and adds equal places as one: at
// the start of training all scores of a class coincide, and 32 additions to one address would queue.
__device__ inline void count_places(const BceAucArgs& args, const Tile& tile, const uint32_t* places) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int c = int(threadIdx.x) / kWarp; c < tile.width; c += kThreads / kWarp) {
    auto* counts = reinterpret_cast<unsigned long long*>(args.counts) + (tile.column + c) * (2 * kCodes);
    for (int first = 0; first < tile.rows; first += kWarp) {
      const int row = first + lane;
      const uint32_t place = row < tile.rows ? places[row * tile.width + c] : kUnknown;
      const unsigned equal = __match_any_sync(kWholeWarp, place);
      if ((place & kUnknown) == 0 && lane == __ffs(int(equal)) - 1)
        atomicAdd(counts + place, (unsigned long long)(__popc(equal)));
    }
  }
}

template <class T>
__device__ void write_mean(const BceAucArgs& args, double loss, int64_t known) {
  *static_cast<Real<T>*>(args.loss) = Real<T>(known ? loss / double(known) : 0.0);
  *args.known = known;
}

// Launch with tiles blocks (at least one) of kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads) bce_auc_kernel(BceAucArgs args, Tiling tiling) {
  CXRFAST_SHARED(BceAucShared, shared);
  const int thread = int(threadIdx.x);
  double loss = 0;
  int64_t known = 0;
  if (tiling.tiles > 0) {
    const Tile tile = tile_at(tiling, int64_t(blockIdx.x));
    for (int i = thread; i < tile.rows * tile.width; i += kThreads) {
      const int64_t row = tile.row + i / tile.width, c = tile.column + i % tile.width;
      const auto x =
          to_real(static_cast<const T*>(args.logits)[row * args.logits_stride[0] + c * args.logits_stride[1]]);
      const float y = args.targets[row * args.targets_stride[0] + c * args.targets_stride[1]];
      if (args.grad) {
        const float whole = args.class_weight ? args.class_weight[c * args.class_weight_stride] : 1.0f;
        const float positive = args.pos_weight ? args.pos_weight[c * args.pos_weight_stride] : 1.0f;
        const Entry<Real<T>> entry = bce_entry<Real<T>>(x, bce_decay(x), y, whole * positive, whole);
        static_cast<Real<T>*>(args.grad)[row * args.C + c] = entry.grad;
        loss += double(entry.loss);
        known += (y == 1.0f) | (y == 0.0f);
      }
      shared.places[i] = count_place(x, y);
    }
    __syncthreads();
    if (args.counts) count_places(args, tile, shared.places);
  }
  if (!args.grad) return;

  add_threads(shared, &loss, &known);
  if (gridDim.x == 1) {
    if (thread == 0) write_mean<T>(args, loss, known);
    return;
  }
  if (thread == 0) {
    args.tile_loss[blockIdx.x] = loss;
    args.tile_known[blockIdx.x] = int(known);
    __threadfence();  // the sums are visible before the block counts as finished
    shared.last = atomicAdd(args.n_finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.last) return;
  loss = 0;
  known = 0;
  for (int64_t tile = thread; tile < tiling.tiles; tile += kThreads) {
    loss += __ldcg(args.tile_loss + tile);  // past the L1 cache, which other blocks' writes do not reach
    known += __ldcg(args.tile_known + tile);
  }
  add_threads(shared, &loss, &known);
  if (thread == 0) write_mean<T>(args, loss, known);
}

// out[i] = grad[i] * grad_loss / known, rounded once to T; n elements, any grid of kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_grad_kernel(const Real<T>* grad, const Real<T>* grad_loss, const int64_t* known, T* out, int64_t n) {
  const Real<T> scale = Real<T>(*known ? double(*grad_loss) / double(*known) : 0.0);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) from_real(grad[i] * scale, &out[i]);
}

}  // namespace cxrfast
