// loss_cuda_host.cpp - runs the CUDA kernels of csrc/loss/bce_auc_kernel.cuh on the CPU (cuda_host.h).
//
// As a library it has two C functions, for tests/test_loss_cuda_host.py. As a program (-DCXRFAST_MAIN, with
// bce_auc_cpu.cpp) it compares both implementations bit for bit, for ThreadSanitizer; exit code 1 where they differ.
#include <vector>

// clang-format off: the kernel is written in the built-ins that the first one defines
#include "cuda_host.h"
#include "../csrc/loss/bce_auc_kernel.cuh"
// clang-format on

using namespace cxrfast;

template <class T>
static void run(BceAucArgs args) {
  const Tiling tiling = tiling_of(args.N, args.C);
  const auto blocks = unsigned(tiling.tiles > 0 ? tiling.tiles : 1);
  std::vector<double> tile_loss(blocks);
  std::vector<int> tile_known(blocks);
  unsigned n_finished = 0;
  args.tile_loss = tile_loss.data();
  args.tile_known = tile_known.data();
  args.n_finished = &n_finished;
  cuda_host::launch(blocks, kThreads, [=] { bce_auc_kernel<T>(args, tiling); });
}

template <class T>
static void scale(const void* grad, const void* grad_loss, const int64_t* known, void* out, int64_t n) {
  cuda_host::launch(2, kThreads, [=] {
    scale_grad_kernel<T>(static_cast<const Real<T>*>(grad), static_cast<const Real<T>*>(grad_loss), known,
                         static_cast<T*>(out), n);
  });
}

// dtype: 0 float32, 1 float16, 2 bfloat16, 3 float64.
extern "C" void bce_auc_host(int dtype, const BceAucArgs* args) {
  if (dtype == 0) run<float>(*args);
  if (dtype == 1) run<Half>(*args);
  if (dtype == 2) run<BFloat16>(*args);
  if (dtype == 3) run<double>(*args);
}

extern "C" void scale_grad_host(int dtype, const void* grad, const void* grad_loss, const int64_t* known, void* out,
                                int64_t n) {
  if (dtype == 0) scale<float>(grad, grad_loss, known, out, n);
  if (dtype == 1) scale<Half>(grad, grad_loss, known, out, n);
  if (dtype == 2) scale<BFloat16>(grad, grad_loss, known, out, n);
  if (dtype == 3) scale<double>(grad, grad_loss, known, out, n);
}

#ifdef CXRFAST_MAIN

#include <cstdio>
#include <random>

#include "../csrc/loss/bce_auc_cpu.h"

static bool same(int64_t N, int64_t C, bool equal_scores) {
  std::mt19937 random(unsigned(N * 1000 + C));
  std::normal_distribution<float> normal(0, 3);
  const size_t n = size_t(N * C);
  std::vector<float> x(n), y(n), weight(size_t(C), 2.5f), grad(n), grad_cpu(n);
  for (size_t i = 0; i < n; ++i) {
    x[i] = equal_scores ? 0.25f : normal(random);
    y[i] = float(int(random() % 3)) - 1.0f;  // -1: unknown
  }
  std::vector<int64_t> counts(size_t(C) * 2 * kCodes), counts_cpu(counts);
  float loss = -1;
  int64_t known = -1;
  run<float>({x.data(),
              {C, 1},
              y.data(),
              {C, 1},
              N,
              C,
              weight.data(),
              1,
              nullptr,
              0,
              grad.data(),
              counts.data(),
              &loss,
              &known,
              nullptr,
              nullptr,
              nullptr});
  const BceAucSums sums = bce_auc_cpu<float>(
      {x.data(), {C, 1}, y.data(), {C, 1}, N, C, weight.data(), 1, nullptr, 0, grad_cpu.data(), counts_cpu.data()}, 1,
      nullptr);
  const auto mean = float(sums.known ? sums.loss / double(sums.known) : 0.0);
  const bool equal = loss == mean && known == sums.known && grad == grad_cpu && counts == counts_cpu;
  std::printf("%lld x %lld: loss %.9g, known %lld: %s\n", (long long)N, (long long)C, double(loss), (long long)known,
              equal ? "same" : "DIFFERENT");
  return equal;
}

int main() {
  bool equal = same(1, 1, false);
  equal &= same(40, 14, false);
  equal &= same(74, 14, true);    // two blocks
  equal &= same(220, 14, false);  // four: both places run two
  return equal ? 0 : 1;
}

#endif
