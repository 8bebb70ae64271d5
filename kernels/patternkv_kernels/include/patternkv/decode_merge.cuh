// The end of a decode layer: attention over each row's exact window, then the merge of its states.
// One block per batch row and KV head. It starts while the attention kernels still run and waits
// for their states only once the window is done.
#pragma once

#include "patternkv/decode_tile.cuh"

namespace patternkv {
namespace merge {

constexpr int kMergeThreads = 512;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kPerLane = HEAD_DIM / 32;
constexpr float kLn2 = 0.6931471805599453f;

template <typename T>
struct MergeParams {
  const T* q;  // [b, h_q, d]
  int64_t q_stride;
  WorkList work;
  const float* state_out;
  const float2* state_sum;
  T* out;      // [b, h_q, d]
  float* lse;  // [b, h_q], natural logarithm
  // Exact tokens of row i: positions [start[i], end[i]), position p at index p % window of ring[i].
  const T* window_k;  // [num_rings, window, h_kv, d]
  const T* window_v;
  const int64_t* ring;
  const int64_t* start;
  const int64_t* end;
  int window;  // 0: none
  int h_kv, group;
  float scale_log2, cap_log2;
};

// Attention of part of a row's tokens: dims kPerLane * lane .. of the unnormalised output.
struct Partial {
  float out[kPerLane] = {};
  float reference = -INFINITY, mass = 0;

  // Makes room for logits up to `top`; returns the reference, -inf if there is nothing yet.
  __device__ __forceinline__ float raise(float top) {
    top = fmaxf(reference, top);
    if (top > reference) {
      const float keep = exp2f(reference - top);
      mass *= keep;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) out[i] *= keep;
      reference = top;
    }
    return top;
  }
  __device__ __forceinline__ void add(float weight, const float (&value)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[i] = fmaf(weight, value[i], out[i]);
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

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  }
  return x;
}

// Tokens part, part + parts, ... of the row's window.
template <typename T>
__device__ void attend_window(const MergeParams<T>& p, Partial& partial, int row, int head,
                              int q_head, int part, int parts) {
  constexpr int kBatch = 4;  // tokens in flight
  const int lane = threadIdx.x % 32;
  float q[kPerLane];
  load_dims(q, p.q + row * p.q_stride + q_head * HEAD_DIM, lane);
  const int64_t ring = p.ring[row] * p.window, start = p.start[row], end = p.end[row];
  for (int64_t first = start + part; first < end; first += kBatch * parts) {
    float k[kBatch][kPerLane], v[kBatch][kPerLane], logits[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t position = min(first + i * parts, end - 1);
      const int64_t at = ((ring + position % p.window) * p.h_kv + head) * HEAD_DIM;
      load_dims(k[i], p.window_k + at, lane);
      load_dims(v[i], p.window_v + at, lane);
    }
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float dot = 0;
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) dot = fmaf(q[d], k[i][d], dot);
      logits[i] = warp_sum(dot) * p.scale_log2;
      if (p.cap_log2 > 0) logits[i] = p.cap_log2 * tanhf(logits[i] / p.cap_log2);
      if (first + i * parts >= end) logits[i] = -INFINITY;
      top = fmaxf(top, logits[i]);
    }
    top = partial.raise(top);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight = exp2f(logits[i] - top);
      partial.mass += weight;
      partial.add(weight, v[i]);
    }
  }
}

// State number `index` of the row, counted through its runs; -1 beyond the last.
__device__ __forceinline__ int find_state(const WorkList& work, int first_run, int last_run,
                                          int index) {
  for (int r = first_run; r < last_run; ++r) {
    const StateRun run = work.runs[r];
    if (index < run.count) return run.first + index;
    index -= run.count;
  }
  return -1;
}

