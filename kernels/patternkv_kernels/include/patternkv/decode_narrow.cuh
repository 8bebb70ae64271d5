// Attention of few query rows over a chunk of tokens: private suffixes. Each warp of a block works
// through every fourth 32-token tile on its own, with its own ring of code rows, reference logits
// and pattern histogram; the four results are added at the end.
//
// kLive is the most rows of an item, 4 or 8: the MMAs have 8 columns, table and histograms kLive.
// With 4, the lanes of the idle columns take over the softmax of every other 16 tokens.
#pragma once

#include "patternkv/narrow_tiles.cuh"

namespace patternkv {
namespace narrow {

struct Shared {
  float reference[kWarps][kRows];
  float mass[kWarps][kRows];  // of the bins that each warp adds up
};

// Memory of a block: [Shared][table][histograms][rings], the second and third by the number of
// patterns. Once the tiles are done, the rings take the warps' outputs.
__host__ __device__ __forceinline__ int table_start() { return round_up(sizeof(Shared), 16); }

__host__ __device__ __forceinline__ int table_words(int num_patterns, int live) {
  return round_up(num_patterns, 16) * live;
}

__host__ __device__ __forceinline__ int shared_bytes(int num_patterns, int live) {
  const int outputs = kWarps * live * D * 4, rings = kWarps * kRingBytes;
  return table_start() + table_words(num_patterns, live) * 4 * (1 + kWarps) +
         (rings > outputs ? rings : outputs);
}

// The unit at hand. Asks for the next as soon as its own tiles are done.
template <int kLive>
__device__ void attend(const DecodeParams& p, Units& units, uint8_t* memory) {
  const WorkItem item = units.item;
  const int head = units.head();
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int words = table_words(p.num_patterns, kLive);
  auto* table = reinterpret_cast<float*>(memory + table_start());
  auto* histograms = reinterpret_cast<uint32_t*>(table + words);
  auto* rings = reinterpret_cast<uint8_t*>(histograms + kWarps * words);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_rows = item.num_branches * p.group;
  uint8_t* ring = rings + warp * kRingBytes;
  const int* slots = p.req_to_token + item.req * p.req_stride;
  const int num_tiles = (item.end - item.start + kTile - 1) / kTile;
  const auto tiles_of = [&](int w) { return (num_tiles - w + kWarps - 1) / kWarps; };
  const int own_tiles = tiles_of(warp);

  // Tile n of this warp starts at position first + n * kWarps * kTile; lanes own its tokens. Lanes
  // beyond the end repeat the last token, so that no byte outside the segment is read.
  const int first = item.start + warp * kTile;
  const auto slot_of = [&](int n) {
    return slots + min(first + n * kWarps * kTile + lane, item.end - 1);
  };
  const auto load_slot = [&](int n) { return *slot_of(n); };
  const HeadPool pool(p.pool, head);
  const auto issue = [&](int n, int slot) {
    const uint32_t row = pool.row_units(p.pool, slot);
    copy_rows<kTile, 32, kKStride, kVStride, true>(
        p.copy16, shared_address(ring) + n % 2 * kTileBytes, pool.codes, lane,
        [&](int token) { return __shfl_sync(~0u, row, token); });
    cp_async_commit();
    return load_token(pool.metadata_words(p.pool, slot));
  };
  // Whatever can be asked for is, ahead of what waits for it: codes, which are farthest, first.
  RawToken even = {}, odd = {};  // of the tiles in flight
  const int first_slot = load_now(slot_of(0));
  int odd_slot = load_slot(1), even_slot = load_slot(2);
  const int row = min(g, num_rows - 1), batch_row = p.rows[item.first_entry + p.branch_of(row)];
  OwnDims key_channels, loaded_queries;
  key_channels.load(table_channels(p, item.table, 0, head));
  if (own_tiles > 0) even = issue(0, first_slot);
  const int64_t query = batch_row * p.q_stride + (head * p.group + p.member_of(row)) * HEAD_DIM;
  loaded_queries.load(static_cast<const __half*>(p.q) + query);
  KeyPatterns key_patterns;
  key_patterns.load(p, item, head, warp * 16);

  Lane own;
  own.words = words;
  own.histogram = histograms + warp * words;
  for (int e = lane; e < words; e += 32) own.histogram[e] = 0;
  const Queries queries(p, loaded_queries, g < num_rows, key_channels);
#pragma unroll 1
  for (int begin = warp * 16; begin < p.num_patterns; begin += kWarps * 16) {
    if (begin > warp * 16) key_patterns.load(p, item, head, begin);
    queries.meet(key_patterns, begin, p.num_patterns, [&](int pattern, int row, float value) {
      if (row < kLive) table[pattern * kLive + row] = value;
    });
  }
#pragma unroll
  for (int i = 0; i < D / 8; ++i) own.q[i] = queries.codes[i];
  queries.code_bias(own.bias);
  own.code_scale = queries.to_logits;
  own.table = table + 2 * t % kLive;
  own.bins = shared_address(own.histogram) + 2 * t % kLive * 4;
  // The first tile's scales set a power of two that keeps p * v_scale away from fp16's limits.
  float largest = own_tiles > 0 ? even.v_scale_float() : 0.0f;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  own.value_scale = power_of_two_scale(largest, 0);
  own.fixed = FixedPoint::of(own_tiles * kTile);
  __syncthreads();

  State state;
  // `slot` is of tile n + 1, then of tile n + 3. Two steps in turns: what a load brings needs no
  // move, which would wait for it.
  const auto step = [&](int n, const RawToken& raw, RawToken& next, int& slot) {
    const Token token(raw, own);
    cp_async_wait<0>();
    __syncwarp();
    if (n + 1 < own_tiles) {
      next = issue(n + 1, slot);
      slot = load_slot(n + 3);
    }
    attend_tile<kLive>(p, state, own, ring + n % 2 * kTileBytes, token,
                       item.end - (first + n * kWarps * kTile));
  };
  for (int n = 0; n < own_tiles; n += 2) {
    step(n, even, odd, odd_slot);
    if (n + 1 < own_tiles) step(n + 1, odd, even, even_slot);
  }

  // Add up the warps, with what that takes on its way already.
  units.claim();
  const __half* values = table_rows(p, item.table, 1, head);
  const __half* channels = table_channels(p, item.table, 1, head);
  const int first_dim = g * kDims;
  ValuePatterns<kDims> value_patterns;
  value_patterns.load(p, values, warp * 16, first_dim);
  uint32_t channel_words[kDims / 2] = {};
  if (first_dim < HEAD_DIM) load_early(channel_words, channels + first_dim);
  if (g == 0) {
    shared.reference[warp][2 * t] = state.reference[0];
    shared.reference[warp][2 * t + 1] = state.reference[1];
  }
  __syncthreads();
  const auto common_reference = [&](int row) {
    float top = shared.reference[0][row];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, shared.reference[w][row]);
    return top;
  };
  // A warp without tokens has reference -inf, hence weight 0.
  const auto warp_weight = [&](int w, int row, float top) {
    return exp2_approx(shared.reference[w][row] - top);
  };

