// block_kernel.cuh - the passes of norm_kernels.h and image_conv.h as CUDA kernels. Knows nothing of torch.
//
// Maps are channels-last and dense, (N, H, W, C) of float, Half or BFloat16, computed in float; C is a multiple of 8 up
// to kMaxChannels. A thread keeps to a few neighbouring channels, 16 bytes of them, whose coefficients stay in its
// registers, and walks over pixels. Every block has its own part of the map, as a function of the map's shape alone;
// sums are in float over the pixels of one thread, then in double in a fixed order: the same bits on every GPU, every
// time. These passes are bound by memory: what counts is that each map is read once, and that loads are under way.
//
// The same source runs on the CPU, each CUDA thread a real one (tests/cuda_host.h).
#pragma once

#include "batch_norm.h"
#include "image_conv.h"
#include "norm_kernels.h"

#if defined(__CUDACC__)
#define CXRFAST_SHARED(type, name) __shared__ type name
#endif
#if defined(__CUDA_ARCH__)
#define CXRFAST_UNROLL _Pragma("unroll")
#define CXRFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define CXRFAST_UNROLL
#define CXRFAST_NO_UNROLL
#endif

namespace cxrfast {

constexpr int kBlockThreads = 256;
constexpr int kMaxChannels = 256;

// ---- n neighbouring channels of one pixel ----

template <int n>
struct Values {
  float v[n];
};

template <int nbytes>
struct Words;  // of one load or store
template <>
struct Words<16> {
  alignas(16) uint32_t word[4];
};
template <>
struct Words<8> {
  alignas(8) uint32_t word[2];
};
template <>
struct Words<4> {
  uint32_t word[1];
};

CXRFAST_INLINE void unpack(uint32_t word, const float*, float* to) { to[0] = float_of(word); }
CXRFAST_INLINE void unpack(uint32_t word, const BFloat16*, float* to) {
  to[0] = float_of(word << 16);
  to[1] = float_of(word & 0xFFFF0000u);
}
CXRFAST_INLINE void unpack(uint32_t word, const Half*, float* to) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(to[0]), "=f"(to[1])
      : "r"(word));
#else
  to[0] = to_real(Half{uint16_t(word)});
  to[1] = to_real(Half{uint16_t(word >> 16)});
#endif
}

CXRFAST_INLINE uint32_t pack(const float* from, const float*) { return bits_of(from[0]); }
CXRFAST_INLINE uint32_t pack(const float* from, const BFloat16*) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(from[1]), "f"(from[0]));
  return word;
#else
  BFloat16 low, high;
  from_real(from[0], &low);
  from_real(from[1], &high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
#endif
}
CXRFAST_INLINE uint32_t pack(const float* from, const Half*) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("{.reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
      : "=r"(word)
      : "f"(from[0]), "f"(from[1]));
  return word;
#else
  Half low, high;
  from_real(from[0], &low);
  from_real(from[1], &high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
#endif
}

template <int n, class T>
CXRFAST_INLINE Values<n> load(const T* from) {
  constexpr int nbytes = n * int(sizeof(T)), each = n / (nbytes / 4);
  const auto words = *reinterpret_cast<const Words<nbytes>*>(from);
  Values<n> values;
  CXRFAST_UNROLL
  for (int i = 0; i < nbytes / 4; ++i) unpack(words.word[i], from, values.v + i * each);
  return values;
}

template <int n, class T>
CXRFAST_INLINE void store(T* to, const Values<n>& values) {
  constexpr int nbytes = n * int(sizeof(T)), each = n / (nbytes / 4);
  Words<nbytes> words;
  CXRFAST_UNROLL
  for (int i = 0; i < nbytes / 4; ++i) words.word[i] = pack(values.v + i * each, to);
  *reinterpret_cast<Words<nbytes>*>(to) = words;
}

// Of bytes; n is 4 or 8.
template <int n>
struct Bytes {
  Words<n> words;
  CXRFAST_INLINE int operator[](int i) const { return int(words.word[i / 4] >> (i % 4 * 8) & 0xFFu); }
};

