// The planner of decode: from the segments of one step to work items and, per batch row, the states
// to merge. One block, once per step, so what counts is its longest chain: loops over segments,
// chunk limits, entries and items are spread over all threads, and those that most steps pass
// through once are not unrolled, since instructions come from memory too. Everything it decides is
// a function of the segments alone. Other blocks list the slots that the segments read.
#pragma once

#include "patternkv/decode_segments.cuh"

namespace patternkv {
namespace plan {

constexpr int kPlanThreads = 1024;
constexpr int kPlanWarps = kPlanThreads / 32;
// Work items cost this many tokens more than they have: loading queries, filling the table, adding
// patterns, writing states.
constexpr int kItemCost = 192;
// Most rounds of work units that chunks are made for; this bounds the states to keep.
constexpr int kMaxRounds = 4;
// Threads that count the units of one chunk limit; none of the last warp, which still places runs.
constexpr int kSlices = (kPlanThreads - 32) / kLimits;

__device__ __forceinline__ int warp_scan(int x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int y = __shfl_up_sync(~0u, x, distance);
    if (threadIdx.x % 32 >= distance) x += y;
  }
  return x;
}

// Turns every x[i] into `total[i]` plus its sum over the threads before this one, and adds the sum
// over all threads to `total[i]`. Ends with a barrier.
template <int kValues>
__device__ void block_scan(int (&x)[kValues], int (&total)[kValues]) {
  __shared__ int sums[kValues][kPlanWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int end = warp_scan(x[i]);
    if (lane == 31) sums[i][warp] = end;
    x[i] = total[i] + end - x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int end = warp_scan(sums[i][lane]);
    const int before = __shfl_sync(~0u, end, (warp + 31) % 32);
    if (warp > 0) x[i] += before;
    total[i] += __shfl_sync(~0u, end, 31);
  }
  __syncthreads();
}

// Whether most of what shared segments cost, tokens times rows, has rows enough for `many`.
__device__ bool has_many_rows(const PlanParams& p) {
  __shared__ float sums[kPlanWarps];
  const auto warp_sum = [](float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
  };
  float balance = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_segments; i += kPlanThreads) {
    const Segment s = load_segment(p, i);
    if (s.tiles == 0 || !s.wide) continue;
    const int rows = s.num_branches * p.group;
    const float cost = static_cast<float>(s.length()) * rows;
    balance += rows >= p.fewest_rows ? cost : -cost;
  }
  balance = warp_sum(balance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = balance;
  __syncthreads();
  return warp_sum(sums[threadIdx.x % 32]) > 0;
}

// Where the run of every entry goes: row by row, those of a row in the order of the segments. The
// last warp is still at it when the others leave.
__device__ void place_runs(const PlanParams& p, int num_entries) {
  __shared__ int next[kPlanThreads];  // per row: how many runs, then where the next one goes
  const int thread = threadIdx.x, lane = thread % 32;
  int num_runs[1] = {0};
  for (int first = 0; first < p.b; first += kPlanThreads) {
    __syncthreads();
    next[thread] = 0;
    __syncthreads();
#pragma unroll 1
    for (int e = thread; e < num_entries; e += kPlanThreads) {
      const int row = p.rows[e];
      if (row < 0 || row >= p.b) __trap();  // more rows than there are queries
      if (row / kPlanThreads == first / kPlanThreads) atomicAdd(&next[row % kPlanThreads], 1);
    }
    __syncthreads();
    int begin[1] = {next[thread]};
    block_scan(begin, num_runs);
    next[thread] = begin[0];
    if (first + thread < p.b) p.work.run_indptr[first + thread] = begin[0];
    __syncthreads();
    if (thread < kPlanThreads - 32) continue;
    for (int e = lane; e - lane < num_entries; e += 32) {
      const int row = e < num_entries ? p.rows[e] - first : -1;
      const bool here = row >= 0 && row < kPlanThreads;
      const unsigned alike = __match_any_sync(~0u, here ? row : -1);
      const int place = here ? next[row] + __popc(alike & ((1u << lane) - 1)) : 0;
      __syncwarp();
      if (here) p.places[e] = place;
      if (here && alike >> lane == 1) next[row] = place + 1;
      __syncwarp();
    }
  }
  if (thread == 0) p.work.run_indptr[p.b] = num_runs[0];
}

// Work units of one kind, an item and a KV head each.
struct Units {
  int count, longest;  // longest: in tokens, with what an item costs

