// The nearest pattern of tokens, on tensor cores: the largest x . (w^2 p) - |w p|^2 / 2.
//
// The weighted token w^2 x is split into two float16 values, which keeps 22 bits of it; patterns
// are float16. A token's scores depend on its own rows of the operands only, so its pattern does
// not depend on what else is in the tile.
#pragma once

#include "patternkv/store_table.cuh"

namespace patternkv {

constexpr int kTileTokens = 8;  // tokens that a warp holds in one Share

// Best pattern of a token so far; of equal scores the lowest id wins.
struct Nearest {
  float score;
  int id;

  __device__ void offer(float other_score, int other_id) {
    if (other_score > score || (other_score == score && other_id < id)) {
      score = other_score;
      id = other_id;
    }
  }
};

// Operand A of kGroups tiles of 8 tokens. A token takes two rows, `high` and `low` of its weighted
// components; with a plain weight, where `low` is 0, the rows are of tokens of two tiles.
template <bool kPlainWeight, int kGroups>
struct TokenOperand {
  static constexpr int kCount = kPlainWeight ? (kGroups + 1) / 2 : kGroups;
  __half2 upper[kCount][kPairs];  // rows 0-7
  __half2 lower[kCount][kPairs];  // rows 8-15

  // `read(group, i, out)` gives chunk i of the lane's share.
  template <typename Read>
  __device__ __forceinline__ TokenOperand(const StoreTable& table, Read read) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      __half2 weight[4], x[kGroups][4];
      read_chunk(table.weight, i, weight);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) read(group, i, x[group]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * i + j;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if constexpr (kPlainWeight) {
            upper[k][at] = __hmul2_rn(x[2 * k][j], weight[j]);
            lower[k][at] = 2 * k + 1 < kGroups ? __hmul2_rn(x[(2 * k + 1) % kGroups][j], weight[j])
                                               : __float2half2_rn(0.0f);
          } else {
            upper[k][at] = __hmul2_rn(x[k][j], weight[j]);
            lower[k][at] = __hfma2(x[k][j], weight[j], __hneg2(upper[k][at]));
          }
        }
      }
    }
  }
};

// Scores every `step`-th tile of patterns from tile `first` on for kGroups tiles of 8 tokens that
// `read` gives, kAtOnce tiles of patterns together, so that their chains of products overlap.
// best[group]: of token `row`, the same in its four lanes.
template <bool kPlainWeight, int kAtOnce, typename Read, int kGroups>
__device__ __forceinline__ void score_patterns(const StoreTable& table, const __half* patterns,
                                               int num_patterns, Read read, int first, int step,
                                               Nearest (&best)[kGroups]) {
  const int lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
  const TokenOperand<kPlainWeight, kGroups> tokens(table, read);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) best[group] = {-INFINITY, 0};
  const uint4* row_of_first_tile = share_of(patterns + row * HEAD_DIM);
  for (int tile = first * kTilePatterns; tile < num_patterns;
       tile += kAtOnce * step * kTilePatterns) {
    float sums[kAtOnce][tokens.kCount][4];
    const uint4* pattern[kAtOnce];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      // Rows past the end repeat the last pattern, which then wins with its own, lower id.
      const int at = tile + t * step * kTilePatterns;
      const int64_t ahead = min(at, num_patterns - 1 - row);
      pattern[t] = row_of_first_tile + ahead * (HEAD_DIM / 8);
      // Whole tiles past the end never win.
      const float2 bias = kAtOnce == 1 || at < num_patterns
                              ? *reinterpret_cast<const float2*>(&table.score_bias[at + 2 * part])
                              : float2{-INFINITY, -INFINITY};
#pragma unroll
      for (int k = 0; k < tokens.kCount; ++k) {
        sums[t][k][0] = bias.x, sums[t][k][1] = bias.y;
        sums[t][k][2] = kPlainWeight ? bias.x : 0.0f, sums[t][k][3] = kPlainWeight ? bias.y : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        __half2 p[4];
        load_chunk(pattern[t], i, p);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const int at = 4 * i + j;
#pragma unroll
          for (int k = 0; k < tokens.kCount; ++k) {
            mma_m16n8k16(sums[t][k], as_u32(tokens.upper[k][at]), as_u32(tokens.lower[k][at]),
                         as_u32(tokens.upper[k][at + 1]), as_u32(tokens.lower[k][at + 1]),
                         as_u32(p[j]), as_u32(p[j + 1]));
          }
        }
      }
    }
    // A lane has the patterns 2 * part and 2 * part + 1 of the tile. Its ids ascend, so the first
    // of equals is the lowest.
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float (&sum)[4] = sums[t][kPlainWeight ? group / 2 : group];
          const float score = kPlainWeight ? sum[2 * (group % 2) + column]
                                           : __fadd_rn(sum[column], sum[2 + column]);
          if (score > best[group].score) {
            best[group] = {score, tile + t * step * kTilePatterns + column};
          }
        }
      }
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    best[group].id += 2 * part;
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float score = __shfl_xor_sync(kAllLanes, best[group].score, lanes);
      best[group].offer(score, __shfl_xor_sync(kAllLanes, best[group].id, lanes));
    }
  }
}

template <int kAtOnce, typename Read, int kGroups>
__device__ __forceinline__ void nearest_patterns(const StoreTable& table, const __half* patterns,
                                                 int num_patterns, Read read, int first, int step,
                                                 Nearest (&best)[kGroups]) {
  if (table.plain_weight) {
    score_patterns<true, kAtOnce>(table, patterns, num_patterns, read, first, step, best);
  } else {
    score_patterns<false, kAtOnce>(table, patterns, num_patterns, read, first, step, best);
  }
}

// The nearest pattern of token `row` by sums of squared differences, which scores cannot tell when
// they nearly cancel: of a token that equals a pattern it is always that pattern. All lanes of a
// warp.
__device__ __forceinline__ int nearest_by_difference(const StoreTable& table,
                                                     const __half* patterns, int num_patterns,
                                                     const Share& x) {
  Nearest best = {-INFINITY, 0};
#pragma unroll 1
  for (int id = 0; id < num_patterns; ++id) {
    const uint4* pattern = share_of(patterns + id * HEAD_DIM);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      __half2 p[4], weight[4];
      load_chunk(pattern, i, p);
      read_chunk(table.weight, i, weight);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 a = __half22float2(x[4 * i + j]), b = __half22float2(p[j]);
        const float2 w = __half22float2(weight[j]);
        const float first = __fsub_rn(a.x, b.x), second = __fsub_rn(a.y, b.y);
        sum = __fmaf_rn(__fmul_rn(first, w.x), first, sum);
        sum = __fmaf_rn(__fmul_rn(second, w.y), second, sum);
      }
    }
    best.offer(-quad_sum(sum), id);
  }
  return best.id;
}

}  // namespace patternkv