template <int n>
CXRFAST_INLINE Bytes<n> load_bytes(const uint8_t* from) {
  return {*reinterpret_cast<const Words<n>*>(from)};
}

template <int n>
CXRFAST_INLINE Values<n> channels(const float* of, int first) {
  Values<n> values;
  CXRFAST_UNROLL
  for (int i = 0; i < n; ++i) values.v[i] = of[first + i];
  return values;
}

template <class T>
constexpr int kWide = 16 / int(sizeof(T));  // channels of a thread in the passes that have few coefficients

// Division of 0 <= n < 2^31 by a fixed 1 <= d < 2^31 as a product: exact, since the multiplier exceeds 2^(31 + shift) /
// d by less than 2^shift / d ... 1 (Granlund & Montgomery, "Division by invariant integers using multiplication",
// 1994).
struct Divider {
  uint32_t d, multiplier;
  int shift;

  Divider() = default;
  explicit Divider(int64_t divisor) : d(uint32_t(divisor)), multiplier(0), shift(0) {
    while ((uint64_t(1) << shift) < d) ++shift;
    multiplier = uint32_t(((uint64_t(1) << (31 + shift)) + d - 1) / d);
  }
  CXRFAST_INLINE uint32_t of(uint32_t n) const { return uint32_t(uint64_t(n) * multiplier >> (31 + shift)); }
};

// By the sides of a map, which may be empty: then nothing is divided.
inline Divider divider_or_1(int64_t side) { return Divider(side > 0 ? side : 1); }

// ---- who does what ----

// Blocks for `count` pixels (or windows) of C channels: each has `each` of them a thread.
template <int n>
CXRFAST_INLINE int64_t blocks_for(int64_t count, int64_t C, int each) {
  const int64_t of_block = kBlockThreads / (C / n) * each;
  return (count + of_block - 1) / of_block;
}

// A thread's channels and pixels: base, base + step, ...
struct Place {
  int channel;
  int lane, lanes;  // which of the block's threads with the same channels; a lane >= lanes has nothing to do
};

template <int n>
__device__ inline Place place_of(int C) {
  const int groups = C / n, thread = int(threadIdx.x);
  return {thread % groups * n, thread / groups, kBlockThreads / groups};
}

// Calls use(i, fetch(i)) for this thread's pixels i of the block's part, with kAhead fetches under way. In place of
// those beyond the map's end its first one is fetched and not used.
template <int kEach, int kAhead, class Fetch, class Use>
__device__ inline void over(int64_t count, const Place& at, Fetch fetch, Use use) {
  if (at.lane >= at.lanes) return;
  const int64_t first = int64_t(blockIdx.x) * at.lanes * kEach + at.lane;
  if (first >= count) return;
  CXRFAST_NO_UNROLL
  for (int some = 0; some < kEach; some += kAhead) {
    decltype(fetch(first)) fetched[kAhead];
    CXRFAST_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + int64_t(some + k) * at.lanes;
      fetched[k] = fetch(i < count ? i : first);
    }
    CXRFAST_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + int64_t(some + k) * at.lanes;
      if (i < count) use(i, fetched[k]);
    }
  }
}

struct SumShared {
  float lanes[kBlockThreads * 8];
  double parts[kBlockThreads];
};

// to[c] = the sum over the block's lanes, for each channel.
template <int n>
__device__ inline void add_lanes(SumShared& shared, const Place& at, int C, const Values<n>& values, double* to) {
  const int thread = int(threadIdx.x);
  __syncthreads();
  if (at.lane < at.lanes) {
    CXRFAST_UNROLL
    for (int i = 0; i < n; ++i) shared.lanes[at.lane * C + at.channel + i] = values.v[i];
  }
  __syncthreads();
  const int parts = kBlockThreads / C, part = thread / C;
  double sum = 0;
  if (part < parts)
    for (int lane = part; lane < at.lanes; lane += parts) sum += double(shared.lanes[lane * C + thread % C]);
  shared.parts[thread] = sum;
  __syncthreads();
  if (thread >= C) return;
  for (int k = 1; k < parts; ++k) sum += shared.parts[k * C + thread];
  to[thread] = sum;
}

