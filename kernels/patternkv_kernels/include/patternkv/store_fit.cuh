// The scale and codes of a residual: for each of four trial scales the codes, for these codes the
// least-squares scale; the trial that explains most of the residual wins, and codes are rounded
// again with its float16 scale.
//
// Residuals and codes are float16 pairs; sums over a vector are MMAs with float32 accumulators. A
// warp holds 8 tokens, four lanes each (store_table.cuh), and stacks two trials of a token in the
// two halves of operand A, whose rows g and g + 8 belong to the same lanes. With the tokens as
// columns of operand B the sums of products of a token with itself are on the diagonal.
#pragma once

#include "patternkv/store_assign.cuh"

namespace patternkv {

constexpr int kTrials = 4;

// Trial scales in units of the one that just covers the largest residual.
template <int kBits>
__device__ __forceinline__ constexpr float trial_scale(int trial) {
  constexpr float scales[kTrials] = {kBits == 4 ? 0.65f : 0.4f, kBits == 4 ? 0.75f : 0.55f,
                                     kBits == 4 ? 0.9f : 0.7f, kBits == 4 ? 1.0f : 0.9f};
  return scales[trial];
}

// A residual in levels: residual = level * 2^exponent * channel_scale / scale_unit.
struct Residual {
  Share level;
  Share weighted;      // level * fit_weight
  float power;         // 2^exponent
  float largest;       // magnitude of the levels
  float weighted_sum;  // of `weighted`
  float distance;      // of the token from its pattern, by the table's weight
  bool zero;
};

// Entry (row, row) or (row + 8, row) of an accumulator tile, in all lanes of the row.
__device__ __forceinline__ float diagonal(float column0, float column1) {
  const int lane = threadIdx.x % 32, row = lane / 4;
  return __shfl_sync(kAllLanes, row % 2 ? column1 : column0, 4 * row + row / 2);
}

__device__ __forceinline__ void take_residual(const StoreTable& table, const Share& x,
                                              const __half* pattern, Residual& out) {
  const uint4* share = share_of(pattern);
  const __half2 zero = __float2half2_rn(0.0f), one = __float2half2_rn(1.0f);
  __half2 largest = zero;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 p[4];
    load_chunk(share, i, p);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out.level[4 * i + j] = __hsub2_rn(x[4 * i + j], p[j]);
      largest = __hmax2(largest, __habs2(out.level[4 * i + j]));
    }
  }
  const float2 halves = __half22float2(largest);
  float top = quad_max(fmaxf(halves.x, halves.y));
  if (isinf(top)) {
    const __half2 limit = __float2half2_rn(65504.0f);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      out.level[j] = __hmax2(__hmin2(out.level[j], limit), __hneg2(limit));
    }
    top = 65504.0f;
  }
  out.zero = top == 0.0f;
  // Brings the largest residual to [1, 2), as far as float16 has such powers.
  out.power = __uint_as_float(__float_as_uint(fminf(fmaxf(top, 0x1p-14f), 0x1p14f)) & 0x7f800000);
  const __half2 by_power = __float2half2_rn(inverse_power_of_two(out.power));

  largest = zero;
  // A holds pairs 0 and 1 of a chunk in its upper rows, 2 and 3 in its lower ones.
  float upper[4] = {}, lower[4] = {}, sum[4] = {};
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 inverse[4], weight[4];
    read_chunk(table.inverse_scale, i, inverse);
    read_chunk(table.fit_weight, i, weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * i + j;
      out.level[at] = __hmul2_rn(__hmul2_rn(out.level[at], by_power), inverse[j]);
      out.weighted[at] = __hmul2_rn(out.level[at], weight[j]);
      largest = __hmax2(largest, __habs2(out.level[at]));
    }
    const __half2* level = out.level + 4 * i;
    const uint32_t b0 = as_u32(out.weighted[4 * i]), b1 = as_u32(out.weighted[4 * i + 1]);
    const uint32_t b2 = as_u32(out.weighted[4 * i + 2]), b3 = as_u32(out.weighted[4 * i + 3]);
    const uint32_t ones = as_u32(one);
    mma_m16n8k16(upper, as_u32(level[0]), as_u32(level[2]), as_u32(level[1]), as_u32(level[3]), b0,
                 b1);
    mma_m16n8k16(lower, as_u32(level[0]), as_u32(level[2]), as_u32(level[1]), as_u32(level[3]), b2,
                 b3);
    mma_m16n8k16(sum, ones, ones, ones, ones, b0, b1);
    mma_m16n8k16(sum, ones, ones, ones, ones, b2, b3);
  }
  const float2 level_halves = __half22float2(largest);
  out.largest = quad_max(fmaxf(level_halves.x, level_halves.y));
  out.weighted_sum = diagonal(sum[0], sum[1]);
  const float unit = __fmul_rn(table.distance_unit, __fmul_rn(out.power, out.power));
  const float squares = diagonal(__fadd_rn(upper[0], lower[2]), __fadd_rn(upper[1], lower[3]));
  out.distance = __fmul_rn(squares, unit);
}

// 1024 + code of levels, as float16: rounding to the nearest integer is what adding 1024 does.
template <int kBits>
__device__ __forceinline__ __half2 biased_codes(__half2 level, __half2 inverse_range) {
  const __half2 half = __float2half2_rn(0.5f), top = __float2half2_rn((1 << kBits) - 1);
  // Saturates to [0, 1].
  const __half2 place = __hfma2_sat(level, inverse_range, half);
  return __hfma2(place, top, __float2half2_rn(1024.0f));
}

