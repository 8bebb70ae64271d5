// What the store needs of one table, K or V, and one head: kept in shared memory, worked out once
// for all tokens of a block.
//
// Lane l of a warp has row = l / 4 and part = l % 4. The four lanes of a row share a vector: lane
// `part` holds the dims [32 i + 8 part, 32 i + 8 part + 8) for every i, as MMA operands whose k
// index is permuted alike on both sides. The row is a token or a pattern.
#pragma once

#include "patternkv/layout.cuh"
#include "patternkv/ptx.cuh"

namespace patternkv {

constexpr int kChunks = HEAD_DIM / 32;  // 16-byte loads of a lane per vector
constexpr int kPairs = HEAD_DIM / 8;    // half2 of a lane per vector
constexpr int kMaxPatterns = 256;
constexpr int kTilePatterns = 8;  // patterns of one MMA
constexpr uint32_t kAllLanes = 0xffffffff;

// A lane's share of a vector: pair j holds dims 32 (j / 4) + 8 part + 2 (j % 4) and the next.
using Share = __half2[kPairs];

// K or V: bf16 or fp16 [n, h_kv, HEAD_DIM], strides in elements.
struct Vectors {
  const void* data;
  int token_stride, head_stride;
};

// int64 or int32.
struct Indices {
  const void* data;
  bool are_int64;

  __device__ int64_t operator[](int i) const {
    return are_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int*>(data)[i];
  }
};

// Where one of several layers has its pool, tables and windows.
struct StoreLayer {
  uint8_t* pool;
  const __half *patterns, *channel_scale, *channel_weight;
  const void *window_k, *window_v;
};

struct StoreParams {
  SlotPool pool;
  Vectors k, v;
  Indices vectors;               // [n]: which of k and v token i is; null: number i
  Indices slots;                 // [n]
  void *window_k, *window_v;     // [rows, h_kv, HEAD_DIM] as k and v; null: none
  Indices window_rows;           // [n], negative: not kept
  const int* table_ids;          // [n]
  const __half* patterns;        // [num_tables, 2, h_kv, num_patterns, HEAD_DIM]
  const __half* channel_scale;   // [num_tables, 2, h_kv, HEAD_DIM]
  const __half* channel_weight;  // [num_tables, 2, h_kv, HEAD_DIM]
  int n, num_patterns;

  // Of the tokens that the layer's windows hold.
  __device__ StoreParams of(const StoreLayer& layer) const {
    StoreParams params = *this;
    params.pool.base = layer.pool;
    params.k.data = layer.window_k, params.v.data = layer.window_v;
    params.patterns = layer.patterns;
    params.channel_scale = layer.channel_scale, params.channel_weight = layer.channel_weight;
    return params;
  }
  __device__ int64_t vector_of(int token) const {
    return vectors.data == nullptr ? token : vectors[token];
  }
  __device__ int table_head(int table, int side, int head) const {
    return (table * 2 + side) * pool.h_kv + head;
  }
  __device__ const __half* patterns_of(int table_head) const {
    return patterns + int64_t{table_head} * (num_patterns * HEAD_DIM);
  }
};

// Scaled by powers of two, so that every product below stays inside the float16 range.
struct alignas(16) StoreTable {
  __half2 weight[HEAD_DIM / 2];         // channel_weight^2, at most 1: distances count by it
  __half2 inverse_scale[HEAD_DIM / 2];  // 1 / channel_scale, at least 1
  __half2 fit_weight[HEAD_DIM / 2];     // (channel_weight * channel_scale)^2, at most 1
  float score_bias[kMaxPatterns];       // -|pattern|^2 / 2 by `weight`
  float scale_unit;     // slot scale per scale of levels of residual * inverse_scale
  float distance_unit;  // distance by `weight` per squared level by `fit_weight`
  bool plain_weight;    // powers of two: a token times `weight` is exact in float16
};

__device__ __forceinline__ float quad_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The lane's share of a vector in memory: chunk i is 4 i further on.
__device__ __forceinline__ const uint4* share_of(const void* vector) {
  return static_cast<const uint4*>(vector) + threadIdx.x % 4;
}

__device__ __forceinline__ void unpack_chunk(const uint4& chunk, __half2 (&out)[4]) {
  out[0] = as_half2(chunk.x), out[1] = as_half2(chunk.y);
  out[2] = as_half2(chunk.z), out[3] = as_half2(chunk.w);
}

__device__ __forceinline__ uint4 pack_chunk(const __half2* x) {
  return make_uint4(as_u32(x[0]), as_u32(x[1]), as_u32(x[2]), as_u32(x[3]));
}

// From global memory that nothing writes meanwhile.
__device__ __forceinline__ void load_chunk(const uint4* share, int i, __half2 (&out)[4]) {
  unpack_chunk(__ldg(share + 4 * i), out);
}

// From shared memory.
__device__ __forceinline__ void read_chunk(const __half2 (&vector)[HEAD_DIM / 2], int i,
                                           __half2 (&out)[4]) {
  unpack_chunk(share_of(vector)[4 * i], out);
}

// Smallest power of two that is at least x, for normal x > 0.
__device__ __forceinline__ float power_of_two_above(float x) {
  const uint32_t bits = __float_as_uint(x);
  return __uint_as_float((bits + 0x007fffff) & 0x7f800000);
}

__device__ __forceinline__ float inverse_power_of_two(float power) {
  return __uint_as_float(0x7f000000 - __float_as_uint(power));
}

// Biases of the tile of patterns that starts at `first`; all lanes of a warp.
__device__ __forceinline__ void fill_biases(StoreTable& table, const Share& weight,
                                            const __half* patterns, int num_patterns, int first) {
  const int lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
  const uint4* pattern = share_of(patterns + min(first + row, num_patterns - 1) * HEAD_DIM);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 p[4];
    load_chunk(pattern, i, p);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = __half22float2(p[j]), w = __half22float2(weight[4 * i + j]);
      sum = __fmaf_rn(__fmul_rn(x.x, w.x), x.x, sum);
      sum = __fmaf_rn(__fmul_rn(x.y, w.y), x.y, sum);
    }
  }
  sum = quad_sum(sum);
  if (part == 0) table.score_bias[first + row] = -0.5f * sum;
}