// The two sums of each channel, at this block's place.
template <int n, class Args>
__device__ inline void leave_sums(SumShared& shared, const Place& at, const Args& args, const Values<n>& first,
                                  const Values<n>& second) {
  double* to = args.partial + int64_t(blockIdx.x) * 2 * args.C;
  add_lanes(shared, at, args.C, first, to);
  add_lanes(shared, at, args.C, second, to + args.C);
}

// ---- the passes ----

// Fields as in NormJob (norm_kernels.h).
struct NormArgs {
  int64_t N, H, W;
  int C;
  const void* x;
  const void* grad;
  const float* scale;
  const float* shift;
  const float* coef;
  const uint8_t* bytes;
  int threshold;
  float keep_scale;
  void* out;
  uint8_t* place;
  double* partial;        // (blocks, 2, C)
  Divider columns, rows;  // of the pooled map; 1 where it is empty
};

inline NormArgs norm_args(const NormJob& job) {
  return {job.N,
          job.H,
          job.W,
          int(job.C),
          job.x,
          job.grad,
          job.scale,
          job.shift,
          job.coef,
          job.bytes,
          job.threshold,
          job.keep_scale,
          job.out,
          job.place,
          job.partial,
          divider_or_1(job.W / 2),
          divider_or_1(job.H / 2)};
}

constexpr int kPixels = 16;  // of a thread
constexpr int kWindows = 4;  // of a thread, in the passes that pool

template <class T, bool kHasGrad>
__global__ void __launch_bounds__(kBlockThreads) sums_kernel(NormArgs args) {
  CXRFAST_SHARED(SumShared, shared);
  constexpr int n = kWide<T>;
  const Place at = place_of<n>(args.C);
  const T* x = static_cast<const T*>(args.x) + at.channel;
  const T* grad = static_cast<const T*>(args.grad) + (kHasGrad ? at.channel : 0);
  Values<n> first{}, second{}, scale{}, shift{};
  if constexpr (kHasGrad) scale = channels<n>(args.scale, at.channel), shift = channels<n>(args.shift, at.channel);
  struct Fetched {
    Values<n> x, grad;
  };
  over<kPixels, 4>(
      args.N * args.H * args.W, at,
      [&](int64_t i) {
        Fetched f;
        f.x = load<n>(x + i * args.C);
        if constexpr (kHasGrad) f.grad = load<n>(grad + i * args.C);
        return f;
      },
      [&](int64_t, const Fetched& f) {
        CXRFAST_UNROLL
        for (int i = 0; i < n; ++i) {
          float g = f.x.v[i];
          if constexpr (kHasGrad) g = f.x.v[i] * scale.v[i] + shift.v[i] <= 0 ? 0.0f : f.grad.v[i];
          first.v[i] += g;
          second.v[i] += g * f.x.v[i];
        }
      });
  leave_sums(shared, at, args, first, second);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) relu_kernel(NormArgs args) {
  constexpr int n = kWide<T>;
  const Place at = place_of<n>(args.C);
  const T* x = static_cast<const T*>(args.x) + at.channel;
  T* out = static_cast<T*>(args.out) + at.channel;
  const Values<n> scale = channels<n>(args.scale, at.channel), shift = channels<n>(args.shift, at.channel);
  over<kPixels, 4>(
      args.N * args.H * args.W, at, [&](int64_t i) { return load<n>(x + i * args.C); },
      [&](int64_t i, Values<n> values) {
        CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) {
          const float y = values.v[k] * scale.v[k] + shift.v[k];
          values.v[k] = y < 0 ? 0.0f : y;  // this way round a NaN passes, and training's guard sees it
        }
        store(out + i * args.C, values);
      });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) relu_backward_kernel(NormArgs args) {
  constexpr int n = kWide<T>;
  const Place at = place_of<n>(args.C);
  const T* x = static_cast<const T*>(args.x) + at.channel;
  T* out = static_cast<T*>(args.out) + at.channel;  // the gradient, in place
  const Values<n> scale = channels<n>(args.scale, at.channel), shift = channels<n>(args.shift, at.channel);
  const Values<n> slope = channels<n>(args.coef, at.channel), linear = channels<n>(args.coef + args.C, at.channel);
  const Values<n> constant = channels<n>(args.coef + 2 * args.C, at.channel);
  struct Fetched {
    Values<n> x, grad;
  };
  over<kPixels, 2>(
      args.N * args.H * args.W, at,
      [&](int64_t i) { return Fetched{load<n>(x + i * args.C), load<n>(out + i * args.C)}; },
      [&](int64_t i, Fetched f) {
        CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) {
          const float value = f.x.v[k], g = value * scale.v[k] + shift.v[k] <= 0 ? 0.0f : f.grad.v[k];
          f.grad.v[k] = slope.v[k] * g + (linear.v[k] * value + constant.v[k]);
        }
        store(out + i * args.C, f.grad);
      });
}

