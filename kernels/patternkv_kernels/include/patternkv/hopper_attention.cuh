// The running attention of the hopper kernel: products of a tile and its softmax.
#pragma once

#include <climits>

#include "patternkv/hopper_queries.cuh"

namespace patternkv {
namespace hopper {

// Probabilities are 2^(logit - reference). A row's reference is raised to kHeadroom above its
// largest logit as soon as a logit is more than kLimit above it: fp16 holds what lies between, with
// V scales of up to kMostScale too, and steps of 2^-20 of the largest.
constexpr float kHeadroom = 4.0f, kLimit = 11.0f;

// A thread's dims of the V patterns of a group: of each 16 those at 2 t, + 1, + 8 and + 9.
struct ValuePatterns {
  uint32_t rows[kGroupPatterns / 16][4][kDimTiles];

  __device__ __forceinline__ ValuePatterns(const DecodeParams& p, const WorkItem& item, int head,
                                           int dim, int group, int t) {
    const __half* patterns = table_rows(p, item.table, 1, head) + dim;
#pragma unroll
    for (int i = 0; i < kGroupPatterns / 4; ++i) {
      const int own = group * kGroupPatterns + i / 4 * 16 + 2 * t + i % 2 + i / 2 % 2 * 8;
      load_early(rows[i / 4][i % 4], patterns + min(own, p.num_patterns - 1) * HEAD_DIM);
    }
  }
  // Of a product over 16 patterns.
  __device__ __forceinline__ void operands(uint32_t (&a)[kDimTiles][4], int step) const {
#pragma unroll
    for (int i = 0; i < kDimTiles * 4; ++i) {
      const int h = i % 4;
      a[i / 4][h] = __byte_perm(rows[step][h / 2 * 2][i / 4], rows[step][h / 2 * 2 + 1][i / 4],
                                h % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
};

// The running attention of a block: a thread's share of the accumulators.
template <int kRows, int kPatterns>
struct Attention {
  using Memory = hopper::Memory<kRows, kPatterns>;
  static constexpr int kGroups = Memory::kGroups;

  Memory& memory;
  const int thread;
  float cap_log2;
  // Warp w, lane 4 g + t, element 4 j + 2 h + e: query row 8 j + 2 t + e and
  float out[kDimTiles][kRows / 2] = {};  // [i]: dim first_dim() + 2 i + h
  float sums[kGroups][kRows / 2] = {};   // [i]: pattern 64 i + 16 w + 8 h + g, its probabilities
  // Probabilities times V scales, of the thread's tokens: element 2 j + e.
  float scaled[kRows / 4] = {};
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  // What products with codes start from, element 2 j + e. In registers: loads of it would be ones
  // too many in flight at the beginning of a tile, where others would wait for the metadata of a
  // later tile.
  float start[kRows / 4];

  __device__ __forceinline__ Attention(Memory& memory, int thread, float cap_log2)
      : memory(memory), thread(thread), cap_log2(cap_log2) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) start[i] = -memory.bias[row_of(i)];
  }

  // Products of queries and K codes of the tile, and their sums with the table: logits of the
  // tokens 16 w + g + 8 h, relative to the references.
  __device__ __forceinline__ void multiply_keys(float (&x)[kRows / 2], int stage) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) x[i] = start[i / 4 * 2 + i % 2];
    const KeyWords words = load_keys(memory.codes[stage], warp * 16 + g, t);
    uint32_t a[HEAD_DIM / 16][4];
#pragma unroll
    for (int w = 0; w < KeyWords::kCount; ++w) {
#pragma unroll
      for (int r = 0; r < KCodes::kPerHalf; ++r) {
        const int slot = w * KCodes::kPerHalf + r;
        a[slot / 2][slot % 2 * 2] = KCodes::mask_pair(words.low[w], r);
        a[slot / 2][slot % 2 * 2 + 1] = KCodes::mask_pair(words.high[w], r);
      }
    }
    multiply_queries<kRows>(x, a, memory.queries[0]);
  }