// The states of the warp's lanes, first those that have one; `state` is -1 for the others.
template <typename T>
__device__ __forceinline__ void merge_states(const MergeParams<T>& p, Partial& partial, int state,
                                             int q_head) {
  constexpr int kBatch = 8;  // states in flight
  const int lane = threadIdx.x % 32, h_q = p.h_kv * p.group;
  const int count = __popc(__ballot_sync(~0u, state >= 0));
  const auto place = [&](int state) { return static_cast<int64_t>(state) * h_q + q_head; };
  const float2 sums = state >= 0 ? p.state_sum[place(state)] : make_float2(-INFINITY, 0);
  float weight = 0;
  for (int first = 0; first < count; first += kBatch) {
    float values[kBatch][kPerLane];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int other = __shfl_sync(~0u, state, min(first + i, count - 1));
      load_dims(values[i], p.state_out + place(other) * HEAD_DIM, lane);
    }
    if (first == 0) {
      const float top = partial.raise(warp_max(sums.x));
      if (top == -INFINITY) return;
      weight = exp2f(sums.x - top);
      partial.mass += warp_sum(sums.y * weight);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float own = __shfl_sync(~0u, weight, min(first + i, 31));
      partial.add(first + i < count ? own : 0.0f, values[i]);
    }
  }
}

// Two blocks of a multiprocessor: with more registers they would start later.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads, 2)
    merge_kernel(const __grid_constant__ MergeParams<T> p) {
  __shared__ __align__(16) float outs[kMergeWarps][HEAD_DIM];
  __shared__ float2 sums[kMergeWarps];
  const int row = blockIdx.x, head = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Warps per query head: several share one while the group is small.
  const int parts = max(kMergeWarps / p.group, 1);
  const int heads = kMergeWarps / parts;  // query heads at a time
  const int part = warp % parts;
  const int first_run = p.work.run_indptr[row], last_run = p.work.run_indptr[row + 1];
  for (int first = 0; first < p.group; first += heads) {
    const int member = first + warp / parts;
    const int q_head = head * p.group + member;
    const bool live = member < p.group;
    Partial partial;
    if (live && p.window > 0) attend_window(p, partial, row, head, q_head, part, parts);
    int state = find_state(p.work, first_run, last_run, part + parts * lane);
    if (first == 0) wait_for_previous_kernel();
    for (int round = 1; live && __any_sync(~0u, state >= 0); ++round) {
      merge_states(p, partial, state, q_head);
      state = find_state(p.work, first_run, last_run, part + parts * (round * 32 + lane));
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) outs[warp][lane * kPerLane + i] = partial.out[i];
    if (lane == 0) sums[warp] = make_float2(partial.reference, partial.mass);
    __syncthreads();
    // A thread adds the parts of a dim.
    for (int e = threadIdx.x; e < heads * HEAD_DIM; e += kMergeThreads) {
      const int first_part = e / HEAD_DIM * parts, dim = e % HEAD_DIM;
      if (first + e / HEAD_DIM >= p.group) break;
      float top = -INFINITY, mass = 0, out = 0;
      for (int i = 0; i < parts; ++i) top = fmaxf(top, sums[first_part + i].x);
      // A row without tokens has mass 0 and output 0.
      if (top > -INFINITY) {
        for (int i = 0; i < parts; ++i) {
          const float2 sum = sums[first_part + i];
          const float weight = exp2f(sum.x - top);
          mass = fmaf(weight, sum.y, mass);
          out = fmaf(weight, outs[first_part + i][dim], out);
        }
      }
      const int64_t at =
          static_cast<int64_t>(row) * p.h_kv * p.group + head * p.group + first + e / HEAD_DIM;
      p.out[at * HEAD_DIM + dim] = static_cast<T>(mass > 0 ? out / mass : 0.0f);
      if (dim == 0) p.lse[at] = mass > 0 ? (top + log2f(mass)) * kLn2 : -INFINITY;
    }
    __syncthreads();
  }
  if (row == 0 && head == 0 && threadIdx.x == 0) {
    p.work.header->next_narrow = p.work.header->next_wide = 0;
  }
}

}  // namespace merge
}  // namespace patternkv
