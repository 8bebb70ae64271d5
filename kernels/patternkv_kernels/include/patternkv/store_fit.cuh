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

// A residual in levels: residual = level * power * channel_scale / scale_unit.
struct Residual {
  Share level;
  Share weighted;  // level * fit_weight
  float power;     // of two
  float largest;   // magnitude of the levels
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
  const __half2 zero = __float2half2_rn(0.0f);
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
  // Residuals that are not near 1 are brought to [1, 2), as far as float16 has such powers.
  const bool extreme = top >= 16.0f || (top < 0x1p-6f && !out.zero);
  const float clamped = fminf(fmaxf(top, 0x1p-14f), 0x1p14f);
  out.power = extreme ? __uint_as_float(__float_as_uint(clamped) & 0x7f800000) : 1.0f;
  if (__any_sync(kAllLanes, extreme)) {
    const __half2 by_power = __float2half2_rn(inverse_power_of_two(out.power));
#pragma unroll
    for (int j = 0; j < kPairs; ++j) out.level[j] = __hmul2_rn(out.level[j], by_power);
  }

  largest = zero;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 inverse[4], weight[4];
    read_chunk(table.inverse_scale, i, inverse);
    read_chunk(table.fit_weight, i, weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * i + j;
      out.level[at] = __hmul2_rn(out.level[at], inverse[j]);
      out.weighted[at] = __hmul2_rn(out.level[at], weight[j]);
      largest = __hmax2(largest, __habs2(out.level[at]));
    }
  }
  const float2 level_halves = __half22float2(largest);
  out.largest = quad_max(fmaxf(level_halves.x, level_halves.y));
}

// 1024 + code of levels, as float16: rounding to the nearest integer is what adding 1024 does.
template <int kBits>
__device__ __forceinline__ __half2 biased_codes(__half2 level, __half2 inverse_range) {
  const __half2 half = __float2half2_rn(0.5f), top = __float2half2_rn((1 << kBits) - 1);
  // Saturates to [0, 1].
  const __half2 place = __hfma2_sat(level, inverse_range, half);
  return __hfma2(place, top, __float2half2_rn(1024.0f));
}

// The best scale of levels, and how much of their weighted square it explains.
struct Scale {
  float scale, explained;
};

template <int kBits>
__device__ __forceinline__ Scale search_scale(const StoreTable& table, const Residual& r) {
  constexpr float kCentre = ((1 << kBits) - 1) / 2.0f;
  const __half2 bias = __float2half2_rn(1024.0f), centre = __float2half2_rn(kCentre);
  // The codes of a scale span kTop scales, which are two covers of the levels times the trial.
  const float by_cover = __fdividef(1.0f, fmaxf(r.largest, 0x1p-13f));
  __half2 inverse_ranges[kTrials / 2];
#pragma unroll
  for (int k = 0; k < kTrials / 2; ++k) {
    inverse_ranges[k] =
        __floats2half2_rn(__fmul_rn(0.5f / trial_scale<kBits>(2 * k), by_cover),
                          __fmul_rn(0.5f / trial_scale<kBits>(2 * k + 1), by_cover));
  }
  // Of pairs of trials, with codes less kCentre: sum of weighted level * code, of weight * code^2.
  float dot[kTrials / 2][4] = {}, norm[kTrials / 2][4] = {};
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    __half2 weight[4];
    read_chunk(table.fit_weight, i, weight);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t w0 = as_u32(weight[j]), w1 = as_u32(weight[j + 1]);
#pragma unroll
      for (int pair = 0; pair < kTrials / 2; ++pair) {
        const __half2 inverse_range[2] = {__low2half2(inverse_ranges[pair]),
                                          __high2half2(inverse_ranges[pair])};
        uint32_t code[4], code_square[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const __half2 biased =
              biased_codes<kBits>(r.level[4 * i + j + k / 2], inverse_range[k % 2]);
          // Exact, squares too; kCentre + 1024 would not be.
          const __half2 centred = __hsub2_rn(__hsub2_rn(biased, bias), centre);
          code[k] = as_u32(centred);
          code_square[k] = as_u32(__hmul2_rn(centred, centred));
        }
        mma_m16n8k16(dot[pair], code[0], code[1], code[2], code[3], as_u32(r.weighted[4 * i + j]),
                     as_u32(r.weighted[4 * i + j + 1]));
        mma_m16n8k16(norm[pair], code_square[0], code_square[1], code_square[2], code_square[3], w0,
                     w1);
      }
    }
  }
  Scale best = {0.0f, -INFINITY};