// Fills `table`; warp `rank` of `count` warps does its share.
__device__ __forceinline__ void fill_table(StoreTable& table, const StoreParams& params,
                                           int table_head, int rank, int count) {
  const int lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
  const uint4* weights = share_of(params.channel_weight + int64_t{table_head} * HEAD_DIM);
  const uint4* scales = share_of(params.channel_scale + int64_t{table_head} * HEAD_DIM);

  // Vectors are read again where they are needed: the cache has them, and registers are scarce.
  float largest = 0.0f, largest_scale = 0.0f, largest_product = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 w[4], s[4];
    load_chunk(weights, i, w);
    load_chunk(scales, i, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = __half22float2(w[j]), y = __half22float2(s[j]);
      largest = fmaxf(largest, fmaxf(x.x, x.y));
      largest_scale = fmaxf(largest_scale, fmaxf(y.x, y.y));
      largest_product = fmaxf(largest_product, fmaxf(__fmul_rn(x.x, y.x), __fmul_rn(x.y, y.y)));
    }
  }
  const float by_weight = inverse_power_of_two(power_of_two_above(quad_max(largest)));
  const float scale_power = power_of_two_above(quad_max(largest_scale));
  const float product_power = power_of_two_above(quad_max(largest_product));
  const float by_product = inverse_power_of_two(product_power);

  Share weight;
  bool plain = true;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 w[4], s[4];
    load_chunk(weights, i, w);
    load_chunk(scales, i, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = __half22float2(w[j]), y = __half22float2(s[j]);
      const float x0 = __fmul_rn(x.x, by_weight), x1 = __fmul_rn(x.y, by_weight);
      weight[4 * i + j] = __floats2half2_rn(__fmul_rn(x0, x0), __fmul_rn(x1, x1));
      plain &= (as_u32(weight[4 * i + j]) & 0x03ff03ff) == 0;
      const float y0 = __fmul_rn(__fmul_rn(x.x, y.x), by_product);
      const float y1 = __fmul_rn(__fmul_rn(x.y, y.y), by_product);
      const __half2 fit_weight = __floats2half2_rn(__fmul_rn(y0, y0), __fmul_rn(y1, y1));
      if (rank == 0 && row == 0) {
        const int at = 16 * i + 4 * part + j;
        table.weight[at] = weight[4 * i + j];
        table.fit_weight[at] = fit_weight;
        // Levels are taken of residuals below 16: larger inverses would leave the float16 range.
        // Such channels weigh next to nothing.
        constexpr float kMaxInverse = 2048.0f;
        table.inverse_scale[at] =
            __floats2half2_rn(fminf(__fdividef(scale_power, y.x), kMaxInverse),
                              fminf(__fdividef(scale_power, y.y), kMaxInverse));
      }
    }
  }
  plain = __all_sync(kAllLanes, plain);
  if (rank == 0 && lane == 0) {
    table.scale_unit = inverse_power_of_two(scale_power);
    const float ratio = __fmul_rn(__fmul_rn(product_power, table.scale_unit), by_weight);
    table.distance_unit = __fmul_rn(ratio, ratio);
    table.plain_weight = plain;
  }

  const __half* patterns = params.patterns_of(table_head);
  // Two at a time, since each waits for its loads.
#pragma unroll 2
  for (int first = rank * kTilePatterns; first < params.num_patterns;
       first += count * kTilePatterns) {
    fill_biases(table, weight, patterns, params.num_patterns, first);
  }
}

}  // namespace patternkv
