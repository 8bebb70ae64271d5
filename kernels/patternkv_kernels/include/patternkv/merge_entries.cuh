// What windows and the merge of states have in common: attention in float32 by blocks of a batch
// row and some query heads of a KV head, whose warps take a few entries, tokens or states, at a
// time. One lane per entry and head has its logit, all lanes together a vector, kPerLane dims each.
#pragma once

#include "patternkv/decode_params.cuh"
#include "patternkv/decode_tile.cuh"

namespace patternkv {
namespace merge {

constexpr int kPerLane = HEAD_DIM / 32;
constexpr int kMostHeads = 4;  // of a block

// Exact tokens of rows: of row i positions [start[i], end[i]), position p at index p % size of
// ring[i].
template <typename T>
struct Window {
  T* k;  // [num_rings, size, h_kv, d]
  T* v;
  const int64_t* ring;
  const int64_t* start;
  const int64_t* end;
  // The last of them, which the ring gets: [b, h_kv, d], whose rows are some elements apart.
  const T* new_k;
  const T* new_v;
  int64_t new_k_stride, new_v_stride;
  int size;  // 0: none
};

// Of the merge, and of the windows ahead of it.
template <typename T>
struct MergeParams {
  const T* q;  // [b, h_q, d]
  int64_t q_stride;
  WorkList work;
  Window<T> window;
  float* state_out;  // as in DecodeParams
  float2* state_sum;
  int first_window_state;  // of row 0, where windows are ahead of the merge
  T* out;                  // [b, h_q, d]
  float* lse;              // [b, h_q], natural logarithm
  int h_kv, group;
  float scale_log2, cap_log2;
};

// The query heads of a block, which has a batch row and kHeads of a KV head: those from `first` on.
// Heads beyond the last are computed as that one and not written.
template <int kHeads>
struct Heads {
  int kv_head, first;

  template <typename T>
  __device__ __forceinline__ explicit Heads(const MergeParams<T>& p) {
    const int tiles = (p.group + kHeads - 1) / kHeads;
    kv_head = blockIdx.y / tiles;
    first = static_cast<int>(blockIdx.y - kv_head * tiles) * kHeads;
  }
  template <typename T>
  __device__ __forceinline__ int q_head(const MergeParams<T>& p, int h) const {
    return kv_head * p.group + min(first + h, p.group - 1);
  }
  template <typename T>
  __device__ __forceinline__ int count(const MergeParams<T>& p) const {
    return min(kHeads, p.group - first);
  }
  static dim3 grid(int64_t b, int64_t h_kv, int64_t group) {
    return dim3(static_cast<unsigned>(b),
                static_cast<unsigned>(h_kv * ((group + kHeads - 1) / kHeads)));
  }
};

// Blocks of a multiprocessor, by the registers that they need for vectors in flight.
constexpr int blocks_per_sm(int warps, int vectors) {
  return (vectors > 8 ? 16 : 24) / (HEAD_DIM <= 128 ? 1 : 2) / warps;
}

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

// What the warps of a block have, on its way to their sum.
template <int kHeads, int kWarps>
struct WarpParts {
  alignas(16) float outs[kWarps][kHeads][HEAD_DIM];
  float2 sums[kWarps][kHeads];

  // By all threads, with a barrier of the block in it.
  __device__ __forceinline__ void put(const Partial<kHeads>& partial) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) outs[warp][h][lane * kPerLane + d] = partial.out[h][d];
    }
    constexpr int kLanes = Partial<kHeads>::kLanes;
    if (lane % kLanes == 0) {
      sums[warp][lane / kLanes] = make_float2(partial.reference, partial.mass);
    }
    __syncthreads();
  }
  // `use(head, dim, out, sum)` of four dims from `dim` on of every head, by a thread each: the
  // unnormalised output, and the reference logit and mass, 0 without any entry.
  template <typename Use>
  __device__ __forceinline__ void add(int heads, Use use) const {
    constexpr int kQuads = HEAD_DIM / 4;
    for (int e = threadIdx.x; e < kHeads * kQuads; e += 32 * kWarps) {
      const int h = e / kQuads, dim = e % kQuads * 4;
      if (h >= heads) break;
      float top = -INFINITY, mass = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) top = fmaxf(top, sums[i][h].x);
      float4 out = {};
      if (top > -INFINITY) {
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
          const float weight = exp2f(sums[i][h].x - top);
          const float4 part = *reinterpret_cast<const float4*>(&outs[i][h][dim]);
          mass = fmaf(weight, sums[i][h].y, mass);
          out.x = fmaf(weight, part.x, out.x), out.y = fmaf(weight, part.y, out.y);
          out.z = fmaf(weight, part.z, out.z), out.w = fmaf(weight, part.w, out.w);
        }
      }
      use(h, dim, out, make_float2(top, mass));
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
