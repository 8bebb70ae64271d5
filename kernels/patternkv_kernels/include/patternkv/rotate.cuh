// Rotation of queries and keys (rotate.py): channels times their factors, then a Walsh-Hadamard
// transform of every block of channels.
//
// A thread has 8 consecutive channels, so three of the transform's steps are its own and the others
// are exchanges between neighbouring lanes. Factors are powers of two and sums are float32: only
// results are rounded. Bound by the launch in decode and by memory in prefill.
#pragma once

#include "patternkv/bits.cuh"
#include "patternkv/layout.cuh"

namespace patternkv::rotate {

constexpr int kChannels = 8;  // of a thread
constexpr int kThreads = 128;
constexpr int kHeadThreads = HEAD_DIM / kChannels;
// The largest power of two that divides the head dim: so many channels are mixed.
constexpr int kBlock = HEAD_DIM & -HEAD_DIM;
constexpr int kLanes = kBlock / kChannels;
static_assert(kLanes >= 1 && kLanes <= 32, "the threads of a block of channels share a warp");

// bf16 or fp16 [n, heads, HEAD_DIM], 16-byte aligned vectors; strides in elements.
struct Heads {
  const void* data;
  int64_t token_stride, head_stride;
  int heads;
};

struct RotateParams {
  Heads q, k;
  const void* factors;  // [q.heads + k.heads, HEAD_DIM]
  void* out;            // [n, q.heads + k.heads, HEAD_DIM]
  int n;
};

__device__ __forceinline__ void transform(float (&x)[kChannels], int lane) {
#pragma unroll
  for (int distance = 1; distance < kChannels; distance *= 2) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      if (j & distance) continue;
      const float low = x[j], high = x[j | distance];
      x[j] = low + high, x[j | distance] = low - high;
    }
  }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float other = __shfl_xor_sync(0xffffffff, x[j], distance);
      x[j] = lane & distance ? other - x[j] : x[j] + other;
    }
  }
}

// One thread per 8 channels of n tokens with all their heads.
template <typename T>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const RotateParams p) {
  const int heads = p.q.heads + p.k.heads;
  const int64_t count = int64_t{p.n} * heads * kHeadThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  // Lanes past the end take part in the exchanges of their warp.
  const int64_t piece = min(thread, count - 1);
  const int64_t vector = piece / kHeadThreads;
  const int part = static_cast<int>(piece % kHeadThreads);
  const int64_t token = vector / heads;
  const int head = static_cast<int>(vector % heads);
  const bool is_q = head < p.q.heads;
  const Heads& of = is_q ? p.q : p.k;
  const int own = is_q ? head : head - p.q.heads;
  const T* from = static_cast<const T*>(of.data) + token * of.token_stride + own * of.head_stride;
  alignas(16) uint32_t words[2][kChannels / 2];
  *reinterpret_cast<uint4*>(words[0]) = reinterpret_cast<const uint4*>(from)[part];
  *reinterpret_cast<uint4*>(words[1]) =
      static_cast<const uint4*>(p.factors)[head * kHeadThreads + part];
  float x[kChannels], factors[kChannels];
  to_floats<T>(x, words[0]);
  to_floats<T>(factors, words[1]);
#pragma unroll
  for (int j = 0; j < kChannels; ++j) x[j] *= factors[j];
  transform(x, threadIdx.x);
  if (thread >= count) return;
  to_words<T>(words[0], x);
  static_cast<uint4*>(p.out)[piece] = *reinterpret_cast<const uint4*>(words[0]);
}

}  // namespace patternkv::rotate