// ---- the passes that pool: windows of two by two pixels, those of the pooled map in order ----

template <int n>
struct Window {
  Values<n> corner[4];
};

// Where a window begins in x.
CXRFAST_INLINE int64_t window_at(const NormArgs& args, int64_t window) {
  const auto n = uint32_t(window);
  const uint32_t row = args.columns.of(n), column = n - row * args.columns.d;
  const uint32_t image = args.rows.of(row), y = row - image * args.rows.d;
  return ((int64_t(image) * args.H + 2 * y) * args.W + 2 * column) * args.C;
}

CXRFAST_INLINE int64_t window_count(const NormArgs& args) { return args.N * (args.H / 2) * (args.W / 2); }

template <int n, class T>
CXRFAST_INLINE Window<n> load_window(const T* x, const NormArgs& args) {
  const int64_t below = args.W * args.C;
  return {{load<n>(x), load<n>(x + args.C), load<n>(x + below), load<n>(x + below + args.C)}};
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) pool_kernel(NormArgs args) {
  constexpr int n = kWide<T>;
  const Place at = place_of<n>(args.C);
  const T* x = static_cast<const T*>(args.x) + at.channel;
  T* out = static_cast<T*>(args.out) + at.channel;
  const Values<n> scale = channels<n>(args.scale, at.channel), shift = channels<n>(args.shift, at.channel);
  struct Fetched {
    Window<n> x;
    Bytes<n> bytes;
  };
  over<kWindows, 1>(
      window_count(args), at,
      [&](int64_t w) {
        Fetched f{};
        f.x = load_window<n>(x + window_at(args, w), args);
        if (args.bytes) f.bytes = load_bytes<n>(args.bytes + w * args.C + at.channel);
        return f;
      },
      [&](int64_t w, const Fetched& f) {
        Values<n> pooled;
        Words<n> where{};
        CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) {
          float best = f.x.corner[0].v[k] * scale.v[k] + shift.v[k];
          uint32_t corner = 0;
          CXRFAST_UNROLL
          for (int c = 1; c < 4; ++c) {  // the first of equals, as torch has it
            const float value = f.x.corner[c].v[k] * scale.v[k] + shift.v[k];
            corner = value > best ? uint32_t(c) : corner;
            best = value > best ? value : best;
          }
          const bool dead = best <= 0 || (args.bytes && f.bytes[k] < args.threshold);
          pooled.v[k] = dead ? 0.0f : best * args.keep_scale;
          where.word[k / 4] |= (dead ? uint32_t(kNowhere) : corner) << (k % 4 * 8);
        }
        store(out + w * args.C, pooled);
        *reinterpret_cast<Words<n>*>(args.place + w * args.C + at.channel) = where;
      });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) pool_backward_sums_kernel(NormArgs args) {
  CXRFAST_SHARED(SumShared, shared);
  constexpr int n = kWide<T>;
  const Place at = place_of<n>(args.C);
  const T* x = static_cast<const T*>(args.x) + at.channel;
  const T* grad = static_cast<const T*>(args.grad) + at.channel;
  Values<n> first{}, second{};
  struct Fetched {
    Window<n> x;
    Bytes<n> place;
    Values<n> grad;
  };
  over<kWindows, 1>(
      window_count(args), at,
      [&](int64_t w) {
        return Fetched{load_window<n>(x + window_at(args, w), args),
                       load_bytes<n>(args.place + w * args.C + at.channel), load<n>(grad + w * args.C)};
      },
      [&](int64_t, const Fetched& f) {
        CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) {
          const int place = f.place[k];
          float value = f.x.corner[0].v[k];
          CXRFAST_UNROLL
          for (int c = 1; c < 4; ++c) value = place == c ? f.x.corner[c].v[k] : value;
          const float g = place == kNowhere ? 0.0f : f.grad.v[k] * args.keep_scale;
          first.v[k] += g;
          second.v[k] += g * value;
        }
      });
  leave_sums(shared, at, args, first, second);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) pool_backward_kernel(NormArgs args) {
  constexpr int n = kWide<T>;
  const Place at = place_of<n>(args.C);
  const T* x = static_cast<const T*>(args.x) + at.channel;
  const T* grad = static_cast<const T*>(args.grad) + at.channel;
  T* out = static_cast<T*>(args.out) + at.channel;
  const Values<n> slope = channels<n>(args.coef, at.channel), linear = channels<n>(args.coef + args.C, at.channel);
  const Values<n> constant = channels<n>(args.coef + 2 * args.C, at.channel);
  const int64_t corners[4] = {0, args.C, args.W * args.C, (args.W + 1) * args.C};
  struct Fetched {
    Window<n> x;
    Bytes<n> place;
    Values<n> grad;
  };
  over<kWindows, 1>(
      window_count(args), at,
      [&](int64_t w) {
        return Fetched{load_window<n>(x + window_at(args, w), args),
                       load_bytes<n>(args.place + w * args.C + at.channel), load<n>(grad + w * args.C)};
      },
      [&](int64_t w, const Fetched& f) {
        T* to = out + window_at(args, w);
        CXRFAST_UNROLL
        for (int c = 0; c < 4; ++c) {
          Values<n> values;
          CXRFAST_UNROLL
          for (int k = 0; k < n; ++k) {
            const float g = f.place[k] == c ? slope.v[k] * args.keep_scale * f.grad.v[k] : 0.0f;
            values.v[k] = g + (linear.v[k] * f.x.corner[c].v[k] + constant.v[k]);
          }
          store(to + corners[c], values);
        }
      });
}

