// Attention of up to 32 query rows over a chunk of tokens: segments that many branches share. The
// four warps of a block share every 128-token tile: each takes 32 of its tokens through q.k and the
// softmax, and a quarter of the head dims through p.v; probabilities pass through shared memory.
#pragma once

#include <climits>

#include "patternkv/wide_attention.cuh"

namespace patternkv {
namespace wide {

template <int kTiles>
__device__ void attend(const DecodeParams& p, const WorkItem item, int head, uint8_t* memory) {
  using Config = wide::Config<kTiles>;
  using Table = wide::Table<kTiles>;
  using Histogram = wide::Histogram<kTiles>;
  constexpr int kRows = Config::kRows, kStages = Config::kStages;

  auto& shared = *reinterpret_cast<typename Config::Shared*>(memory);
  uint8_t* table = memory + Config::table_start();
  const int words = Config::table_words(p.num_patterns);
  auto* histogram = reinterpret_cast<uint32_t*>(table + words * 4);
  uint8_t* ring = table + 2 * words * 4;
  const uint32_t ring_address = shared_address(ring);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  const int* slots = p.req_to_token + item.req * p.req_stride;
  const int num_tiles = (item.end - item.start + kTile - 1) / kTile;

  // Thread i owns token i of every tile. Tokens beyond the end repeat the last one, so that no byte
  // outside the segment is read.
  const auto load_slot = [&](int n) {
    return slots[min(item.start + n * kTile + thread, item.end - 1)];
  };
  const HeadPool pool(p.pool, head);
  const auto issue = [&](int n) {
    copy_rows<kTile, kThreads>(p.copy16, ring_address + n % kStages * kTileBytes, pool.codes,
                               thread, [&](int token) { return shared.units[token]; });
    cp_async_commit();
  };

  const int first_slot = load_slot(0);
  int next_slot = load_slot(1);
  shared.units[thread] = pool.row_units(p.pool, first_slot);
  RawToken pending = load_token(pool.metadata_words(p.pool, first_slot));  // of the tile in flight
  __syncthreads();
  issue(0);

  for (int e = thread; e < words; e += kThreads) histogram[e] = 0;
  if (thread < kRows) shared.mass[thread] = 0, shared.peak[thread] = INT_MIN;
  const QueryScales scales = load_queries(p, item, head, shared.queries, shared.raw_queries);
  fill_table<kRows>(p, item, head, shared.raw_queries, scales.table,
                    [&](int pattern, int row, float value) {
                      const uint32_t at = Table::pattern_offset(pattern) ^ Table::row_offset(row);
                      *reinterpret_cast<float*>(table + at) = value;
                    });
  // A power of two that keeps p * v_scale away from fp16's limits, by the first tile's scales.
  float largest = pending.v_scale_float();
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  if (lane == 0) shared.largest[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  const float value_scale = power_of_two_scale(largest, 0);

  if (warp == 0) {
    float bias[kTiles][2];
    code_bias<kTiles>(shared.queries.fragments, bias);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (g == 0) shared.bias[4 * i + t] = make_float2(bias[i][0], bias[i][1]);
    }
  }

  const FixedPoint fixed = FixedPoint::of(item.end - item.start);
  Attention<kTiles> attention = {p, shared, table, histogram, words, fixed};
  for (int n = 0; n < num_tiles; ++n) {
    const bool more = n + 1 < num_tiles;
    const float token_v_scale = fminf(pending.v_scale_float() * value_scale, 4096.0f);
    shared.tokens[thread] = {pending.k_scale_float() * scales.codes,
                             Table::pattern_offset(pending.pattern_ids & 0xff),
                             as_u32(__float2half2_rn(token_v_scale)),
                             Histogram::pattern_offset(pending.pattern_ids >> 8)};
    if (more) shared.units[thread] = pool.row_units(p.pool, next_slot);
    cp_async_wait<0>();
    __syncthreads();  // the tile is here, and everybody is done with the one before
    RawToken fresh = {};
    int fresh_slot = 0;
    if (more) {
      issue(n + 1);
      fresh = load_token(pool.metadata_words(p.pool, next_slot));
      fresh_slot = load_slot(n + 2);
    }

    const uint8_t* keys = ring + n % kStages * kTileBytes;
    typename Attention<kTiles>::Logits x;
    typename Attention<kTiles>::Metadata metadata;
    attention.multiply_keys(keys, x);
    attention.add_patterns_of_keys(x, metadata);
    attention.cap_and_mask(x, item.end - (item.start + n * kTile) - (warp * 32 + g));
    attention.relate(x, n == 0);
    attention.weigh(x, metadata);
    __syncthreads();
    attention.multiply_values(keys + kTile * kKStride);
    // Only now: naming what was loaded would wait for it.
    pending = fresh;
    next_slot = fresh_slot;
  }
  cp_async_wait<0>();
  __syncthreads();
  attention.finish(item, head, value_scale);
}

__host__ __device__ __forceinline__ int shared_bytes(int num_patterns) {
  return Config<kMostRows / 8>::shared_bytes(num_patterns);
}

__global__ void __launch_bounds__(kThreads, D > 128 ? 2 : 3)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  launch_dependents();
  __shared__ int next_unit;
  for_each_unit(p.work.wide(), p.pool.h_kv, next_unit, [&](const WorkItem& item, int head) {
    if (item.num_branches * p.group <= 16) {
      attend<2>(p, item, head, memory);
    } else {
      attend<4>(p, item, head, memory);
    }
  });
  end_after_previous_kernel();
}

}  // namespace wide
}  // namespace patternkv
