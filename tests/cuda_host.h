// cuda_host.h - the CUDA built-ins that csrc/loss/bce_auc_kernel.cuh uses, on the CPU: every CUDA thread is a real one.
//
// Barriers are pthread's, atomics are the compiler's, so that ThreadSanitizer sees them. Two blocks run at a time, so
// that it sees races between blocks too. Promises less order than a GPU, not more, but for these: warps do not run in
// lockstep, warp operations are made by whole warps, __threadfence is nothing of its own (atomicAdd releases and
// acquires).
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)

namespace cuda_host {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr int kConcurrentBlocks = 2;

struct Index {
  unsigned x;
};

struct Block {
  pthread_barrier_t all;
  pthread_barrier_t warp[kMaxWarps];
  uint64_t exchanged[kMaxWarps][kWarpSize];
  alignas(64) unsigned char shared[48 << 10];
};

inline thread_local Block* block;

inline uint64_t* exchange(const void* value, size_t size);
inline void wait_warp();

}  // namespace cuda_host

inline thread_local cuda_host::Index threadIdx, blockIdx, gridDim;

namespace cuda_host {

inline void wait_warp() { pthread_barrier_wait(&block->warp[threadIdx.x / kWarpSize]); }

// Shows the warp a value of every lane. The caller reads, then calls wait_warp, after which the slots are free again.
inline uint64_t* exchange(const void* value, size_t size) {
  uint64_t* slots = block->exchanged[threadIdx.x / kWarpSize];
  memcpy(&slots[threadIdx.x % kWarpSize], value, size);
  wait_warp();
  return slots;
}

// Runs kernel() as a grid of blocks and waits for it.
template <class Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
  std::vector<Block> places(kConcurrentBlocks);
  std::vector<std::thread> running;
  for (Block& place : places) {
    pthread_barrier_init(&place.all, nullptr, threads);
    for (unsigned warp = 0; warp < threads / kWarpSize; ++warp)
      pthread_barrier_init(&place.warp[warp], nullptr, kWarpSize);
  }
  for (unsigned first = 0; first < unsigned(kConcurrentBlocks) && first < blocks; ++first)
    for (unsigned thread = 0; thread < threads; ++thread)
      running.emplace_back([=, &places] {
        block = &places[first];
        threadIdx = {thread};
        gridDim = {blocks};
        for (unsigned index = first; index < blocks; index += kConcurrentBlocks) {
          if (thread == 0) memset(block->shared, 0xA5, sizeof block->shared);
          pthread_barrier_wait(&block->all);
          blockIdx = {index};
          kernel();
          pthread_barrier_wait(&block->all);
        }
      });
  for (std::thread& thread : running) thread.join();
  for (Block& place : places) {
    pthread_barrier_destroy(&place.all);
    for (unsigned warp = 0; warp < threads / kWarpSize; ++warp) pthread_barrier_destroy(&place.warp[warp]);
  }
}

}  // namespace cuda_host

#define CXRFAST_SHARED(type, name) type& name = *reinterpret_cast<type*>(cuda_host::block->shared)

inline void __syncthreads() {
#ifndef CXRFAST_DROP_BARRIERS  // the test of the test: without barriers ThreadSanitizer must complain
  pthread_barrier_wait(&cuda_host::block->all);
#endif
}

inline void __threadfence() {}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const uint64_t* slots = cuda_host::exchange(&value, sizeof value);
  const unsigned lane = threadIdx.x % cuda_host::kWarpSize + unsigned(delta);
  if (lane < cuda_host::kWarpSize) memcpy(&value, &slots[lane], sizeof value);
  cuda_host::wait_warp();
  return value;
}

inline unsigned __match_any_sync(unsigned, uint32_t value) {
  const uint64_t* slots = cuda_host::exchange(&value, sizeof value);
  unsigned equal = 0;
  for (int lane = 0; lane < cuda_host::kWarpSize; ++lane) equal |= unsigned(uint32_t(slots[lane]) == value) << lane;
  cuda_host::wait_warp();
  return equal;
}