// The pixels of odd sides that no window holds; `edge` of them, see edge_count.
CXRFAST_INLINE int64_t edge_count(const NormArgs& args) {
  const int64_t column = args.W % 2 ? args.H : 0, row = args.H % 2 ? args.W - args.W % 2 : 0;
  return args.N * (column + row);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) pool_backward_edge_kernel(NormArgs args) {
  constexpr int n = kWide<T>;
  const Place at = place_of<n>(args.C);
  const Values<n> linear = channels<n>(args.coef + args.C, at.channel);
  const Values<n> constant = channels<n>(args.coef + 2 * args.C, at.channel);
  const int64_t count = edge_count(args), of_image = count / args.N, in_column = args.W % 2 ? args.H : 0;
  over<1, 1>(
      count, at, [&](int64_t i) { return i; },
      [&](int64_t i, int64_t) {
        const int64_t image = i / of_image, edge = i % of_image;
        const int64_t y = edge < in_column ? edge : args.H - 1;
        const int64_t column = edge < in_column ? args.W - 1 : edge - in_column;
        const int64_t from = ((image * args.H + y) * args.W + column) * args.C + at.channel;
        Values<n> values = load<n>(static_cast<const T*>(args.x) + from);
        CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) values.v[k] = linear.v[k] * values.v[k] + constant.v[k];
        store(static_cast<T*>(args.out) + from, values);
      });
}

