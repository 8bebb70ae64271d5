// The queries of a work item as MMA operands in shared memory, and what they meet besides codes: the
// table of query-pattern products, and the patterns of V.
#pragma once

#include "patternkv/decode_tile.cuh"

namespace patternkv {

// B operand of one n-tile of 8 query rows: q' in the order in which `expand` yields K's dims.
constexpr int kQueryTileWords = D / 16 * 2 * 32;
constexpr int kPaddedD = D + 8;  // fp16 row of raw queries, padded against bank conflicts

__device__ __forceinline__ const __half* table_rows(const DecodeParams& p, int table, int side,
                                                    int head) {
  const int64_t index = (int64_t{table} * 2 + side) * p.pool.h_kv + head;
  return p.patterns + index * p.num_patterns * HEAD_DIM;
}

__device__ __forceinline__ const __half* table_channels(const DecodeParams& p, int table, int side,
                                                        int head) {
  return p.channel_scale + ((int64_t{table} * 2 + side) * p.pool.h_kv + head) * HEAD_DIM;
}

__host__ __device__ __forceinline__ int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The queries of a work item as MMA operands. All rows share the scales, powers of two.
template <int kRows>
using RawQueries = __half[kRows][kPaddedD];  // q * raw_scale

template <int kRows>
struct QueryTile {
  uint32_t fragments[kRows / 8 * kQueryTileWords];  // q * channel_scale * code_scale, B operand
  float largest[2][kWarps];
};

struct QueryScales {
  float table;  // query-pattern products to logits (log2)
  float codes;  // query-code products to logits, but for a token's k_scale
};

// Place of dim `dim` of row 0 among the halves of `fragments`. Row r of an n-tile is 32 r further.
__device__ __forceinline__ int fragment_index(int dim) {
  const int t = dim / (D / 4);
  const int word = dim % (D / 4) / KCodes::kPerWord, code = dim % KCodes::kPerWord;
  const int slot = word * KCodes::kPerHalf + code % KCodes::kPerHalf;
  const int half = code / KCodes::kPerHalf;
  // Two MMA steps of a lane are contiguous: one 16-byte load.
  const int step = slot / 2, reg = slot % 2;
  return ((step / 2 * 32 + t) * 4 + step % 2 * 2 + reg) * 2 + half;
}

__device__ __forceinline__ int code_step(int dim) {
  return KCodes::step(dim % KCodes::kPerWord % KCodes::kPerHalf);
}

// Fills `tile` and `raw` with the queries of the item's rows, which are no more; rows that the item
// does not have are zero. Ends with a barrier.
template <int kRows>
__device__ QueryScales load_queries(const DecodeParams& p, const WorkItem& item, int head,
                                    QueryTile<kRows>& tile, RawQueries<kRows>& raw) {
  constexpr int kPerLane = D / 32;
  constexpr int kRowsPerWarp = kRows / kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_rows = item.num_branches * p.group;
  const __half* channels = table_channels(p, item.table, 0, head);

  float q[kRowsPerWarp][kPerLane] = {}, channel[kPerLane] = {};
  float largest_raw = 0, largest_code = 0;
  const int first_dim = lane * kPerLane;
  uint32_t words[kRowsPerWarp][kPerLane / 2] = {};
  if (first_dim < HEAD_DIM) {
    uint32_t channel_words[kPerLane / 2];
    load_words(channel_words, reinterpret_cast<const uint8_t*>(channels + first_dim));
    to_floats<__half>(channel, channel_words);
#pragma unroll
    for (int n = 0; n < kRowsPerWarp; ++n) {
      const int row = n * kWarps + warp;
      if (row < num_rows) {
        const int batch_row = p.rows[item.first_entry + p.branch_of(row)];
        const int64_t at =
            batch_row * p.q_stride + (head * p.group + p.member_of(row)) * HEAD_DIM + first_dim;
        load_words(words[n], static_cast<const uint8_t*>(p.q) + 2 * at);
      }
    }
  }
  if (p.q_is_bf16) {
#pragma unroll
    for (int n = 0; n < kRowsPerWarp; ++n) to_floats<__nv_bfloat16>(q[n], words[n]);
  } else {
#pragma unroll
    for (int n = 0; n < kRowsPerWarp; ++n) to_floats<__half>(q[n], words[n]);
  }
#pragma unroll
  for (int n = 0; n < kRowsPerWarp; ++n) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      largest_raw = fmaxf(largest_raw, fabsf(q[n][i]));
      largest_code = fmaxf(largest_code, fabsf(q[n][i] * channel[i]));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest_raw = fmaxf(largest_raw, __shfl_xor_sync(~0u, largest_raw, distance));
    largest_code = fmaxf(largest_code, __shfl_xor_sync(~0u, largest_code, distance));
  }
  if (lane == 0) {
    tile.largest[0][warp] = largest_raw;
    tile.largest[1][warp] = largest_code;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    largest_raw = fmaxf(largest_raw, tile.largest[0][w]);
    largest_code = fmaxf(largest_code, tile.largest[1][w]);
  }
  // As large as fp16 takes with room for rounding: small components stay normal numbers.
  const float raw_scale = power_of_two_scale(largest_raw, 14);
  const float code_scale = power_of_two_scale(largest_code, 13);

