// Attention over each row's exact window. The merge has it while it waits for the states of the
// attention kernels, and puts the newest token into it. Where these fill the multiprocessors, so
// that the merge gets a place only when they end, a kernel ahead of them leaves one more state per
// row instead.
#pragma once

#include "patternkv/decode_units.cuh"
#include "patternkv/merge_entries.cuh"

namespace patternkv {
namespace window {

using merge::Heads;
using merge::kMostHeads;
using merge::kPerLane;
using merge::load_dims;
using merge::MergeParams;
using merge::Partial;

constexpr int kTokens = 4, kVectors = 2 * kTokens;  // of a warp at a time

// Puts the row's newest token, K and V as they are, into its ring: the first block of each KV head
// does. Nobody reads that entry meanwhile.
template <typename T, int kHeads>
__device__ __forceinline__ void keep_newest(const MergeParams<T>& p, int row,
                                            const Heads<kHeads>& heads) {
  constexpr int kPieces = HEAD_DIM * sizeof(T) / sizeof(uint4);
  if (heads.first > 0 || threadIdx.x >= 2 * kPieces) return;
  const merge::Window<T>& window = p.window;
  const int64_t newest = window.end[row] - 1;
  if (newest < window.start[row]) return;
  const int64_t entry = window.ring[row] * window.size + newest % window.size;
  const int64_t to = (entry * p.h_kv + heads.kv_head) * HEAD_DIM;
  const bool is_k = threadIdx.x < kPieces;
  const T* from =
      is_k ? window.new_k + row * window.new_k_stride : window.new_v + row * window.new_v_stride;
  const int piece = threadIdx.x % kPieces;
  reinterpret_cast<uint4*>((is_k ? window.k : window.v) + to)[piece] =
      reinterpret_cast<const uint4*>(from + heads.kv_head * HEAD_DIM)[piece];
}

// Adds the row's window, of which a warp takes every kWarps-th kTokens at a time, and keeps its
// newest token.
template <int kWarps, int kTokens, typename T, int kHeads>
__device__ __forceinline__ void attend(const MergeParams<T>& p, Partial<kHeads>& partial, int row,
                                       const Heads<kHeads>& heads) {
  constexpr int kSame = Partial<kHeads>::kLanes / kTokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const merge::Window<T>& window = p.window;
  const int64_t ring = window.ring[row] * window.size;
  const int end = window.end[row];
  const T* new_k = window.new_k + row * window.new_k_stride + heads.kv_head * HEAD_DIM;
  const T* new_v = window.new_v + row * window.new_v_stride + heads.kv_head * HEAD_DIM;
  float q[kHeads][kPerLane];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    load_dims(q[h], p.q + row * p.q_stride + heads.q_head(p, h) * HEAD_DIM, lane);
  }
  for (int first = window.start[row] + warp * kTokens; first < end; first += kWarps * kTokens) {
    float k[kTokens][kPerLane], v[kTokens][kPerLane], dots[kHeads * kTokens] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int position = min(first + i, end - 1);
      const int64_t at = ((ring + position % window.size) * p.h_kv + heads.kv_head) * HEAD_DIM;
      const bool is_new = position == end - 1;
      load_dims(k[i], is_new ? new_k : window.k + at, lane);
      load_dims(v[i], is_new ? new_v : window.v + at, lane);
    }
#pragma unroll
    for (int i = 0; i < kHeads * kTokens; ++i) {
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) {
        dots[i] = fmaf(q[i / kTokens][d], k[i % kTokens][d], dots[i]);
      }
    }
    float logit = merge::spread_sums(dots) * p.scale_log2;
    if (p.cap_log2 > 0) logit = p.cap_log2 * tanhf(logit / p.cap_log2);
    if (first + lane / kSame % kTokens >= end) logit = -INFINITY;
    partial.template add<kTokens>(
        logit, 1.0f, [&](int token, int) -> const float (&)[kPerLane] { return v[token]; });
  }
  keep_newest(p, row, heads);
}

template <typename T, int kHeads, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, merge::blocks_per_sm(kWarps, kVectors))
    attend_kernel(const __grid_constant__ MergeParams<T> p) {
  __shared__ merge::WarpParts<kHeads, kWarps> parts;
  launch_dependents();
  const int row = blockIdx.x;
  const Heads<kHeads> heads(p);
  Partial<kHeads> partial;
  attend<kWarps, kTokens>(p, partial, row, heads);
  parts.put(partial);
  parts.add(heads.count(p), [&](int h, int dim, float4 out, float2 sum) {
    const int64_t state = p.first_window_state + row;
    const int64_t at = state * p.h_kv * p.group + heads.q_head(p, h);
    *reinterpret_cast<float4*>(p.state_out + at * HEAD_DIM + dim) = out;
    if (dim == 0) p.state_sum[at] = sum;
  });
  end_after_previous_kernel();
}

// Calls `launch(kernel, grid, threads)` for the windows of `b` rows.
template <typename T, typename Launch>
void choose_kernel(int64_t b, int64_t h_kv, int64_t group, int sms, Launch launch) {
  const dim3 grid = Heads<kMostHeads>::grid(b, h_kv, group);
  if (group == 1) {
    launch(attend_kernel<T, 1, 4>, Heads<1>::grid(b, h_kv, group), 128);
  } else if (int64_t{grid.x} * grid.y <= 2 * sms) {
    launch(attend_kernel<T, kMostHeads, 8>, grid, 256);
  } else {
    launch(attend_kernel<T, kMostHeads, 4>, grid, 128);
  }
}

}  // namespace window
}  // namespace patternkv