  __device__ __forceinline__ void add_table(float (&x)[kRows / 2], const Token (&tokens)[2],
                                            int valid) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t row = shared_address(memory.table) + tokens[h].table_offset;
#pragma unroll
      for (int i = 0; i < kRows / 8; i += 2) {
        const float4 product = load_shared_float4(Table<kRows>::place(row, i, t));
        float* logits = x + 4 * i + 2 * h;
        logits[0] = fmaf(logits[0], tokens[h].k_scale, product.x);
        logits[1] = fmaf(logits[1], tokens[h].k_scale, product.y);
        logits[4] = fmaf(logits[4], tokens[h].k_scale, product.z);
        logits[5] = fmaf(logits[5], tokens[h].k_scale, product.w);
      }
    }
    if (cap_log2 > 0) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        const int row = i / 4 * 8 + 2 * t + i % 2;
        x[i] = soft_cap(x[i], cap_log2) - memory.reference[row];
      }
    }
    if (valid < kTile) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        if (warp * 16 + g + i / 2 % 2 * 8 >= valid) x[i] = -INFINITY;
      }
    }
  }

  // Logits to probabilities, which go to shared memory with and without their V scales.
  __device__ __forceinline__ void weigh(const float (&x)[kRows / 2], const Token (&tokens)[2],
                                        int buffer) {
    const uint32_t at = memory.weights_place(buffer, warp, lane);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      uint32_t weights[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float p0 = exp2_approx(x[4 * j + 2 * h]), p1 = exp2_approx(x[4 * j + 2 * h + 1]);
        const float v_scale = __low2float(as_half2(tokens[h].v_scale));
        scaled[2 * j] = fmaf(p0, v_scale, scaled[2 * j]);
        scaled[2 * j + 1] = fmaf(p1, v_scale, scaled[2 * j + 1]);
        const __half2 plain = __floats2half2_rn(p0, p1);
        weights[h] = as_u32(__hmul2(plain, as_half2(tokens[h].v_scale)));
        weights[2 + h] = as_u32(plain);
      }
      store_matrices(at ^ (j * 16), weights);
    }
    publish_operands();
  }

  // Takes back what weigh added to `scaled`.
  __device__ __forceinline__ void unweigh(const float (&x)[kRows / 2], const Token (&tokens)[2]) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const float v_scale = __low2float(as_half2(tokens[i / 2 % 2].v_scale));
      float& sum = scaled[i / 4 * 2 + i % 2];
      sum = fmaf(exp2_approx(x[i]), -v_scale, sum);
    }
  }

  // Raises the references of rows with logits beyond kLimit, or of all rows before the first tile.
  __device__ __forceinline__ void raise(float (&x)[kRows / 2], bool first) {
    if (thread < kRows) memory.peak[thread] = INT_MIN;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int element = i / 2 * 4 + i % 2;
      float peak = fmaxf(x[element], x[element + 2]);
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, distance));
      }
      // Bits of positive floats, and of those with the sign flipped below them, are ordered like
      // the floats.
      const int bits = __float_as_int(peak);
      if (g == 0) {
        atomicMax(&memory.peak[row_of(i)], bits < 0 ? bits ^ INT_MAX : bits);
      }
    }
    __syncthreads();
    if (thread < kRows) {
      const int bits = memory.peak[thread];
      const float highest = __int_as_float(bits < 0 ? bits ^ INT_MAX : bits);
      const float shift = first || highest > kLimit ? ceilf(highest) + kHeadroom : 0.0f;
      memory.reference[thread] = first ? shift : memory.reference[thread] + shift;
      memory.shift[thread] = shift;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const float shift = memory.shift[row_of(i)];
      const float scale = first ? 0.0f : exp2_approx(-shift);
      scaled[i] *= scale;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int element = i / 2 * 4 + i % 2 + 2 * h;
        x[element] -= shift;
#pragma unroll
        for (int k = 0; k < kDimTiles; ++k) out[k][element] *= scale;
#pragma unroll
        for (int k = 0; k < kGroups; ++k) sums[k][element] *= scale;
      }
    }
    // Under a soft cap references come off later.
    if (cap_log2 == 0) {
      Table<kRows>::template lower<kPatterns>(memory.table, memory.shift, thread);
    }
  }

  // Adds the tile's V codes and one-hot patterns, weighted, to the accumulators.
  __device__ __forceinline__ void multiply_values(int stage, int buffer) {
    const uint32_t weights = operand(shared_address(memory.weights[buffer]));
    const uint8_t* values = memory.codes[stage] + kTile * kKStride;
    const uint32_t chunk = warp / kWarpsPerChunk * 16;
    const int shift = warp % kWarpsPerChunk * (16 / kWarpsPerChunk);
#pragma unroll
    for (int pair = 0; pair < kTile / 32; ++pair) {
      uint32_t words[4];  // 16 bits of V of the tokens 8 i + 2 t and the next
      load_matrices_trans(words, shared_address(values + (pair * 32 + lane) * kVStride) + chunk);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int step = 2 * pair + half;
        const uint32_t low = words[2 * half] >> shift, high = words[2 * half + 1] >> shift;
        uint32_t a[kDimTiles + kGroups][4];
#pragma unroll
        for (int i = 0; i < kDimTiles; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            a[i][h] = VCodes::mask_pair(low, 2 * i + h);
            a[i][2 + h] = VCodes::mask_pair(high, 2 * i + h);
          }
        }
        const auto* patterns =
            reinterpret_cast<const uint32_t*>(memory.patterns[stage]) + step * 8 + t;
        const __half2 first = as_half2(patterns[0]), second = as_half2(patterns[4]);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int pattern = i * kGroupPatterns + 16 * warp + 8 * h + g;
            const __half2 own = __float2half2_rn(static_cast<float>(pattern));
            a[kDimTiles + i][h] = as_u32(__heq2(first, own));
            a[kDimTiles + i][2 + h] = as_u32(__heq2(second, own));
          }
        }
        const uint32_t b = weights + step * kSwizzledRow;
        settle(a);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < kDimTiles; ++i) wgmma_by_columns(out[i], a[i], b);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          wgmma_by_columns(sums[i], a[kDimTiles + i], b + Memory::kPlainOffset / 16);
        }
        wgmma_commit();
        // Where registers are scarce, operands take turns in the same ones.
        if (kRows == 32 && step == 1) finish();
      }
    }
  }

  __device__ __forceinline__ void finish() {
    wgmma_wait();
#pragma unroll
    for (int i = 0; i < kDimTiles; ++i) settle(out[i]);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) settle(sums[i]);
  }

  // The state of every row: pattern terms join the codes', and sums go over all threads. This and
  // its steps are in hopper_state.cuh.
  __device__ __forceinline__ void store(const DecodeParams& p, const WorkItem& item, int head,
                                        float value_scale);

 private:
  // Of a thread's i-th row.
  __device__ __forceinline__ int row_of(int i) const { return i / 2 * 8 + 2 * t + i % 2; }
  __device__ __forceinline__ void add_up(const DecodeParams& p, const WorkItem& item, int head);
  __device__ __forceinline__ void finish_codes(const uint32_t (&channel_words)[kDimTiles],
                                               float value_scale);
  __device__ __forceinline__ void share_sums();
  __device__ __forceinline__ void add_patterns(const ValuePatterns& patterns, int k);
};

}  // namespace hopper
}  // namespace patternkv
