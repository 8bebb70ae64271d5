// The queries of an item of few rows as MMA operands in registers, straight from memory, and their
// products with K's patterns. Every warp has all queries, so none waits for another.
#pragma once

#include "patternkv/decode_queries.cuh"

namespace patternkv {
namespace narrow {

constexpr int kOwnDims = D / 4;  // of K: a lane has those from t * kOwnDims on

// A lane's dims of a row of K's kind, as loaded.
struct OwnDims {
  uint32_t words[kOwnDims / 2];

  // Zeros beyond the head's dims.
  __device__ __forceinline__ void load(const void* row) {
    const int first = threadIdx.x % 4 * kOwnDims;
    if (D == HEAD_DIM || first < HEAD_DIM) {
      load_early(words, static_cast<const __half*>(row) + first);
    } else {
#pragma unroll
      for (uint32_t& word : words) word = 0;
    }
  }
};

// 16 patterns of K, two for each lane: A operand of their products with queries.
struct KeyPatterns {
  OwnDims low, high;  // of the patterns g and g + 8 from the first on

  __device__ __forceinline__ void load(const DecodeParams& p, const WorkItem& item, int head,
                                       int first) {
    const __half* rows = table_rows(p, item.table, 0, head);
    const int own = first + threadIdx.x % 32 / 4, last = p.num_patterns - 1;
    low.load(rows + min(own, last) * HEAD_DIM);
    high.load(rows + min(own + 8, last) * HEAD_DIM);
  }
};

// Column g of B operands is query row g of the item; columns without a row are zero. All rows share
// a scale, a power of two.
struct Queries {
  uint32_t raw[kOwnDims / 2];    // q * scale
  uint32_t codes[kOwnDims / 2];  // q * scale * channel_scale, as `expand` yields K's dims
  float to_logits;               // from products with either

  // Of loaded queries, zeros unless `any`, and the channel scales that they meet.
  __device__ __forceinline__ Queries(const DecodeParams& p, const OwnDims& loaded, bool any,
                                     const OwnDims& channels) {
    // Magnitudes of 16-bit floats are ordered like their bits; those of NaN and infinity count as
    // the largest number.
    uint32_t queries = 0, factors = 0;
#pragma unroll
    for (int i = 0; i < kOwnDims / 2; ++i) {
      queries = __vmaxu2(queries, loaded.words[i] & 0x7fff7fff);
      factors = __vmaxu2(factors, channels.words[i]);
    }
    const auto largest_half = [](uint32_t x) { return max(x & 0xffff, x >> 16); };
    uint32_t both =
        min(largest_half(queries), p.q_is_bf16 ? 0x7f7fu : 0x7bffu) | largest_half(factors) << 16;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      both = __vmaxu2(both, __shfl_xor_sync(~0u, both, distance));
    }
    const float largest =
        p.q_is_bf16 ? __uint_as_float(both << 16) : half_bits_to_float(both & 0xffff);
    // As large as fp16 takes, with channel scales: small components stay normal numbers.
    const float scale =
        power_of_two_scale(largest * fmaxf(half_bits_to_float(both >> 16), 1.0f), 14);
    to_logits = p.scale_log2 / scale;
    const float own_scale = any ? scale : 0.0f;
    constexpr int kPairs = KCodes::kPerHalf / 2;  // of dims in half of a word's codes
#pragma unroll
    for (int word = 0; word < kOwnDims / 2; word += 2 * kPairs) {
      uint32_t products[2 * kPairs];
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        float q[2];
        const uint32_t pair[1] = {loaded.words[word + i]};
        if (p.q_is_bf16) {
          to_floats<__nv_bfloat16>(q, pair);
        } else {
          to_floats<__half>(q, pair);
        }
        raw[word + i] = as_u32(__floats2half2_rn(q[0] * own_scale, q[1] * own_scale));
        products[i] = as_u32(__hmul2(as_half2(raw[word + i]), as_half2(channels.words[word + i])));
      }
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const uint32_t pair =
            __byte_perm(products[i / 2], products[i / 2 + kPairs], i % 2 ? 0x7632 : 0x5410);
        codes[word + i] = as_u32(__hmul2(as_half2(pair), __float2half2_rn(1.0f / KCodes::step(i))));
      }
    }
  }

  // What the bias of expanded codes and their centre add to the products of the rows 2t and 2t + 1,
  // see `code_bias`.
  __device__ __forceinline__ void code_bias(float (&bias)[2]) const {
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kOwnDims / 2; i += 2) multiply_centres(sums, i, codes[i], codes[i + 1]);
    bias[0] = sums[0], bias[1] = sums[1];
  }

  // Products with the patterns from `first` on, in logits: `store(pattern, row, value)` for each of
  // those below num_patterns and 8 rows.
  template <typename Store>
  __device__ __forceinline__ void meet(const KeyPatterns& patterns, int first, int num_patterns,
                                       Store store) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t (&low)[kOwnDims / 2] = patterns.low.words;
    const uint32_t (&high)[kOwnDims / 2] = patterns.high.words;
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kOwnDims / 2; i += 2) {
      mma_m16n8k16(sums, low[i], high[i], low[i + 1], high[i + 1], raw[i], raw[i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pattern = first + g + i / 2 * 8;
      if (pattern < num_patterns) store(pattern, 2 * t + i % 2, sums[i] * to_logits);
    }
  }
};

}  // namespace narrow
}  // namespace patternkv
