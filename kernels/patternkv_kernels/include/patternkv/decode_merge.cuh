// The end of a decode layer: attention over each row's exact window, then the merge of its states.
// A block has a batch row and one or several query heads of a KV head. It starts while the
// attention kernels still run, and the store may run; for their states it waits only once the
// window is done, whose newest token it has from where the store has it.
#pragma once

#include "patternkv/merge_entries.cuh"

namespace patternkv {
namespace merge {

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
  // The last of them: [b, h_kv, d], whose rows are some elements apart.
  const T* new_k;
  const T* new_v;
  int64_t new_k_stride, new_v_stride;
  int window;  // 0: none
  int h_kv, group;
  float scale_log2, cap_log2;
};

// The query heads of a block: those from `first` on of a KV head, of which there are p.group. Heads
// beyond are computed as the last one and not written.
struct Heads {
  int kv_head, first;

  template <typename T>
  __device__ __forceinline__ int q_head(const MergeParams<T>& p, int h) const {
    return kv_head * p.group + min(first + h, p.group - 1);
  }
};

// Adds the row's window, of which a warp takes every kWarps-th kTokens at a time.
template <int kWarps, int kTokens, typename T, int kHeads>
__device__ __forceinline__ void attend_window(const MergeParams<T>& p, Partial<kHeads>& partial,
                                              int row, const Heads& heads) {
  constexpr int kSame = Partial<kHeads>::kLanes / kTokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t ring = p.ring[row] * p.window;
  const int end = p.end[row];
  const T* new_k = p.new_k + row * p.new_k_stride + heads.kv_head * HEAD_DIM;
  const T* new_v = p.new_v + row * p.new_v_stride + heads.kv_head * HEAD_DIM;
  float q[kHeads][kPerLane];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    load_dims(q[h], p.q + row * p.q_stride + heads.q_head(p, h) * HEAD_DIM, lane);
  }
  for (int first = p.start[row] + warp * kTokens; first < end; first += kWarps * kTokens) {
    float k[kTokens][kPerLane], v[kTokens][kPerLane], dots[kHeads * kTokens] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int position = min(first + i, end - 1);
      const int64_t at = ((ring + position % p.window) * p.h_kv + heads.kv_head) * HEAD_DIM;
      const bool is_new = position == end - 1;
      load_dims(k[i], is_new ? new_k : p.window_k + at, lane);
      load_dims(v[i], is_new ? new_v : p.window_v + at, lane);
    }
#pragma unroll
    for (int i = 0; i < kHeads * kTokens; ++i) {
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) {
        dots[i] = fmaf(q[i / kTokens][d], k[i % kTokens][d], dots[i]);
      }
    }
    float logit = spread_sums(dots) * p.scale_log2;
    if (p.cap_log2 > 0) logit = p.cap_log2 * tanhf(logit / p.cap_log2);
    if (first + lane / kSame % kTokens >= end) logit = -INFINITY;
    partial.template add<kTokens>(
        logit, 1.0f, [&](int token, int) -> const float (&)[kPerLane] { return v[token]; });
  }
}

// The runs of states of a row, up to 32 of them: a lane has one.
struct Runs {
  StateRun own;
  int count, before, total;  // runs; states of those before the lane's, and of all

  __device__ __forceinline__ Runs(const WorkList& work, int first, int last) {
    const int lane = threadIdx.x % 32;
    count = min(last - first, 32);
    own = lane < count ? work.runs[first + lane] : StateRun{0, 0};
    int sum = own.count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    before = sum - own.count;
    total = __shfl_sync(~0u, sum, 31);
  }
  // State number `index`, each lane its own.
  __device__ __forceinline__ int find(int index) const {
    int state = 0;
    for (int r = 0; r < count; ++r) {
      const int at = index - __shfl_sync(~0u, before, r);
      const int first = __shfl_sync(~0u, own.first, r), size = __shfl_sync(~0u, own.count, r);
      if (at >= 0 && at < size) state = first + at;
    }
    return state;
  }
};

// The states of runs, of which a warp takes every kWarps-th kStates at a time.
template <int kHeads, int kWarps, int kStates>
struct States {
  static constexpr int kLanes = Partial<kHeads>::kLanes, kSame = kLanes / kStates;

  Runs runs;
  int index;  // of the lane's next state among those of the runs
  int state;  // which that is

  __device__ __forceinline__ States(const WorkList& work, int first, int last)
      : runs(work, first, last),
        index(threadIdx.x / 32 * kStates + threadIdx.x % 32 / kSame % kStates),
        state(runs.find(min(index, runs.total - 1))) {}

  template <typename T>
  __device__ __forceinline__ void merge(const MergeParams<T>& p, Partial<kHeads>& partial,
                                        const Heads& heads) {
    const int lane = threadIdx.x % 32, h_q = p.h_kv * p.group;
    const int own = heads.q_head(p, lane / kLanes);
    while (__any_sync(~0u, index < runs.total)) {
      const float2 sums = p.state_sum[static_cast<int64_t>(state) * h_q + own];
      float values[kStates][kHeads][kPerLane];
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int64_t at = static_cast<int64_t>(__shfl_sync(~0u, state, i * kSame)) * h_q;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          load_dims(values[i][h], p.state_out + (at + heads.q_head(p, h)) * HEAD_DIM, lane);
        }
      }
      partial.template add<kStates>(
          index < runs.total ? sums.x : -INFINITY, sums.y,
          [&](int i, int h) -> const float (&)[kPerLane] { return values[i][h]; });
      index += kWarps * kStates;
      state = runs.find(min(index, runs.total - 1));
    }
  }
};

