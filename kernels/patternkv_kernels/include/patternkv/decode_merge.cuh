// The end of a decode layer: the merge of each row's states, and its exact window where that was
// not ahead (decode_window.cuh). A block has a batch row and one or several query heads of a KV
// head. It starts while the attention kernels still run, and waits for their states only once the
// window is done.
#pragma once

#include "patternkv/decode_window.cuh"

namespace patternkv {
namespace merge {

constexpr float kLn2 = 0.6931471805599453f;

// The runs of states of a row, up to 32 of them: a lane has one. And `last_state`, unless negative.
struct Runs {
  StateRun own;
  int count, before, total;  // runs; states of those before the lane's, and of all
  int last_state;

  __device__ __forceinline__ Runs(const WorkList& work, int first, int last, int last_state)
      : last_state(last_state) {
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
    total = __shfl_sync(~0u, sum, 31) + (last_state >= 0 ? 1 : 0);
  }
  // State number `index`, each lane its own.
  __device__ __forceinline__ int find(int index) const {
    int state = max(last_state, 0);
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

  __device__ __forceinline__ States(const WorkList& work, int first, int last, int last_state)
      : runs(work, first, last, last_state),
        index(threadIdx.x / 32 * kStates + threadIdx.x % 32 / kSame % kStates),
        state(runs.find(min(index, runs.total - 1))) {}

  template <typename T>
  __device__ __forceinline__ void merge(const MergeParams<T>& p, Partial<kHeads>& partial,
                                        const Heads<kHeads>& heads) {
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

// Where rows' windows are attended to: nowhere, there are none, here, or in kernels ahead.
enum class WindowPlace { kNone, kHere, kAhead };

// Of windows of `size` tokens in a batch with or without `warpgroup`, which leaves the merge no
// place beside it.
inline WindowPlace place_of_windows(int64_t size, bool warpgroup) {
  if (size == 0) return WindowPlace::kNone;
  return warpgroup ? WindowPlace::kAhead : WindowPlace::kHere;
}

// kStates: of a warp at a time.
template <typename T, int kHeads, int kWarps, int kStates, WindowPlace kWindow>
__global__ void __launch_bounds__(32 * kWarps, blocks_per_sm(kWarps, kHeads* kStates))
    merge_kernel(const __grid_constant__ MergeParams<T> p) {
  __shared__ WarpParts<kHeads, kWarps> parts;
  const int row = blockIdx.x;
  const Heads<kHeads> heads(p);
  int first_run = p.work.run_indptr[row];
  const int last_run = p.work.run_indptr[row + 1];
  using States = merge::States<kHeads, kWarps, kStates>;
  // As many as registers allow without spills.
  constexpr int kTokens = kHeads * kStates == 8 && kHeads > 1 ? 2 : window::kTokens;
  States states(p.work, first_run, last_run,
                kWindow == WindowPlace::kAhead ? p.first_window_state + row : -1);
  Partial<kHeads> partial;
  if constexpr (kWindow == WindowPlace::kHere) {
    window::attend<kWarps, kTokens>(p, partial, row, heads);
  }
  wait_for_previous_kernel();
  states.merge(p, partial, heads);
  while ((first_run += 32) < last_run) {
    States(p.work, first_run, last_run, -1).merge(p, partial, heads);
  }
  parts.put(partial);
  parts.add(heads.count(p), [&](int h, int dim, float4 out, float2 sum) {
    // A row without tokens has mass 0 and output 0.
    const float scale = sum.y > 0 ? 1.0f / sum.y : 0.0f;
    const int64_t at = static_cast<int64_t>(row) * p.h_kv * p.group + heads.q_head(p, h);
    T* to = p.out + at * HEAD_DIM + dim;
    to[0] = static_cast<T>(out.x * scale), to[1] = static_cast<T>(out.y * scale);
    to[2] = static_cast<T>(out.z * scale), to[3] = static_cast<T>(out.w * scale);
    if (dim == 0) p.lse[at] = sum.y > 0 ? (sum.x + log2f(sum.y)) * kLn2 : -INFINITY;
  });
  if (row == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    p.work.header->next_narrow = p.work.header->next_wide = 0;
  }
}

// Calls `launch(kernel, grid, threads)` for `b` rows: the heads of a group share a block once there
// are rows enough for that, whose loads they then share too.
template <typename T, typename Launch>
void choose_merge(int64_t b, int64_t h_kv, int64_t group, WindowPlace window, int sms,
                  Launch launch) {
  const auto choose = [&](auto where) {
    constexpr WindowPlace kWindow = decltype(where)::value;
    const dim3 shared = Heads<kMostHeads>::grid(b, h_kv, group);
    const int64_t blocks = int64_t{shared.x} * shared.y;
    if (group == 1 || b * h_kv * group <= 4 * sms) {
      launch(merge_kernel<T, 1, 8, 8, kWindow>, Heads<1>::grid(b, h_kv, group), 256);
    } else if (blocks <= blocks_per_sm(8, 4 * kMostHeads) * sms) {
      launch(merge_kernel<T, kMostHeads, 8, 4, kWindow>, shared, 256);
    } else if (blocks <= blocks_per_sm(4, 4 * kMostHeads) * sms) {
      launch(merge_kernel<T, kMostHeads, 4, 4, kWindow>, shared, 128);
    } else {
      launch(merge_kernel<T, kMostHeads, 4, 2, kWindow>, shared, 128);
    }
  };
  switch (window) {
    case WindowPlace::kNone:
      return choose(std::integral_constant<WindowPlace, WindowPlace::kNone>());
    case WindowPlace::kHere:
      return choose(std::integral_constant<WindowPlace, WindowPlace::kHere>());
    case WindowPlace::kAhead:
      return choose(std::integral_constant<WindowPlace, WindowPlace::kAhead>());
  }
}

}  // namespace merge
}  // namespace patternkv