  __device__ void add(Units other) { count += other.count, longest = max(longest, other.longest); }
  __device__ void add_shared(Units other) {
    atomicAdd(&count, other.count), atomicMax(&longest, other.longest);
  }
};

// Expected time, in tokens, of one kernel's units: full rounds of blocks; shorter units first take
// the blocks that the last round of the longer ones leaves.
__device__ float expected_time(Units longer, Units shorter, int blocks, bool longest_chunks) {
  if (longer.longest < shorter.longest) {
    const Units swapped = longer;
    longer = shorter, shorter = swapped;
  }
  const auto rounds = [&](int units) { return (units + blocks - 1) / blocks; };
  if (rounds(longer.count + shorter.count) > kMaxRounds && !longest_chunks) return INFINITY;
  int left = shorter.count;
  if (left > 0) {
    const int idle = rounds(longer.count) * blocks - longer.count;
    left = max(left - idle * (longer.longest / shorter.longest), 0);
  }
  return static_cast<float>(rounds(longer.count)) * longer.longest +
         static_cast<float>(rounds(left)) * shorter.longest;
}

struct ChunkLimits {
  int narrow, wide;
  bool narrow_is_wide;  // private segments go to the kernel of the shared ones
};

// The chunk limits with the least expected time.
__device__ ChunkLimits choose_limits(const PlanParams& p) {
  struct Load {
    int length, units;  // units: per chunk
    bool wide;
  };
  __shared__ Load loads[kPlanThreads];
  __shared__ Units narrow[kLimits], wide[kLimits];
  // Of private segments in `narrow`, of shared ones, and of both in the kernel of the shared ones.
  __shared__ float times[3];
  __shared__ int limits[3];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  if (thread < kLimits) narrow[thread] = wide[thread] = {};
  __syncthreads();
  const int candidate = thread % kLimits, slice = thread / kLimits;
  Units of_narrow = {}, of_wide = {};
  for (int first = 0; first < p.num_segments; first += kPlanThreads) {
    const Segment s = load_segment(p, first + thread);
    loads[thread] = {s.length(), s.tiles * p.h_kv, s.wide};
    __syncthreads();
    const int count = slice < kSlices ? min(p.num_segments - first, kPlanThreads) : 0;
    for (int i = slice; i < count; i += kSlices) {
      const Load load = loads[i];
      if (load.units == 0) continue;
      const Chunks chunks = Chunks::of(load.length, chunk_limit(candidate));
      const Units units = {load.units * chunks.count, min(chunks.size, load.length) + kItemCost};
      if (load.wide) {
        of_wide.add(units);
      } else {
        of_narrow.add(units);
      }
    }
    __syncthreads();
  }
  if (slice < kSlices) {
    narrow[candidate].add_shared(of_narrow), wide[candidate].add_shared(of_wide);
  }
  __syncthreads();

  if (warp < 3) {
    float time = INFINITY;
    int limit = 0;
    for (int i = lane; i < kLimits; i += 32) {
      const float tried =
          expected_time(warp == 0 ? narrow[i] : wide[i], warp == 2 ? narrow[i] : Units{},
                        warp == 0 ? p.narrow_blocks : p.wide_blocks, i == kLimits - 1);
      if (tried <= time) time = tried, limit = chunk_limit(i);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const float tried = __shfl_xor_sync(~0u, time, distance);
      const int other = __shfl_xor_sync(~0u, limit, distance);
      // Longer chunks on a tie: fewer states to merge.
      if (tried < time || (tried == time && other > limit)) time = tried, limit = other;
    }
    if (lane == 0) times[warp] = time, limits[warp] = limit;
  }
  __syncthreads();
  // Two kernels hardly share a multiprocessor, so little private work costs most as a kernel of its
  // own. Work of one kind has no choice.
  const bool join = wide[0].count > 0 && times[2] < times[0] + times[1];
  return {limits[0], limits[join ? 2 : 1], join};
}

// The last i with begins[i] <= x, of kPlanThreads of which the first is.
__device__ __forceinline__ int find(const int* begins, int x) {
  int i = 0;
#pragma unroll
  for (int step = kPlanThreads / 2; step > 0; step /= 2) {
    if (begins[i + step] <= x) i += step;
  }
  return i;
}

// Items, runs and header.
__device__ void write_work(const PlanParams& p, ChunkLimits limits, bool many) {
  struct Place {
    Chunks chunks;
    int item, state;  // the first ones
  };
  // Of the segments at hand, an item and an entry of which a thread takes at a time.
  __shared__ int first_items[kPlanThreads], first_entries[kPlanThreads];  // items: of both lists
  __shared__ Place places[kPlanThreads];
  const int thread = threadIdx.x;
  enum { kNarrow, kWide, kStates, kCounts };
  int total[kCounts] = {};
  for (int first = 0; first < p.num_segments; first += kPlanThreads) {
    const Segment s = load_segment(p, first + thread);
    const Chunks chunks =
        s.tiles > 0 ? Chunks::of(s.length(), s.wide ? limits.wide : limits.narrow) : Chunks{};
    const int items = chunks.count * s.tiles;
    const int items_before = total[kNarrow] + total[kWide];
    int begin[kCounts] = {s.wide ? 0 : items, s.wide ? items : 0, chunks.count * s.num_branches};
    block_scan(begin, total);
    first_items[thread] = begin[kNarrow] + begin[kWide];
    first_entries[thread] = p.row_indptr[min(first + thread, p.num_segments)];
    places[thread] = {chunks, s.wide ? begin[kWide] : begin[kNarrow], begin[kStates]};
    __syncthreads();

    for (int n = items_before + thread; n < total[kNarrow] + total[kWide]; n += kPlanThreads) {
      const int i = find(first_items, n);
      const Segment of = load_segment(p, first + i);
      const Place place = places[i];
      const int item = n - first_items[i];
      const int tile = item / place.chunks.count, chunk = item % place.chunks.count;
      const int branch = of.num_branches * tile / of.tiles;
      const int branch_end = of.num_branches * (tile + 1) / of.tiles;
      const int start = of.start + chunk * place.chunks.size;
      const int at = place.item + item;
      if (at >= (of.wide ? p.max_wide : p.max_narrow)) __trap();
      WorkItem* out = of.wide ? p.work.wide_items : p.work.narrow_items;
      out[at] = {of.req,
                 start,
                 min(start + place.chunks.size, of.end),
                 of.table,
                 of.first_entry + branch,
                 branch_end - branch,
                 place.state + branch * place.chunks.count + chunk,
                 place.chunks.count};
    }
    const int entries_end = p.row_indptr[min(first + kPlanThreads, p.num_segments)];
#pragma unroll 1
    for (int e = first_entries[0] + thread; e < entries_end; e += kPlanThreads) {
      const int i = find(first_entries, e);
      const Place place = places[i];
      const int at = p.places[e];
      p.work.runs[at] = {place.state + (e - first_entries[i]) * place.chunks.count,
                         place.chunks.count};
    }
    __syncthreads();
  }
  if (thread == 0) {
    if (total[kStates] > p.max_states) __trap();
    *p.work.header = {total[kNarrow], many ? 0 : total[kWide], many ? total[kWide] : 0, 0, 0};
  }
}

// By all blocks but the first.
__device__ void list_slots(const PlanParams& p) {
  const SlotList& list = p.list;
  const int stride = (gridDim.x - 1) * kPlanThreads;
  for (int at = (blockIdx.x - 1) * kPlanThreads + threadIdx.x; at < list.num_tokens; at += stride) {
    // The first segment that ends behind the token: those before it may be empty.
    int i = 0, last = p.num_segments - 1;
    while (i < last) {
      const int middle = (i + last) / 2;
      if (p.segments[middle].z > at) {
        last = middle;
      } else {
        i = middle + 1;
      }
    }
    list.slots[at] = list.req_to_token[list.sources[i] + at];
  }
}

__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(const PlanParams given) {
  if (blockIdx.x > 0) return list_slots(given);
  PlanParams p = given;
  const int num_entries = p.num_segments > 0 ? p.row_indptr[p.num_segments] : 0;
  if (num_entries > p.max_runs) __trap();  // nothing is written beyond the workspace
  const bool many = p.many_branches > 0 && has_many_rows(p);
  if (many) p.wide_branches = p.many_branches, p.wide_blocks = p.many_blocks;
  place_runs(p, num_entries);
  const ChunkLimits limits = choose_limits(p);
  if (limits.narrow_is_wide) p.narrow_rows = 0;
  write_work(p, limits, many);
}

}  // namespace plan
}  // namespace patternkv