// Blocks of a multiprocessor, by the registers that they need for vectors in flight.
constexpr int blocks_per_sm(int warps, int vectors) {
  return (vectors > 8 ? 16 : 24) / (HEAD_DIM <= 128 ? 1 : 2) / warps;
}

// kStates: of a warp at a time.
template <typename T, int kHeads, int kWarps, int kStates, bool kWindow>
__global__ void __launch_bounds__(32 * kWarps, blocks_per_sm(kWarps, kHeads* kStates))
    merge_kernel(const __grid_constant__ MergeParams<T> p) {
  __shared__ __align__(16) float outs[kWarps][kHeads][HEAD_DIM];
  __shared__ float2 sums[kWarps][kHeads];
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = (p.group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / tiles;
  const Heads heads = {kv_head, static_cast<int>(blockIdx.y - kv_head * tiles) * kHeads};
  int first_run = p.work.run_indptr[row];
  const int last_run = p.work.run_indptr[row + 1];
  using States = merge::States<kHeads, kWarps, kStates>;
  // As many as registers allow without spills.
  constexpr int kTokens = kHeads * kStates == 8 && kHeads > 1 ? 2 : 4;
  States states(p.work, first_run, last_run);
  Partial<kHeads> partial;
  if constexpr (kWindow) attend_window<kWarps, kTokens>(p, partial, row, heads);
  wait_for_previous_kernel();
  states.merge(p, partial, heads);
  while ((first_run += 32) < last_run) {
    States(p.work, first_run, last_run).merge(p, partial, heads);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int d = 0; d < kPerLane; ++d) outs[warp][h][lane * kPerLane + d] = partial.out[h][d];
  }
  constexpr int kLanes = Partial<kHeads>::kLanes;
  if (lane % kLanes == 0) sums[warp][lane / kLanes] = make_float2(partial.reference, partial.mass);
  __syncthreads();

  // A thread adds the warps' parts of four dims.
  constexpr int kQuads = HEAD_DIM / 4;
  for (int e = threadIdx.x; e < kHeads * kQuads; e += 32 * kWarps) {
    const int h = e / kQuads, dim = e % kQuads * 4;
    if (heads.first + h >= p.group) break;
    float top = -INFINITY, mass = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) top = fmaxf(top, sums[i][h].x);
    float4 out = {};
    // A row without tokens has mass 0 and output 0.
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
    const float scale = mass > 0 ? 1.0f / mass : 0.0f;
    const int64_t at = static_cast<int64_t>(row) * p.h_kv * p.group + heads.q_head(p, h);
    T* to = p.out + at * HEAD_DIM + dim;
    to[0] = static_cast<T>(out.x * scale), to[1] = static_cast<T>(out.y * scale);
    to[2] = static_cast<T>(out.z * scale), to[3] = static_cast<T>(out.w * scale);
    if (dim == 0) p.lse[at] = mass > 0 ? (top + log2f(mass)) * kLn2 : -INFINITY;
  }
  if (row == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    p.work.header->next_narrow = p.work.header->next_wide = 0;
  }
}

// Calls `launch(kernel, grid, threads)` for `b` rows: the heads of a group share a block once there
// are rows enough for that, whose loads they then share too.
template <typename T, typename Launch>
void choose_merge(int64_t b, int64_t h_kv, int64_t group, bool has_window, int sms, Launch launch) {
  constexpr int kMostHeads = 4;
  const auto grid = [&](int heads) {
    return dim3(static_cast<unsigned>(b),
                static_cast<unsigned>(h_kv * ((group + heads - 1) / heads)));
  };
  const auto choose = [&](auto window) {
    constexpr bool kWindow = decltype(window)::value;
    const dim3 shared = grid(kMostHeads);
    const int64_t blocks = int64_t{shared.x} * shared.y;
    if (group == 1 || b * h_kv * group <= 4 * sms) {
      launch(merge_kernel<T, 1, 8, 8, kWindow>, grid(1), 256);
    } else if (blocks <= blocks_per_sm(8, 4 * kMostHeads) * sms) {
      launch(merge_kernel<T, kMostHeads, 8, 4, kWindow>, shared, 256);
    } else if (blocks <= blocks_per_sm(4, 4 * kMostHeads) * sms) {
      launch(merge_kernel<T, kMostHeads, 4, 4, kWindow>, shared, 128);
    } else {
      launch(merge_kernel<T, kMostHeads, 4, 2, kWindow>, shared, 128);
    }
  };
  if (has_window) {
    choose(std::true_type());
  } else {
    choose(std::false_type());
  }
}

}  // namespace merge
}  // namespace patternkv
