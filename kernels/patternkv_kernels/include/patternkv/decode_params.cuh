// What the kernels of one decode step share: the work list that the planner writes, and the
// arguments.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "patternkv/layout.cuh"

namespace patternkv {

constexpr int kThreads = 128;  // of a block of most attention kernels: four warps
constexpr int kWarps = kThreads / 32;
constexpr int kTokenAlign = 64;  // chunks are multiples of it: a tile of most kernels
// Steps whose shared segments have mostly fewer query rows are left to the kernels of up to 32.
constexpr int kFewestRows = 33;
// Fixed-point sums of probabilities hold this many tokens' worth of probabilities up to 2^kSlack.
constexpr int kMaxChunk = 8192;
// Probabilities are 2^(logit - reference). A row's reference follows its running maximum only when
// that gets kSlack ahead of it, so accumulators are rarely rescaled and probabilities stay within
// fp16 and fixed point.
constexpr float kSlack = 3.0f;

// Chunk of a segment for a tile of the branches that read it; every KV head makes one work unit.
struct alignas(16) WorkItem {
  int req;         // row of req_to_token
  int start, end;  // positions
  int table;
  int first_entry;  // branches are rows[first_entry .. first_entry + num_branches)
  int num_branches;
  int first_state;  // branch j writes state first_state + j * state_stride
  int state_stride;
};

// Counters of the work list, in device memory.
struct alignas(16) WorkHeader {
  // Items. The wide ones of a step are all for the kernels of up to 32 rows, or many: for the one
  // of the most rows.
  int num_narrow, num_wide, num_many;
  // Units taken beyond every block's first; the merge kernel zeroes them for the next layer.
  int next_narrow, next_wide;
};

// States [first, first + count) of one branch in one segment.
struct StateRun {
  int first, count;
};

struct WorkQueue {
  const int* num_items;
  int* taken;
  const WorkItem* items;
};

struct WorkList {
  WorkHeader* header;
  WorkItem* narrow_items;
  WorkItem* wide_items;
  int* run_indptr;  // [b + 1]
  StateRun* runs;   // [nnz], those of batch row i are runs[run_indptr[i] .. run_indptr[i + 1])

  __device__ WorkQueue narrow() const {
    return {&header->num_narrow, &header->next_narrow, narrow_items};
  }
  __device__ WorkQueue wide() const { return {&header->num_wide, &header->next_wide, wide_items}; }
  __device__ WorkQueue many() const { return {&header->num_many, &header->next_wide, wide_items}; }
};

struct DecodeParams {
  const void* q;     // bf16 or fp16 [b, h_q, d]
  int64_t q_stride;  // elements between rows
  bool q_is_bf16;
  SlotPool pool;
  bool copy16;  // every code row is 16-byte aligned, else 8
  const int* req_to_token;
  int64_t req_stride;
  const __half* patterns;       // [num_tables, 2, h_kv, num_patterns, d]
  const __half* channel_scale;  // [num_tables, 2, h_kv, d]
  int num_patterns;
  const int* rows;  // [nnz]
  WorkList work;
  float* state_out;   // [num_states, h_q, d], unnormalised
  float2* state_sum;  // [num_states, h_q]: reference logit (log2) and softmax mass
  float scale_log2;   // sm_scale * log2(e)
  float cap_log2;     // logit cap * log2(e), 0 for none
  int h_q, group;
  uint32_t group_inverse;  // ceil(2^16 / group)

  // Of the query rows of an item, at most 128: the branch, counted from 0, and its head in
  // the group.
  __device__ int branch_of(int row) const { return row * group_inverse >> 16; }
  __device__ int member_of(int row) const { return row - branch_of(row) * group; }
};

// Where a row of an item leaves its state, counted in query heads.
__device__ __forceinline__ int64_t state_index(const DecodeParams& p, const WorkItem& item,
                                               int head, int row) {
  const int branch = p.branch_of(row);
  const int64_t state = item.first_state + branch * item.state_stride;
  return state * p.h_q + head * p.group + (row - branch * p.group);
}

}  // namespace patternkv