#pragma unroll
  for (int trial = 0; trial < kTrials; ++trial) {
    const int pair = trial / 2, k = trial % 2;
    const float product = diagonal(dot[pair][2 * k], dot[pair][2 * k + 1]);
    const float scale = __fdividef(product, norm[pair][2 * k]);
    const float explained = __fmul_rn(scale, product);
    if (explained > best.explained) best = {scale, explained};
  }
  return best;
}

// Codes of 8 consecutive dims, of four pairs of `biased_codes`, packed little end first.
template <int kBits>
__device__ __forceinline__ uint32_t pack_codes(const __half2 (&biased)[4]) {
  // A code is the low byte of its half: bytes of codes 0-3 and 4-7.
  const uint32_t first = __byte_perm(as_u32(biased[0]), as_u32(biased[1]), 0x6420);
  const uint32_t second = __byte_perm(as_u32(biased[2]), as_u32(biased[3]), 0x6420);
  if constexpr (kBits == 4) {
    // Bytes 0 and 2 now hold two codes each.
    return __byte_perm(first + (first >> 4), second + (second >> 4), 0x6420);
  } else {
    // Shifts the bytes by 24, 18, 12 and 6 and adds them: the last byte holds four codes.
    constexpr uint32_t kShifts = 1u << 24 | 1u << 18 | 1u << 12 | 1u << 6;
    return __byte_perm(first * kShifts, second * kShifts, 0x0073);
  }
}

// What is stored of a vector; code words of the lane's chunks of 8 dims, low bits first.
struct StoredVector {
  uint32_t codes[kChunks];
  __half scale;
};

template <int kBits>
__device__ __forceinline__ StoredVector encode(const StoreTable& table, const Residual& r,
                                               float scale_of_levels) {
  constexpr float kTop = (1 << kBits) - 1, kFloat16Max = 65504.0f;
  StoredVector out;
  const float unit = __fmul_rn(r.power, table.scale_unit);  // of slot scales, a power of two
  const float scale = __fmul_rn(scale_of_levels, unit);
  out.scale = __float2half_rn(fminf(fmaxf(scale, 0.0f), kFloat16Max));
  // Of a scale of 0 the codes do not matter.
  const float stored = __fmul_rn(kTop, __half2float(out.scale));
  const float inverse = stored > 0.0f ? __fdividef(unit, stored) : 1.0f;
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

// What is stored of token `row`. Corrects `nearest` where scores cannot tell patterns apart and the
// token is `wanted`.
template <int kBits>
__device__ __forceinline__ StoredVector fit(const StoreTable& table, const __half* patterns,
                                            int num_patterns, const Share& x, bool wanted,
                                            Nearest& nearest) {
#pragma unroll 1
  for (bool settled = false;; settled = true) {
    Residual residual;
    take_residual(table, x, patterns + nearest.id * HEAD_DIM, residual);
    const Scale best = search_scale<kBits>(table, residual);
    // No more than the square of the residual can be explained, and a score is half of what the
    // pattern explains: true of every residual below 2^-16 of that, and of few others.
    const float unit = __fmul_rn(table.distance_unit, __fmul_rn(residual.power, residual.power));
    const bool unclear = wanted && !residual.zero &&
                         __fmul_rn(best.explained, unit) <= __fmul_rn(0x1p-15f, nearest.score);
    if (settled || !__any_sync(kAllLanes, unclear)) {
      return encode<kBits>(table, residual, best.scale);
    }
    const int id = nearest_by_difference(table, patterns, num_patterns, x);
    if (unclear) nearest.id = id;
  }
}

}  // namespace patternkv
