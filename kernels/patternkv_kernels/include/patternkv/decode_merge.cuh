// The end of a decode layer: attention over each row's exact window, then the merge of its states.
// One block per batch row and KV head. It starts while the attention kernels still run and waits
// for their states only once the window is done.
#pragma once

#include "patternkv/decode_params.cuh"
#include "patternkv/ptx.cuh"

namespace patternkv {
namespace merge {

constexpr int kMergeThreads = 512;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kPerLane = HEAD_DIM / 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

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

  __device__ void add(float logit, float weight, const float (&value)[kPerLane]) {
    const float top = fmaxf(reference, logit);
    if (top == -INFINITY) return;
    const float keep = exp2f(reference - top), gain = exp2f(logit - top);
    reference = top;
    mass = mass * keep + weight * gain;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[i] = out[i] * keep + value[i] * gain;
  }
};

template <typename T>
__device__ __forceinline__ void load_dims(float (&x)[kPerLane], const T* row, int lane) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = load_float(row + i * 32 + lane);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
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
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float dot = 0;
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) dot = fmaf(q[d], k[i][d], dot);
      logits[i] = warp_sum(dot) * p.scale_log2;
      if (p.cap_log2 > 0) logits[i] = p.cap_log2 * tanhf(logits[i] / p.cap_log2);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * parts < end) partial.add(logits[i], 1.0f, v[i]);
    }
  }
}

// States part, part + parts, ... of the row, counted through its runs.
template <typename T>
__device__ void merge_states(const MergeParams<T>& p, Partial& partial, int first_run, int last_run,
                             int q_head, int part, int parts) {
  constexpr int kBatch = 16;
  const int lane = threadIdx.x % 32, h_q = p.h_kv * p.group;
  int before = 0;  // states of the runs before
  for (int r = first_run; r < last_run; ++r) {
    const StateRun run = p.work.runs[r];
    const int skip = (part - before % parts + parts) % parts;
    for (int first = skip; first < run.count; first += kBatch * parts) {
      float2 sums[kBatch];
      float values[kBatch][kPerLane];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int state = run.first + min(first + i * parts, run.count - 1);
        const int64_t at = static_cast<int64_t>(state) * h_q + q_head;
        sums[i] = p.state_sum[at];
        load_dims(values[i], p.state_out + at * HEAD_DIM, lane);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * parts < run.count) partial.add(sums[i].x, sums[i].y, values[i]);
      }
    }
    before += run.count;
  }
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ MergeParams<T> p) {
  __shared__ float outs[kMergeWarps][HEAD_DIM];
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
    if (first == 0) wait_for_previous_kernel();
    if (live) merge_states(p, partial, first_run, last_run, q_head, part, parts);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) outs[warp][i * 32 + lane] = partial.out[i];
    if (lane == 0) sums[warp] = make_float2(partial.reference, partial.mass);
    __syncthreads();
    if (live && part == 0) {
      for (int other = warp + 1; other < warp + parts; ++other) {
        float values[kPerLane];
        load_dims(values, outs[other], lane);
        partial.add(sums[other].x, sums[other].y, values);
      }
      const int64_t at = static_cast<int64_t>(row) * p.h_kv * p.group + q_head;
      // A row without tokens has mass 0 and output 0.
      const float inverse = partial.mass > 0 ? 1.0f / partial.mass : 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        p.out[at * HEAD_DIM + i * 32 + lane] = static_cast<T>(partial.out[i] * inverse);
      }
      if (lane == 0) {
        p.lse[at] = partial.mass > 0 ? (partial.reference + log2f(partial.mass)) * kLn2 : -INFINITY;
      }
    }
    __syncthreads();
  }
  if (row == 0 && head == 0 && threadIdx.x == 0) {
    p.work.header->next_narrow = p.work.header->next_wide = 0;
  }
}

}  // namespace merge
}  // namespace patternkv