// Scale of levels in float32, near the least squares.
template <int kBits>
__device__ __forceinline__ float search_scale(const StoreTable& table, const Residual& r) {
  constexpr float kTop = (1 << kBits) - 1, kCentre = kTop / 2;
  const __half2 bias = __float2half2_rn(1024.0f);
  // Half the range that the codes of a scale span is kCentre scales.
  const float cover = fmaxf(r.largest, 0x1p-13f);
  float best_scale = 0.0f, best_value = -INFINITY;
#pragma unroll
  for (int trial = 0; trial < kTrials; trial += 2) {
    __half2 inverse_range[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float range = __fmul_rn(2 * trial_scale<kBits>(trial + k), cover);
      inverse_range[k] = __float2half2_rn(__fdividef(1.0f, range));
    }
    // Of both trials: sum of weighted level * code, of weight * code, of weight * code^2.
    float dot[4] = {}, linear[4] = {}, square[4] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      __half2 weight[4];
      read_chunk(table.fit_weight, i, weight);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t code[4], code_square[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const __half2 biased =
              biased_codes<kBits>(r.level[4 * i + j + k / 2], inverse_range[k % 2]);
          const __half2 plain = __hsub2_rn(biased, bias);
          code[k] = as_u32(plain);
          code_square[k] = as_u32(__hmul2_rn(plain, plain));
        }
        const uint32_t w0 = as_u32(weight[j]), w1 = as_u32(weight[j + 1]);
        mma_m16n8k16(dot, code[0], code[1], code[2], code[3], as_u32(r.weighted[4 * i + j]),
                     as_u32(r.weighted[4 * i + j + 1]));
        mma_m16n8k16(linear, code[0], code[1], code[2], code[3], w0, w1);
        mma_m16n8k16(square, code_square[0], code_square[1], code_square[2], code_square[3], w0,
                     w1);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      // From codes to levels, which are codes less kCentre.
      const float product =
          __fmaf_rn(-kCentre, r.weighted_sum, diagonal(dot[2 * k], dot[2 * k + 1]));
      const float norm = __fmaf_rn(kCentre * kCentre, table.fit_weight_sum,
                                   __fmaf_rn(-kTop, linear[2 * k], square[2 * k]));
      const float scale = __fdividef(product, norm);
      const float value = __fmul_rn(scale, product);
      if (value > best_value) {
        best_value = value;
        best_scale = scale;
      }
    }
  }
  return best_scale;
}

// Codes of 8 consecutive dims, of four pairs of `biased_codes`, packed little end first.
template <int kBits>
__device__ __forceinline__ uint32_t pack_codes(const __half2 (&biased)[4]) {
  const uint32_t b0 = as_u32(biased[0]), b1 = as_u32(biased[1]);
  const uint32_t b2 = as_u32(biased[2]), b3 = as_u32(biased[3]);
  constexpr uint32_t kBias = 0x64006400;  // half2(1024, 1024)
  if constexpr (kBits == 4) {
    // Bytes: codes 0, 2 | 1, 3 and 4, 6 | 5, 7 of low | high halves.
    const uint32_t first = b0 + (b1 << 8) - (kBias + (kBias << 8));
    const uint32_t second = b2 + (b3 << 8) - (kBias + (kBias << 8));
    return __byte_perm(first, second, 0x5410) + (__byte_perm(first, second, 0x7632) << 4);
  } else {
    // 4-bit fields: codes 0, 2, 4, 6 | 1, 3, 5, 7 of the low | high half.
    const uint32_t fields = b0 + (b1 << 4) + (b2 << 8) + (b3 << 12) -
                            (kBias + (kBias << 4) + (kBias << 8) + (kBias << 12));
    return (fields & 0xffff) + (fields >> 16 << 2);
  }
}

// What is stored of a vector; code words of the lane's chunks of 8 dims, low bits first.
struct StoredVector {
  uint32_t codes[kChunks];
  __half scale;
};

template <int kBits>
__device__ __forceinline__ StoredVector fit(const StoreTable& table, const Residual& r) {
  constexpr float kTop = (1 << kBits) - 1, kFloat16Max = 65504.0f;
  StoredVector out;
  const float unit = __fmul_rn(r.power, table.scale_unit);  // of slot scales, a power of two
  const float scale = __fmul_rn(search_scale<kBits>(table, r), unit);
  out.scale = __float2half_rn(fminf(fmaxf(scale, 0.0f), kFloat16Max));
  const float stored = __fdividef(__half2float(out.scale), unit);
  const float inverse = stored > 0.0f ? __fdividef(1.0f, __fmul_rn(kTop, stored)) : 1.0f;
  const __half2 inverse_range = __float2half2_rn(fminf(inverse, kFloat16Max));
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 biased[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) biased[j] = biased_codes<kBits>(r.level[4 * i + j], inverse_range);
    out.codes[i] = pack_codes<kBits>(biased);
  }
  return out;
}

// Residual of token `row` from its pattern; corrects `nearest` where scores cannot tell patterns
// apart and the token is `wanted`.
__device__ __forceinline__ void settle(const StoreTable& table, const __half* patterns,
                                       int num_patterns, const Share& x, bool wanted,
                                       Nearest& nearest, Residual& out) {
  take_residual(table, x, patterns + nearest.id * HEAD_DIM, out);
  // A score is half of what the pattern explains, so this is a relative distance of 2^-16.
  const bool unclear = wanted && !out.zero && out.distance <= __fmul_rn(0x1p-15f, nearest.score);
  if (__any_sync(kAllLanes, unclear)) {
    const int id = nearest_by_difference(table, patterns, num_patterns, x);
    if (unclear) nearest.id = id;
    take_residual(table, x, patterns + nearest.id * HEAD_DIM, out);
  }
}

}  // namespace patternkv