  auto* fragments = reinterpret_cast<__half*>(tile.fragments);
  int places[kPerLane];
  float factors[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int step = code_step(first_dim + i);
    places[i] = fragment_index(first_dim + i);
    factors[i] = channel[i] * code_scale / step;
  }
#pragma unroll
  for (int n = 0; n < kRowsPerWarp; ++n) {
    const int row = n * kWarps + warp;
    __half* own_fragments = fragments + row / 8 * (2 * kQueryTileWords) + row % 8 * 32;
    uint32_t raw_words[kPerLane / 2];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      own_fragments[places[i]] = __float2half_rn(q[n][i] * factors[i]);
    }
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i) {
      raw_words[i] =
          as_u32(__floats2half2_rn(q[n][2 * i] * raw_scale, q[n][2 * i + 1] * raw_scale));
    }
    store_words(reinterpret_cast<uint8_t*>(&raw[row][first_dim]), raw_words);
  }
  __syncthreads();
  return {p.scale_log2 / raw_scale, p.scale_log2 / code_scale};
}

// A step of products of centre codes, those of the slots `slot` and the next, with q'.
__device__ __forceinline__ void multiply_centres(float (&sums)[4], int slot, uint32_t first,
                                                 uint32_t second) {
  uint32_t a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i] = as_u32(__float2half2_rn(KCodes::bias((slot + i) % KCodes::kPerHalf)));
  }
  mma_m16n8k16(sums, a[0], a[0], a[1], a[1], first, second);
}

// What the bias of expanded codes and their centre add to the products of the rows 8n + 2t and the
// next: an MMA over a token of centre codes. Its rounding is that of the products themselves.
template <int kTiles>
__device__ __forceinline__ void code_bias(const uint32_t* fragments, float (&bias)[kTiles][2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const uint4 q =
          reinterpret_cast<const uint4*>(fragments)[(n * (D / 32) + i) * 32 + threadIdx.x % 32];
      multiply_centres(sums, 4 * i, q.x, q.y);
      multiply_centres(sums, 4 * i + 2, q.z, q.w);
    }
    bias[n][0] = sums[0], bias[n][1] = sums[1];
  }
}

