// What the hopper kernel leaves of an item: the running attention's sums become states of rows.
#pragma once

#include "patternkv/hopper_attention.cuh"

namespace patternkv {
namespace hopper {

// Softmax mass and scaled probabilities of each row. From here on `bias` holds factors that bring a
// row's sums near 2^10, where fp16 has them, and `shift` its scaled probabilities.
template <int kRows, int kPatterns>
__device__ __forceinline__ void Attention<kRows, kPatterns>::add_up(const DecodeParams& p,
                                                                    const WorkItem& item,
                                                                    int head) {
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    const int element = i / 2 * 4 + i % 2;
    float mass = sums[0][element] + sums[0][element + 2], sum = scaled[i];
#pragma unroll
    for (int k = 1; k < kGroups; ++k) mass += sums[k][element] + sums[k][element + 2];
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      mass += __shfl_xor_sync(~0u, mass, distance);
      sum += __shfl_xor_sync(~0u, sum, distance);
    }
    if (g == 0) memory.totals[warp][row_of(i)] = make_float2(mass, sum);
  }
  __syncthreads();
  if (thread < kRows) {
    float mass = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      mass += memory.totals[w][thread].x, sum += memory.totals[w][thread].y;
    }
    memory.bias[thread] = power_of_two_scale(mass, 10);
    memory.shift[thread] = sum;
    memory.states[thread] = -1;
    if (thread < item.num_branches * p.group) {
      const int64_t at = state_index(p, item, head, thread);
      memory.states[thread] = static_cast<int>(at);
      p.state_sum[at] = make_float2(memory.reference[thread], mass);
    }
  }
  __syncthreads();
}

// Takes the centre off the codes' sums and scales them, and all sums by their row's factor.
template <int kRows, int kPatterns>
__device__ __forceinline__ void Attention<kRows, kPatterns>::finish_codes(
    const uint32_t (&channel_words)[kDimTiles], float value_scale) {
  float channel[2 * kDimTiles];
  to_floats<__half>(channel, channel_words);
#pragma unroll
  for (int i = 0; i < 2 * kDimTiles; ++i) channel[i] /= value_scale;
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    const int row = row_of(i);
    const float factor = memory.bias[row], centres = VCodes::kCentre * memory.shift[row];
#pragma unroll
    for (int d = 0; d < 2 * kDimTiles; ++d) {
      float& x = out[d / 2][i / 2 * 4 + i % 2 + 2 * (d % 2)];
      const float codes = x * (kMaskedUnit / VCodes::masked_step(d));
      x = (codes - centres) * (channel[d] * factor);
    }
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      sums[k][i / 2 * 4 + i % 2] *= factor;
      sums[k][i / 2 * 4 + i % 2 + 2] *= factor;
    }
  }
}

// Sums go to shared memory as two fp16 parts, so that they count with 22 bits.
template <int kRows, int kPatterns>
__device__ __forceinline__ void Attention<kRows, kPatterns>::share_sums() {
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const uint32_t at = memory.weights_place(k, warp, lane);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      uint32_t parts[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = sums[k][4 * j + 2 * h], y = sums[k][4 * j + 2 * h + 1];
        const __half2 coarse = __floats2half2_rn(x, y);
        const float2 back = __half22float2(coarse);
        parts[h] = as_u32(coarse);
        parts[2 + h] = as_u32(__floats2half2_rn(x - back.x, y - back.y));
      }
      store_matrices(at ^ (j * 16), parts);
    }
  }
  publish_operands();
  __syncthreads();
}

// Adds the V patterns of the k-th group, times the sums of their tokens' probabilities.
template <int kRows, int kPatterns>
__device__ __forceinline__ void Attention<kRows, kPatterns>::add_patterns(
    const ValuePatterns& patterns, int k) {
  uint32_t a[kGroupPatterns / 16][kDimTiles][4];
#pragma unroll
  for (int step = 0; step < kGroupPatterns / 16; ++step) {
    patterns.operands(a[step], step);
    settle(a[step]);
  }
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < kGroupPatterns / 16; ++step) {
    const uint32_t b = operand(shared_address(memory.weights[k])) + step * kSwizzledRow;
#pragma unroll
    for (int i = 0; i < kDimTiles; ++i) {
      wgmma_by_columns(out[i], a[step][i], b);
      wgmma_by_columns(out[i], a[step][i], b + Memory::kPlainOffset / 16);
    }
  }
  wgmma_commit();
  finish();
}

template <int kRows, int kPatterns>
__device__ __forceinline__ void Attention<kRows, kPatterns>::store(const DecodeParams& p,
                                                                   const WorkItem& item, int head,
                                                                   float value_scale) {
  const int dim = first_dim(warp, g);
  uint32_t channel_words[kDimTiles];
  load_early(channel_words, table_channels(p, item.table, 1, head) + dim);
  ValuePatterns patterns(p, item, head, dim, 0, t);
  add_up(p, item, head);
  finish_codes(channel_words, value_scale);
  share_sums();
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    if (k > 0) patterns = ValuePatterns(p, item, head, dim, k, t);
    add_patterns(patterns, k);
  }
  float* to = p.state_out + dim;
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    const int row = row_of(i), state = memory.states[row];
    if (state < 0) continue;
    const float unit = 1.0f / memory.bias[row];  // a power of two
    uint32_t words[2 * kDimTiles];
#pragma unroll
    for (int d = 0; d < 2 * kDimTiles; ++d) {
      words[d] = __float_as_uint(out[d / 2][i / 2 * 4 + i % 2 + 2 * (d % 2)] * unit);
    }
    store_words(reinterpret_cast<uint8_t*>(to + int64_t{state} * HEAD_DIM), words);
  }
}

}  // namespace hopper
}  // namespace patternkv
