// The planner of decode: from the segments of one step to work items and, per batch row, the states
// to merge. One block; everything it decides is a function of the segments alone.
#pragma once

#include "patternkv/decode_params.cuh"

namespace patternkv {
namespace plan {

constexpr int kPlanThreads = 1024;
constexpr int kPlanWarps = kPlanThreads / 32;
// Work items cost this many tokens more than they have: loading queries, filling the table, adding
// patterns, writing states.
constexpr int kItemCost = 192;
// Most rounds of work units that chunks are made for; this bounds the states to keep.
constexpr int kMaxRounds = 4;

struct PlanParams {
  const int4* segments;   // [num_segments]: req, start, end, table
  const int* row_indptr;  // [num_segments + 1]
  const int* rows;        // [nnz]
  int num_segments;
  int b, group, h_kv;
  int narrow_rows, wide_rows;      // most query rows of an item
  int narrow_blocks, wide_blocks;  // blocks that run at once
  // What replaces these for steps whose shared segments have mostly `fewest_rows` rows or more; 0
  // rows where there is no kernel for it.
  int many_rows, many_blocks, fewest_rows;
  int max_narrow, max_wide, max_states, max_runs;
  WorkList work;
  StateRun* entry_runs;  // [nnz], scratch
};

struct Segment {
  int req, start, end, table;
  int first_entry, num_branches;
  int tiles;  // groups of branches that become items of their own; 0: nothing to do
  bool wide;

  __device__ int length() const { return end - start; }
  __device__ int chunk(int limit) const {
    const int chunks = (length() + limit - 1) / limit;
    const int even = (length() + chunks - 1) / chunks;
    return (even + kTokenAlign - 1) / kTokenAlign * kTokenAlign;
  }
  __device__ int num_chunks(int limit) const {
    const int size = chunk(limit);
    return (length() + size - 1) / size;
  }
};

__device__ __forceinline__ Segment load_segment(const PlanParams& p, int i) {
  Segment s = {};
  if (i >= p.num_segments) return s;
  const int4 fields = p.segments[i];
  s.req = fields.x, s.start = fields.y, s.end = fields.z, s.table = fields.w;
  s.first_entry = p.row_indptr[i];
  s.num_branches = p.row_indptr[i + 1] - s.first_entry;
  if (s.end <= s.start || s.num_branches <= 0) return s;
  const int rows = s.num_branches * p.group;
  s.wide = rows > p.narrow_rows;
  const int branches = max(p.wide_rows / p.group, 1);
  s.tiles = s.wide ? (s.num_branches + branches - 1) / branches : 1;
  return s;
}

__device__ __forceinline__ int warp_total(int x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Inclusive sums over the block. `scratch` holds kPlanWarps values; ends with a barrier.
__device__ int block_scan(int x, int* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int y = __shfl_up_sync(~0u, x, distance);
    if (lane >= distance) x += y;
  }
  if (lane == 31) scratch[warp] = x;
  __syncthreads();
  if (warp == 0) {
    int total = scratch[lane];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int y = __shfl_up_sync(~0u, total, distance);
      if (lane >= distance) total += y;
    }
    scratch[lane] = total;
  }
  __syncthreads();
  if (warp > 0) x += scratch[warp - 1];
  __syncthreads();
  return x;
}

// Chunk limits that are tried: eight per octave, from 64 to kMaxChunk and beyond repeats it.
constexpr int kLimits = 64;
__device__ __forceinline__ int chunk_limit(int candidate) {
  const int limit = (64 << (candidate / 8)) / 8 * (8 + candidate % 8);
  return min((limit + kTokenAlign - 1) / kTokenAlign * kTokenAlign, kMaxChunk);
}

// Work units of one kind, an item and a KV head each.
struct Units {
  int count, longest;  // longest: in tokens, with what an item costs
};

// The units that chunks of at most `limit` tokens make of the segments for one kernel.
__device__ Units count_units(const PlanParams& p, int limit, bool wide) {
  const int lane = threadIdx.x % 32;
  int items = 0, longest = 0;
  for (int i = lane; i < p.num_segments; i += 32) {
    const Segment s = load_segment(p, i);
    if (s.tiles == 0 || s.wide != wide) continue;
    items += s.tiles * s.num_chunks(limit);
    longest = max(longest, min(s.chunk(limit), s.length()));
  }
  items = warp_total(items);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    longest = max(longest, __shfl_xor_sync(~0u, longest, distance));
  }
  return {items * p.h_kv, items > 0 ? longest + kItemCost : 0};
}