// ---- the first convolution ----

// Fields as in ImageConvJob (image_conv.h), but for the image.
struct ImageConvArgs {
  int64_t N, H, W;
  int C;
  const float* padded;  // (N, H + 2, W + 2): the images with a border of zeros
  const float* kernel;
  void* out;
  const void* x;
  const void* grad;
  const float* scale;
  const float* shift;
  const float* coef;
  double* partial;        // (blocks, 2 or 9, C)
  Divider columns, rows;  // of the image
};

inline ImageConvArgs image_conv_args(const ImageConvJob& job, const float* padded) {
  return {job.N,
          job.H,
          job.W,
          int(job.C),
          padded,
          job.kernel,
          job.out,
          job.x,
          job.grad,
          job.scale,
          job.shift,
          job.coef,
          job.partial,
          divider_or_1(job.W),
          divider_or_1(job.H)};
}

constexpr int kFew = 4;           // channels of a thread: it holds nine coefficients or sums for each
constexpr int kImagePixels = 32;  // of a thread

// out (N, H + 2, W + 2) = image (N, H, W) with a border of zeros, so that no neighbour of a pixel needs a condition.
__global__ void __launch_bounds__(kBlockThreads)
    pad_image_kernel(const float* image, int64_t count, Divider padded_columns, Divider padded_rows, float* out) {
  const int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= count) return;
  const auto n = uint32_t(i), W = padded_columns.d - 2, H = padded_rows.d - 2;
  const uint32_t row = padded_columns.of(n), x = n - row * padded_columns.d - 1;
  const uint32_t of_image = padded_rows.of(row), y = row - of_image * padded_rows.d - 1;
  out[i] = x < W && y < H ? image[(int64_t(of_image) * H + y) * W + x] : 0.0f;
}

struct Taps {
  float v[9];
};

