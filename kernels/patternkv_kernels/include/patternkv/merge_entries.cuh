// Attention in float32 by whole warps, as windows and the merge of states have it: a warp takes a
// few entries, tokens or states, at a time. One lane per entry and head has its logit, all lanes
// together a vector, kPerLane dims each.
#pragma once

#include "patternkv/decode_tile.cuh"

namespace patternkv {
namespace merge {

constexpr int kPerLane = HEAD_DIM / 32;

// A warp's attention for kHeads query heads: dims kPerLane * lane .. of the unnormalised outputs,
// and the reference logit and mass of the head that the lane is among kLanes to count for.
template <int kHeads>
struct Partial {
  static constexpr int kLanes = 32 / kHeads;

  float out[kHeads][kPerLane] = {};
  float reference = -INFINITY, mass = 0;

  // Adds kCount entries. The lanes of a head come in kCount groups, of an entry each: its `logit`
  // and the `share` it has of the mass at that logit. `value(entry, head)` is the entry's vector.
  template <int kCount, typename Value>
  __device__ __forceinline__ void add(float logit, float share, Value value) {
    constexpr int kSame = kLanes / kCount;
    float top = logit;
#pragma unroll
    for (int distance = kSame; distance < kLanes; distance *= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
    }
    top = fmaxf(reference, top);
    const bool none = top == -INFINITY;
    const float keep = none ? 0.0f : exp2f(reference - top);
    const float weight = none ? 0.0f : exp2f(logit - top);
    float sum = weight * share;
#pragma unroll
    for (int distance = kSame; distance < kLanes; distance *= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
    }
    mass = fmaf(mass, keep, sum);
    reference = top;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float kept = __shfl_sync(~0u, keep, h * kLanes);
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) out[h][d] *= kept;
#pragma unroll
      for (int entry = 0; entry < kCount; ++entry) {
        const float own = __shfl_sync(~0u, weight, h * kLanes + entry * kSame);
        const float (&x)[kPerLane] = value(entry, h);
#pragma unroll
        for (int d = 0; d < kPerLane; ++d) out[h][d] = fmaf(own, x[d], out[h][d]);
      }
    }
  }
};

// A lane's dims of a row.
template <typename T>
__device__ __forceinline__ void load_dims(float (&x)[kPerLane], const T* row, int lane) {
  const T* from = row + lane * kPerLane;
  if constexpr (kPerLane % 2 == 1) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = load_float(from + i);
  } else {
    uint32_t words[kPerLane * sizeof(T) / 4];
    load_words(words, reinterpret_cast<const uint8_t*>(from));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = load_float(reinterpret_cast<const T*>(words) + i);
  }
}

// Sums over the warp of kCount values, a power of two: lane i gets that of number i kCount / 32. In
// halves, of which a lane keeps one, down to kHalf values.
template <int kCount, int kHalf = kCount / 2>
__device__ __forceinline__ float spread_sums(float (&x)[kCount]) {
  if constexpr (kHalf > 0) {
    constexpr int kDistance = 32 * kHalf / kCount;
    const bool upper = threadIdx.x & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? x[i] : x[i + kHalf];
      x[i] = (upper ? x[i + kHalf] : x[i]) + __shfl_xor_sync(~0u, given, kDistance);
    }
    return spread_sums<kCount, kHalf / 2>(x);
  } else {
#pragma unroll
    for (int distance = 16 / kCount; distance > 0; distance /= 2) {
      x[0] += __shfl_xor_sync(~0u, x[0], distance);
    }
    return x[0];
  }
}

}  // namespace merge
}  // namespace patternkv