  // The table is no longer needed: its place takes the sum of the histograms, in units of 1/16 ...
  const int bin_row = threadIdx.x % kLive;  // of all bins of a thread
  const float bin_top = common_reference(bin_row);
  float bin_units[kWarps], mass = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float unit = FixedPoint::of(tiles_of(w) * kTile).unit();
    bin_units[w] = unit * warp_weight(w, bin_row, bin_top);
  }
  for (int e = threadIdx.x; e < words; e += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum = fmaf(static_cast<float>(histograms[w * words + e]), bin_units[w], sum);
    }
    table[e] = sum * (1.0f / 16);
    mass += sum;
  }
  // Every probability is in one bin, so a row's softmax mass is the sum of its bins.
#pragma unroll
  for (int distance = kLive; distance < 32; distance *= 2) {
    mass += __shfl_xor_sync(~0u, mass, distance);
  }
  if (lane < kLive) shared.mass[warp][lane] = mass;
  // ... while outputs go from code units to those of V / 16.
  float channel_scales[kDims];
  to_floats<__half>(channel_scales, channel_words);
  float row_weight[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i;
    row_weight[i] = warp_weight(warp, row, common_reference(row)) / (16 * own.value_scale);
  }
#pragma unroll
  for (int d = 0; d < kDims; ++d) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = state.out[d / 2][0][d % 2 * 2 + i];
      const float codes = x * (kMaskedUnit / VCodes::masked_step(d % VCodes::kPerHalf));
      x = (codes - VCodes::kCentre * state.weights[i]) * (channel_scales[d] * row_weight[i]);
    }
  }
  __syncthreads();
  add_patterns<1, kDims>(
      p, values, first_dim, state.out, value_patterns, warp * 16, kWarps,
      [&](int pattern, int row) { return table[pattern * kLive + row % kLive]; });

  // The rings take each warp's output, [warp][row][dim].
  auto* outputs = reinterpret_cast<float*>(rings);
  if (2 * t < kLive) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* row = outputs + (warp * kLive + 2 * t + i) * D + g * kDims;
#pragma unroll
      for (int d = 0; d < kDims; d += 4) {
        const auto &low = state.out[d / 2][0], &high = state.out[d / 2 + 1][0];
        reinterpret_cast<float4&>(row[d]) = make_float4(low[i], low[i + 2], high[i], high[i + 2]);
      }
    }
  }
  __syncthreads();
  units.advance();
#pragma unroll 1
  for (int e = threadIdx.x; e < num_rows * (HEAD_DIM / 4); e += kThreads) {
    const int row = e / (HEAD_DIM / 4), dim = e % (HEAD_DIM / 4) * 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = *reinterpret_cast<const float4*>(outputs + (w * kLive + row) * D + dim);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    sum.x *= 16, sum.y *= 16, sum.z *= 16, sum.w *= 16;
    float* to = p.state_out + state_index(p, item, head, row) * HEAD_DIM + dim;
    *reinterpret_cast<float4*>(to) = sum;
  }
  if (threadIdx.x < num_rows) {
    const int row = threadIdx.x;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.mass[w][row];
    p.state_sum[state_index(p, item, head, row)] = make_float2(common_reference(row), sum);
  }
}

// Four blocks fit a Hopper multiprocessor by their shared memory, so they get the registers for it.
template <int kLive>
__global__ void __launch_bounds__(kThreads, D <= 128 ? 4 : 2)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  __shared__ int next_unit;
  for (Units units(p.work.narrow(), p.pool.h_kv, next_unit); units.any(); __syncthreads()) {
    // Not where there is no work: blocks of the next kernel then come as these leave, to empty
    // multiprocessors.
    launch_dependents();
    attend<kLive>(p, units, memory);
  }
  end_after_previous_kernel();
}

}  // namespace narrow
}  // namespace patternkv