// The pixel's neighbourhood.
CXRFAST_INLINE Taps taps_at(const ImageConvArgs& args, int64_t pixel) {
  const auto n = uint32_t(pixel);
  const uint32_t row = args.columns.of(n), column = n - row * args.columns.d, image = args.rows.of(row);
  const int64_t width = args.W + 2;
  const float* from = args.padded + (int64_t(row) + 2 * image) * width + column;
  Taps taps;
  CXRFAST_UNROLL
  for (int dy = 0; dy < 3; ++dy) CXRFAST_UNROLL
  for (int dx = 0; dx < 3; ++dx) taps.v[dy * 3 + dx] = from[dy * width + dx];
  return taps;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) image_conv_kernel(ImageConvArgs args) {
  CXRFAST_SHARED(SumShared, shared);
  constexpr int n = kFew;
  const Place at = place_of<n>(args.C);
  T* out = static_cast<T*>(args.out) + at.channel;
  Values<n> kernel[9], first{}, second{};
  CXRFAST_UNROLL
  for (int tap = 0; tap < 9; ++tap) kernel[tap] = channels<n>(args.kernel + tap * args.C, at.channel);
  over<kImagePixels, 2>(
      args.N * args.H * args.W, at, [&](int64_t i) { return taps_at(args, i); },
      [&](int64_t i, const Taps& taps) {
        Values<n> values{};
        CXRFAST_UNROLL
        for (int tap = 0; tap < 9; ++tap) CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) values.v[k] += kernel[tap].v[k] * taps.v[tap];
        Words<n* int(sizeof(T))> words;
        CXRFAST_UNROLL
        for (int w = 0; w < int(sizeof words) / 4; ++w)
          words.word[w] = pack(values.v + w * (4 / int(sizeof(T))), static_cast<const T*>(nullptr));
        *reinterpret_cast<decltype(words)*>(out + i * args.C) = words;
        // the batch norm is of what was stored, not of what was rounded
        CXRFAST_UNROLL
        for (int w = 0; w < int(sizeof words) / 4; ++w)
          unpack(words.word[w], static_cast<const T*>(nullptr), values.v + w * (4 / int(sizeof(T))));
        CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) {
          first.v[k] += values.v[k];
          second.v[k] += values.v[k] * values.v[k];
        }
      });
  leave_sums(shared, at, args, first, second);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) image_conv_backward_kernel(ImageConvArgs args) {
  CXRFAST_SHARED(SumShared, shared);
  constexpr int n = kFew;
  const Place at = place_of<n>(args.C);
  const T* x = static_cast<const T*>(args.x) + at.channel;
  const T* grad = static_cast<const T*>(args.grad) + at.channel;
  const Values<n> scale = channels<n>(args.scale, at.channel), shift = channels<n>(args.shift, at.channel);
  const Values<n> slope = channels<n>(args.coef, at.channel), linear = channels<n>(args.coef + args.C, at.channel);
  const Values<n> constant = channels<n>(args.coef + 2 * args.C, at.channel);
  Values<n> sums[9] = {};
  struct Fetched {
    Values<n> x, grad;
    Taps taps;
  };
  over<kImagePixels, 2>(
      args.N * args.H * args.W, at,
      [&](int64_t i) { return Fetched{load<n>(x + i * args.C), load<n>(grad + i * args.C), taps_at(args, i)}; },
      [&](int64_t, const Fetched& f) {
        CXRFAST_UNROLL
        for (int k = 0; k < n; ++k) {
          const float value = f.x.v[k], g = value * scale.v[k] + shift.v[k] <= 0 ? 0.0f : f.grad.v[k];
          const float of_x = slope.v[k] * g + (linear.v[k] * value + constant.v[k]);
          CXRFAST_UNROLL
          for (int tap = 0; tap < 9; ++tap) sums[tap].v[k] += of_x * f.taps.v[tap];
        }
      });
  double* to = args.partial + int64_t(blockIdx.x) * 9 * args.C;
  CXRFAST_UNROLL
  for (int tap = 0; tap < 9; ++tap) add_lanes(shared, at, args.C, sums[tap], to + tap * args.C);
}

// ---- small ones ----

// sums[k] = partial[0][k] + partial[1][k] + ..., in an order that `parts` alone fixes. A block does kColumns of them.
constexpr int kColumns = 4;  // 32 bytes, which is what a GPU reads at least

__global__ void __launch_bounds__(kBlockThreads)
    finish_sums_kernel(const double* partial, int64_t parts, int64_t count, double* sums) {
  CXRFAST_SHARED(SumShared, shared);
  const int thread = int(threadIdx.x), column = thread % kColumns, row = thread / kColumns;
  constexpr int kRows = kBlockThreads / kColumns;
  const int64_t k = int64_t(blockIdx.x) * kColumns + column;
  double sum = 0;
  if (k < count)
    for (int64_t part = row; part < parts; part += kRows) sum += partial[part * count + k];
  shared.parts[thread] = sum;
  __syncthreads();
  for (int half = kRows / 2; half > 0; half /= 2) {
    if (row < half) shared.parts[thread] += shared.parts[thread + half * kColumns];
    __syncthreads();
  }
  if (row == 0 && k < count) sums[k] = shared.parts[column];
}

__global__ void __launch_bounds__(kBlockThreads) batch_norm_kernel(BatchNorm job) {
  for (int64_t c = threadIdx.x; c < job.C; c += kBlockThreads) batch_norm(job, c);
}

__global__ void __launch_bounds__(kBlockThreads) batch_norm_grad_kernel(BatchNormGrad job) {
  for (int64_t c = threadIdx.x; c < job.C; c += kBlockThreads) batch_norm_grad(job, c);
}

}  // namespace cxrfast
