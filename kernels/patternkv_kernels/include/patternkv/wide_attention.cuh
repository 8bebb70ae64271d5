// The running attention of the wide kernel: products of a tile, its softmax, and what becomes of
// their sums at an item's end.
#pragma once

#include <climits>

#include "patternkv/wide_memory.cuh"

namespace patternkv {
namespace wide {

// A thread's share. kTiles: n-tiles of 8 query rows.
template <int kTiles>
struct Attention {
  using Config = wide::Config<kTiles>;
  using Shared = typename Config::Shared;
  using Table = wide::Table<kTiles>;
  using Histogram = wide::Histogram<kTiles>;
  // [slice of 16 tokens]: rows 8i + 2t, 8i + 2t + 1 of token g, then of token g + 8.
  using Logits = float[2][kTiles][4];

  // What the warp's tokens bring to the softmax: of token g of either slice, then of g + 8.
  struct Metadata {
    uint32_t v_scale[2][2], bins[2][2];
  };

  const DecodeParams& p;
  Shared& shared;
  uint8_t* table;
  uint32_t* histogram;
  int words;  // of either
  const FixedPoint fixed;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  const uint32_t own_table = shared_address(table) + t * 16;
  const uint32_t own_bins = shared_address(histogram) + t * 8;
  float out[kDims / 2][kTiles][4] = {};  // dims 2i, 2i, 2i+1, 2i+1 of rows 8n + 2t, 8n + 2t + 1
  float reference[kTiles][2] = {};       // of these rows