// Products of queries and K patterns in logits, `store(pattern, row, value)` for every pattern
// below num_patterns. The block's warps share the patterns.
template <int kRows, typename Store>
__device__ __forceinline__ void fill_table(const DecodeParams& p, const WorkItem& item, int head,
                                           const RawQueries<kRows>& raw, float scale, Store store) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const __half* patterns = table_rows(p, item.table, 0, head);
  for (int first = warp * 16; first < p.num_patterns; first += kWarps * 16) {
    // The k index is dims t * 8 + 32 * k .. + 8 of lane t, so that loads are 16 bytes wide.
    const int low = min(first + g, p.num_patterns - 1),
              high = min(first + g + 8, p.num_patterns - 1);
    float sums[kRows / 8][4] = {};
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 32; ++k) {
      const int dim = k * 32 + t * 8;
      const uint4 a = *reinterpret_cast<const uint4*>(patterns + low * HEAD_DIM + dim);
      const uint4 b = *reinterpret_cast<const uint4*>(patterns + high * HEAD_DIM + dim);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        const uint4 q = *reinterpret_cast<const uint4*>(&raw[n * 8 + g][dim]);
        mma_m16n8k16(sums[n], a.x, b.x, a.y, b.y, q.x, q.y);
        mma_m16n8k16(sums[n], a.z, b.z, a.w, b.w, q.z, q.w);
      }
    }
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pattern = first + g + i / 2 * 8;
        if (pattern < p.num_patterns) store(pattern, n * 8 + 2 * t + i % 2, sums[n][i] * scale);
      }
    }
  }
}

// What a lane takes of 16 V patterns: kDims dims of four.
template <int kDims>
struct ValuePatterns {
  uint32_t rows[4][kDims / 2];

  // Of the patterns from `first` on, dims from `dim` on.
  __device__ __forceinline__ void load(const DecodeParams& p, const __half* patterns, int first,
                                       int dim) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pattern = min(first + 2 * t + i % 2 + i / 2 * 8, p.num_patterns - 1);
      if (dim < HEAD_DIM) {
        load_early(rows[i], patterns + pattern * HEAD_DIM + dim);
      } else {
#pragma unroll
        for (uint32_t& word : rows[i]) word = 0;
      }
    }
  }
};

// Adds the V patterns, weighted by `weight(pattern, row)` (at most 4096, 0 beyond num_patterns), to
// accumulators of the lane's kDims dims from `dim`; the products come in units of 1. Weights are
// split into two fp16 parts, so that they count with 22 bits. Every stride-th 16 patterns from
// `first` on, which are loaded already.
template <int kTiles, int kDims, typename Weight>
__device__ __forceinline__ void add_patterns(const DecodeParams& p, const __half* patterns, int dim,
                                             float (&out)[kDims / 2][kTiles][4],
                                             ValuePatterns<kDims>& loaded, int first, int stride,
                                             Weight weight) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  constexpr int kWords = kDims / 2;
  const uint32_t (&rows)[4][kWords] = loaded.rows;
  for (int base = first; base < p.num_patterns; base += stride * 16) {
    if (base > first) loaded.load(p, patterns, base, dim);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint32_t upper[2], lower[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pattern = base + 2 * t + i * 8, row = n * 8 + g;
        const float x = weight(pattern, row), y = weight(pattern + 1, row);
        const __half2 coarse = __floats2half2_rn(x, y);
        const float2 back = __half22float2(coarse);
        upper[i] = as_u32(coarse);
        lower[i] = as_u32(__floats2half2_rn(x - back.x, y - back.y));
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t a0 = __byte_perm(rows[0][w], rows[1][w], 0x5410);
        const uint32_t a1 = __byte_perm(rows[0][w], rows[1][w], 0x7632);
        const uint32_t a2 = __byte_perm(rows[2][w], rows[3][w], 0x5410);
        const uint32_t a3 = __byte_perm(rows[2][w], rows[3][w], 0x7632);
        mma_m16n8k16(out[w][n], a0, a1, a2, a3, upper[0], upper[1]);
        mma_m16n8k16(out[w][n], a0, a1, a2, a3, lower[0], lower[1]);
      }
    }
  }
}

}  // namespace patternkv