// Expected time, in tokens, of one kernel's units: full rounds of blocks; shorter units first take
// the blocks that the last round of the longer ones leaves.
__device__ float expected_time(Units longer, Units shorter, int blocks, int limit) {
  if (longer.longest < shorter.longest) {
    const Units swapped = longer;
    longer = shorter, shorter = swapped;
  }
  const auto rounds = [&](int units) { return (units + blocks - 1) / blocks; };
  if (rounds(longer.count + shorter.count) > kMaxRounds && limit < kMaxChunk) return INFINITY;
  int left = shorter.count;
  if (left > 0) {
    const int idle = rounds(longer.count) * blocks - longer.count;
    left = max(left - idle * (longer.longest / shorter.longest), 0);
  }
  return static_cast<float>(rounds(longer.count)) * longer.longest +
         static_cast<float>(rounds(left)) * shorter.longest;
}

// Whether most of what shared segments cost, tokens times rows, has rows enough for `many`.
__device__ bool has_many_rows(const PlanParams& p) {
  const int lane = threadIdx.x % 32;
  float balance = 0;
  for (int i = lane; i < p.num_segments; i += 32) {
    const Segment s = load_segment(p, i);
    if (s.tiles == 0 || !s.wide) continue;
    const int rows = s.num_branches * p.group;
    const float cost = static_cast<float>(s.length()) * rows;
    balance += rows >= p.fewest_rows ? cost : -cost;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    balance += __shfl_xor_sync(~0u, balance, distance);
  }
  return balance > 0;
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const PlanParams given) {
  PlanParams p = given;
  const bool many = p.many_rows > 0 && has_many_rows(p);
  if (many) p.wide_rows = p.many_rows, p.wide_blocks = p.many_blocks;
  // Of private segments in `narrow`, of shared ones, and of both in the kernel of the shared ones.
  __shared__ float times[3][kLimits];
  __shared__ int limits[3];
  __shared__ int scratch[kPlanWarps];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  Units own, shared;
  for (int i = warp; i < kLimits; i += kPlanWarps) {
    const int limit = chunk_limit(i);
    own = count_units(p, limit, false), shared = count_units(p, limit, true);
    if (lane > 0) continue;
    times[0][i] = expected_time(own, {}, p.narrow_blocks, limit);
    times[1][i] = expected_time(shared, {}, p.wide_blocks, limit);
    times[2][i] = expected_time(shared, own, p.wide_blocks, limit);
  }
  __syncthreads();
  if (thread < 3) {
    int best = 0;
    for (int i = 1; i < kLimits; ++i) {
      // Longer chunks on a tie: fewer states to merge.
      if (times[thread][i] <= times[thread][best]) best = i;
    }
    times[thread][0] = times[thread][best];
    limits[thread] = chunk_limit(best);
  }
  __syncthreads();
  // Two kernels hardly share a multiprocessor, so little private work costs most as a kernel of its
  // own. Work of one kind has no choice.
  if (shared.count > 0 && times[2][0] < times[0][0] + times[1][0]) p.narrow_rows = 0;
  const int chunk_limits[2] = {limits[0], limits[p.narrow_rows == 0 ? 2 : 1]};

  int num_items[2] = {0, 0}, num_states = 0;
  for (int first = 0; first < p.num_segments; first += kPlanThreads) {
    const Segment s = load_segment(p, first + thread);
    const int limit = chunk_limits[s.wide];
    const int chunks = s.tiles > 0 ? s.num_chunks(limit) : 0;
    const int items = chunks * s.tiles, states = chunks * s.num_branches;
    int ends[2];
    for (int wide = 0; wide < 2; ++wide) {
      ends[wide] = num_items[wide] + block_scan(s.wide == (wide == 1) ? items : 0, scratch);
    }
    const int state_end = num_states + block_scan(states, scratch);
    int first_item = ends[s.wide] - items, first_state = state_end - states;

    // A warp writes the items of its threads' segments one segment after the other.
    for (int source = 0; source < 32; ++source) {
      const int count = __shfl_sync(~0u, items, source);
      const int entries = __shfl_sync(~0u, s.num_branches, source);
      if (entries <= 0) continue;
      const int i = first + warp * 32 + source;
      const Segment other = load_segment(p, i);
      const int num_chunks = __shfl_sync(~0u, chunks, source);
      const int at = __shfl_sync(~0u, first_item, source);
      const int state = __shfl_sync(~0u, first_state, source);
      for (int e = lane; e < entries; e += 32) {
        const int row = p.rows[other.first_entry + e];
        if (row < 0 || row >= p.b) __trap();  // more rows than there are queries
        p.entry_runs[other.first_entry + e] = {state + e * num_chunks, num_chunks};
      }
      if (count == 0) continue;
      const int size = other.chunk(chunk_limits[other.wide]);
      WorkItem* out = other.wide ? p.work.wide_items : p.work.narrow_items;
      const int capacity = other.wide ? p.max_wide : p.max_narrow;
      for (int n = lane; n < count; n += 32) {
        const int tile = n / num_chunks, chunk = n % num_chunks;
        const int branch = other.num_branches * tile / other.tiles;
        const int branch_end = other.num_branches * (tile + 1) / other.tiles;
        if (at + n >= capacity) __trap();
        out[at + n] = {other.req,
                       other.start + chunk * size,
                       min(other.start + (chunk + 1) * size, other.end),
                       other.table,
                       other.first_entry + branch,
                       branch_end - branch,
                       state + branch * num_chunks + chunk,
                       num_chunks};
      }
    }
    // The last thread's sums are the block's.
    __shared__ int totals[3];
    if (thread == kPlanThreads - 1) totals[0] = ends[0], totals[1] = ends[1], totals[2] = state_end;
    __syncthreads();
    num_items[0] = totals[0], num_items[1] = totals[1], num_states = totals[2];
    __syncthreads();
  }
  if (thread == 0) {
    if (num_states > p.max_states) __trap();
    *p.work.header = {num_items[0], many ? -num_items[1] : num_items[1], 0, 0};
  }

  // Runs by batch row. A warp looks through all entries for each of its rows, so their order is
  // that of the segments.
  const int nnz = p.num_segments > 0 ? p.row_indptr[p.num_segments] : 0;
  int num_runs = 0;
  for (int first = 0; first < p.b; first += kPlanThreads) {
    // Counting, with the warps' counts handed to the scan through the row's own thread.
    int count = 0;
    for (int source = 0; source < 32; ++source) {
      const int row = first + warp * 32 + source;
      if (row >= p.b) break;
      int own = 0;
      for (int e = lane; e < nnz; e += 32) own += p.rows[e] == row;
      own = warp_total(own);
      if (lane == source) count = own;
    }
    const int end = num_runs + block_scan(count, scratch);
    if (first + thread < p.b) p.work.run_indptr[first + thread + 1] = end;
    for (int source = 0; source < 32; ++source) {
      const int row = first + warp * 32 + source;
      if (row >= p.b) break;
      int at = __shfl_sync(~0u, end - count, source);
      for (int e0 = 0; e0 < nnz; e0 += 32) {
        const int e = e0 + lane;
        const bool mine = e < nnz && p.rows[e] == row;
        const unsigned votes = __ballot_sync(~0u, mine);
        if (mine) {
          const int place = at + __popc(votes & ((1u << lane) - 1));
          if (place >= p.max_runs) __trap();
          p.work.runs[place] = p.entry_runs[e];
        }
        at += __popc(votes);
      }
    }
    __shared__ int total;
    if (thread == kPlanThreads - 1) total = end;
    __syncthreads();
    num_runs = total;
    __syncthreads();
  }
  if (thread == 0) p.work.run_indptr[0] = 0;
}

}  // namespace plan
}  // namespace patternkv