  // Products of queries and codes of the warp's 32 tokens.
  __device__ __forceinline__ void multiply_keys(const uint8_t* keys, Logits& x) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 bias = shared.bias[4 * i + t];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        x[s][i][0] = x[s][i][2] = -bias.x;
        x[s][i][1] = x[s][i][3] = -bias.y;
      }
    }
    KeyWords words[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) words[s] = load_keys(keys, warp * 32 + s * 16 + g, t);
#pragma unroll
    for (int w = 0; w < KeyWords::kCount; ++w) {
      uint32_t low[2][KCodes::kPerHalf], high[2][KCodes::kPerHalf];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        KCodes::expand(words[s].low[w], low[s]);
        KCodes::expand(words[s].high[w], high[s]);
      }
#pragma unroll
      for (int r = 0; r < KCodes::kPerHalf; r += 4) {
        const int slot = w * KCodes::kPerHalf + r;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const uint4 q = reinterpret_cast<const uint4*>(
              shared.queries.fragments)[(i * (D / 32) + slot / 4) * 32 + lane];
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            mma_m16n8k16(x[s][i], low[s][r], high[s][r], low[s][r + 1], high[s][r + 1], q.x, q.y);
          }
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            mma_m16n8k16(x[s][i], low[s][r + 2], high[s][r + 2], low[s][r + 3], high[s][r + 3], q.z,
                         q.w);
          }
        }
      }
    }
  }

  // Logits of products: scaled, with their patterns' from the table.
  __device__ __forceinline__ void add_patterns_of_keys(Logits& x, Metadata& of) const {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Token token = shared.tokens[warp * 32 + s * 16 + h * 8 + g];
        of.v_scale[s][h] = token.v_scale;
        of.bins[s][h] = own_bins + token.bin_offset;
        const uint32_t row = own_table + token.table_offset;
#pragma unroll
        for (int pair = 0; pair < kTiles / 2; ++pair) {
          const float4 product = load_shared_float4(row ^ (pair * 64));
          const float products[4] = {product.x, product.y, product.z, product.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& logit = x[s][2 * pair + i / 2][2 * h + i % 2];
            logit = fmaf(logit, token.k_scale, products[i]);
          }
        }
      }
    }
  }

  // Soft caps, and nothing of tokens beyond `valid`, counted from the thread's first one.
  __device__ __forceinline__ void cap_and_mask(Logits& x, int valid) const {
    if (p.cap_log2 > 0 || valid < 32) {
#pragma unroll
      for (int i = 0; i < 8 * kTiles; ++i) {
        float& logit = x[i / 4 % 2][i / 8][i % 4];
        if (p.cap_log2 > 0) logit = soft_cap(logit, p.cap_log2);
        if (i / 4 % 2 * 16 + i % 4 / 2 * 8 >= valid) logit = -INFINITY;
      }
    }
  }

  // Makes logits relative to the references, which are raised where that is needed, as in an item's
  // first tile. By the whole block.
  __device__ __forceinline__ void relate(Logits& x, bool first) {
    float peaks[kTiles][2], peak = -INFINITY;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[0][i][e] -= reference[i][e], x[0][i][e + 2] -= reference[i][e];
        x[1][i][e] -= reference[i][e], x[1][i][e + 2] -= reference[i][e];
        peaks[i][e] = fmaxf(fmaxf(x[0][i][e], x[0][i][e + 2]), fmaxf(x[1][i][e], x[1][i][e + 2]));
        peak = fmaxf(peak, peaks[i][e]);
      }
    }
    if (__syncthreads_or(first || peak > kSlack)) raise_references(x, peaks, first);
  }

  // Probabilities: into the histogram, and, times V's scales, into operands.
  __device__ __forceinline__ void weigh(const Logits& x, const Metadata& of) const {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t weights[kTiles][2];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float p0 = exp2_approx(x[s][i][2 * h]), p1 = exp2_approx(x[s][i][2 * h + 1]);
          add_shared(of.bins[s][h] ^ (i * 32), fixed.encode(p0));
          add_shared(of.bins[s][h] ^ (i * 32 + 4), fixed.encode(p1));
          weights[i][h] = movmatrix_trans(
              as_u32(__hmul2(__floats2half2_rn(p0, p1), as_half2(of.v_scale[s][h]))));
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        shared.weights[warp * 2 + s][i / 2][lane] =
            make_uint4(weights[i][0], weights[i][1], weights[i + 1][0], weights[i + 1][1]);
      }
    }
  }

  // Adds the tile's values, of which a warp has a quarter of the dims.
  __device__ __forceinline__ void multiply_values(const uint8_t* values) {
    const uint8_t* own_values = values + (warp * 8 + g) * (kDims * V_BITS) / 8 + 2 * t * kVStride;
#pragma unroll 2
    for (int slice = 0; slice < kSlices; ++slice) {
      const uint8_t* row = own_values + slice * 16 * kVStride;
      uint32_t first[VCodes::kPerHalf], second[VCodes::kPerHalf];
      uint32_t more_first[VCodes::kPerHalf], more_second[VCodes::kPerHalf];
      VCodes::expand_centred(load_value_pair(row, row + kVStride, g), first);
      VCodes::expand_centred(load_value_pair(row + 8 * kVStride, row + 9 * kVStride, g), second);
      if constexpr (kDims > VCodes::kPerHalf) {  // two 16-bit units per lane
        VCodes::expand_centred(load_value_pair(row + 2, row + kVStride + 2, g), more_first);
        VCodes::expand_centred(load_value_pair(row + 8 * kVStride + 2, row + 9 * kVStride + 2, g),
                               more_second);
      }
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        const uint4 b = shared.weights[slice][i / 2][lane];
#pragma unroll
        for (int d = 0; d < kDims; d += 2) {
          const bool more = d >= VCodes::kPerHalf;
          const int r = d % VCodes::kPerHalf;
          const uint32_t a0 = more ? more_first[r] : first[r];
          const uint32_t a1 = more ? more_first[r + 1] : first[r + 1];
          const uint32_t a2 = more ? more_second[r] : second[r];
          const uint32_t a3 = more ? more_second[r + 1] : second[r + 1];
          mma_m16n8k16(out[d / 2][i], a0, a1, a2, a3, b.x, b.y);
          mma_m16n8k16(out[d / 2][i + 1], a0, a1, a2, a3, b.z, b.w);
        }
      }
    }
  }

  // Adds V's patterns and leaves the rows' states. By the whole block; begins behind a barrier.
  __device__ __forceinline__ void finish(const WorkItem& item, int head, float value_scale) {
    const int num_rows = item.num_branches * p.group;
    // Every probability is in one bin, so a row's softmax mass is the sum of its bins.
    for (int row = lane; row < num_rows; row += 32) {
      uint32_t sum = 0;
      for (int pattern = warp; pattern < p.num_patterns; pattern += kWarps) {
        sum += Histogram::count(histogram, pattern, row);
      }
      atomicAdd(&shared.mass[row], sum);
    }
    // Outputs go from code units to those of the pattern sums: fixed-point counts times 2^-20.
    const float count = fixed.unit() * (1 << 20);
    const int dim = (warp * 8 + g) * kDims;
    const __half* channels = table_channels(p, item.table, 1, head);
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      const float channel = dim + d < HEAD_DIM ? __half2float(channels[dim + d]) : 0.0f;
      const float unit =
          channel / (VCodes::centred_step(d % VCodes::kPerHalf) * value_scale * count);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        out[d / 2][i][d % 2 * 2] *= unit;
        out[d / 2][i][d % 2 * 2 + 1] *= unit;
      }
    }
    const __half* patterns = table_rows(p, item.table, 1, head);
    ValuePatterns<kDims> loaded;
    loaded.load(p, patterns, 0, dim);
    add_patterns<kTiles, kDims>(p, patterns, dim, out, loaded, 0, 1, [&](int pattern, int row) {
      return static_cast<float>(Histogram::count(histogram, pattern, row)) * (1.0f / (1 << 20));
    });
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int row = i / 2 * 8 + 2 * t + i % 2;
      if (row < num_rows && dim < HEAD_DIM) {
        float values[kDims];
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          values[d] = out[d / 2][i / 2][d % 2 * 2 + i % 2] * count;
        }
        const int64_t at = state_index(p, item, head, row);
        store_words(reinterpret_cast<uint8_t*>(p.state_out + at * HEAD_DIM + dim),
                    reinterpret_cast<const uint32_t (&)[kDims]>(values));
      }
    }
    __syncthreads();
    if (thread < num_rows) {
      p.state_sum[state_index(p, item, head, thread)] =
          make_float2(shared.reference[thread], shared.mass[thread] * fixed.unit());
    }
  }

 private:
  // New references, the same for the whole block. Bits of positive floats, and of those with the
  // sign flipped below them, are ordered like the floats.
  __device__ __forceinline__ void raise_references(Logits& x, const float (&peaks)[kTiles][2],
                                                   bool first) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float own = peaks[i / 2][i % 2];
      const int bits = __float_as_int(own);
      if (first || own > kSlack) {
        atomicMax(&shared.peak[i / 2 * 8 + 2 * t + i % 2], bits < 0 ? bits ^ INT_MAX : bits);
      }
    }
    __syncthreads();
    if (thread < Config::kRows) {
      const int bits = shared.peak[thread];
      const float highest = __int_as_float(bits < 0 ? bits ^ INT_MAX : bits);
      const bool raise = first || highest > kSlack;
      const float shift = raise ? ceilf(highest) + fixed.headroom : 0.0f;
      shared.reference[thread] = first ? shift : shared.reference[thread] + shift;
      shared.shift[thread] = shift;
      shared.peak[thread] = 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 shifts = *reinterpret_cast<const float2*>(&shared.shift[8 * i + 2 * t]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float shift = e == 0 ? shifts.x : shifts.y;
        const float scale = first ? 0.0f : exp2_approx(-shift);
        reference[i][e] += shift;
        x[0][i][e] -= shift, x[0][i][e + 2] -= shift;
        x[1][i][e] -= shift, x[1][i][e + 2] -= shift;
#pragma unroll
        for (int d = 0; d < kDims / 2; ++d) out[d][i][e] *= scale, out[d][i][e + 2] *= scale;
      }
    }
    // In the first tile the histogram is still empty.
    if (!first) lower_histogram();
    __syncthreads();
  }

  __device__ __forceinline__ void lower_histogram() const {
    // A thread meets two rows in turns.
    static_assert(kThreads % (4 * Config::kRows) == 0);
    int bits[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float shift = shared.shift[Histogram::row_of(thread + i * kThreads)];
      bits[i] = static_cast<int>(fminf(shift, 31.0f));
    }
    for (int e = thread; e < words; e += 2 * kThreads) {
      histogram[e] >>= bits[0];
      histogram[e + kThreads] >>= bits[1];
    }
  }
};

}  // namespace wide
}  // namespace patternkv
