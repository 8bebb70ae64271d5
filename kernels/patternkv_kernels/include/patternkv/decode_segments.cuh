// What the planner of decode reads: the segments of a step, and how they are cut into chunks.
#pragma once

#include "patternkv/decode_params.cuh"

namespace patternkv {
namespace plan {

// Slots of all segments one after the other, in the order of the segments, whose places are those
// in this list.
struct SlotList {
  const int* req_to_token;
  const int64_t* sources;  // [num_segments]: where a segment's slots are in req_to_token, less
                           // where they are in the list
  int* slots;  // [num_tokens]
  int num_tokens;
};

struct PlanParams {
  const int4* segments;   // [num_segments]: req, start, end, table
  const int* row_indptr;  // [num_segments + 1]
  const int* rows;        // [nnz]
  int num_segments;
  int b, group, h_kv;
  int narrow_rows, wide_branches;  // most query rows, most branches of an item
  int narrow_blocks, wide_blocks;  // blocks that run at once
  // What replaces these for steps whose shared segments have mostly `fewest_rows` rows or more; 0
  // branches where there is no kernel for it.
  int many_branches, many_blocks, fewest_rows;
  int max_narrow, max_wide, max_states, max_runs;
  WorkList work;
  int* places;  // [nnz], scratch: where the run of an entry goes
  SlotList list;
};

// x / y rounded up, for positive x and y with a sum below 2^20: there floats are precise enough. A
// third of the instructions of an integer division.
__device__ __forceinline__ int ceil_div(int x, int y) {
  return static_cast<int>(__fdividef(static_cast<float>(x + y) - 0.5f, static_cast<float>(y)));
}

struct Segment {
  int req, start, end, table;
  int first_entry, num_branches;
  int tiles;  // groups of branches that become items of their own; 0: nothing to do
  bool wide;

  __device__ int length() const { return end - start; }
};

__device__ __forceinline__ Segment load_segment(const PlanParams& p, int i) {
  Segment s = {};
  if (i >= p.num_segments) return s;
  const int4 fields = p.segments[i];
  s.req = fields.x, s.start = fields.y, s.end = fields.z, s.table = fields.w;
  s.first_entry = p.row_indptr[i];
  s.num_branches = p.row_indptr[i + 1] - s.first_entry;
  if (s.end <= s.start || s.num_branches <= 0) return s;
  s.wide = s.num_branches * p.group > p.narrow_rows;
  s.tiles = s.wide ? ceil_div(s.num_branches, p.wide_branches) : 1;
  return s;
}

// Chunks of a segment: alike, multiples of kTokenAlign, but for the last one.
struct Chunks {
  int size, count;

  // Of `length` > 0 tokens, at most `limit` times kTokenAlign each.
  static __device__ __forceinline__ Chunks of(int length, int limit) {
    const int units = (length + kTokenAlign - 1) / kTokenAlign;
    const int each = ceil_div(units, ceil_div(units, limit));
    return {each * kTokenAlign, ceil_div(units, each)};
  }
};

// Limits of chunks that are tried, in units of kTokenAlign: all up to 16, then eight per octave.
constexpr int kLimits = 40;
__device__ constexpr int chunk_limit(int candidate) {
  const int i = candidate + 1;
  return i < 8 ? i : (8 + i % 8) << (i / 8 - 1);
}
static_assert(chunk_limit(kLimits - 1) * kTokenAlign == kMaxChunk, "the last limit is the longest");

}  // namespace plan
}  // namespace patternkv
