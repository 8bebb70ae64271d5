// Attention of up to 32 query rows over a chunk of tokens: segments that many branches share. The
// four warps of a block share every 128-token tile: each takes 32 of its tokens through q.k and the
// softmax, and a quarter of the head dims through p.v; probabilities pass through shared memory.
#pragma once

#include <climits>

#include "patternkv/wide_memory.cuh"

namespace patternkv {
namespace wide {

template <int kTiles>
__device__ void attend(const DecodeParams& p, const WorkItem item, int head, uint8_t* memory) {
  using Config = wide::Config<kTiles>;
  using Shared = typename Config::Shared;
  using Table = wide::Table<kTiles>;
  using Histogram = wide::Histogram<kTiles>;
  constexpr int kRows = Config::kRows, kStages = Config::kStages;

  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* table = memory + Config::table_start();
  const int table_bytes = Config::table_words(p.num_patterns) * 4;
  auto* histogram = reinterpret_cast<uint32_t*>(table + table_bytes);
  uint8_t* ring = table + 2 * table_bytes;
  const uint32_t ring_address = shared_address(ring);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  const int num_rows = item.num_branches * p.group;
  const int* slots = p.req_to_token + item.req * p.req_stride;
  const int num_tiles = (item.end - item.start + kTile - 1) / kTile;

  // Thread i owns token i of every tile. Tokens beyond the end repeat the last one, so that no byte
  // outside the segment is read.
  const auto load_slot = [&](int n) {
    return slots[min(item.start + n * kTile + thread, item.end - 1)];
  };
  const HeadPool pool(p.pool, head);
  const auto issue = [&](int n) {
    copy_rows<kTile, kThreads>(p.copy16, ring_address + n % kStages * kTileBytes, pool.codes,
                               thread, [&](int token) { return shared.units[token]; });
    cp_async_commit();
  };

  const int first_slot = load_slot(0);
  int next_slot = load_slot(1);
  shared.units[thread] = pool.row_units(p.pool, first_slot);
  RawToken pending = load_token(pool.metadata_words(p.pool, first_slot));  // of the tile in flight
  __syncthreads();
  issue(0);

  for (int e = thread; e < Config::table_words(p.num_patterns); e += kThreads) histogram[e] = 0;
  if (thread < kRows) shared.mass[thread] = 0, shared.peak[thread] = INT_MIN;
  const QueryScales scales = load_queries(p, item, head, shared.queries, shared.raw_queries);
  fill_table<kRows>(p, item, head, shared.raw_queries, scales.table,
                    [&](int pattern, int row, float value) {
                      const uint32_t at = Table::pattern_offset(pattern) ^ Table::row_offset(row);
                      *reinterpret_cast<float*>(table + at) = value;
                    });
  // A power of two that keeps p * v_scale away from fp16's limits, by the first tile's scales.
  float largest = pending.v_scale_float();
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  if (lane == 0) shared.largest[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  const float value_scale = power_of_two_scale(largest, 0);
  const FixedPoint fixed = FixedPoint::of(item.end - item.start);

  if (warp == 0) {
    float bias[kTiles][2];
    code_bias<kTiles>(shared.queries.fragments, bias);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (g == 0) shared.bias[4 * i + t] = make_float2(bias[i][0], bias[i][1]);
    }
  }

  const uint32_t own_table = shared_address(table) + t * 16;
  const uint32_t own_bins = shared_address(histogram) + t * 8;
  float out[kDims / 2][kTiles][4] = {};  // dims 2i, 2i, 2i+1, 2i+1 of rows 8n + 2t, 8n + 2t + 1
  float reference[kTiles][2] = {};       // of these rows

  for (int n = 0; n < num_tiles; ++n) {
    const bool more = n + 1 < num_tiles;
    const float token_v_scale = fminf(pending.v_scale_float() * value_scale, 4096.0f);
    shared.tokens[thread] = {pending.k_scale_float() * scales.codes,
                             Table::pattern_offset(pending.pattern_ids & 0xff),
                             as_u32(__float2half2_rn(token_v_scale)),
                             Histogram::pattern_offset(pending.pattern_ids >> 8)};
    if (more) shared.units[thread] = pool.row_units(p.pool, next_slot);
    cp_async_wait<0>();
    __syncthreads();  // the tile is here, and everybody is done with the one before
    RawToken fresh = {};
    int fresh_slot = 0;
    if (more) {
      issue(n + 1);
      fresh = load_token(pool.metadata_words(p.pool, next_slot));
      fresh_slot = load_slot(n + 2);
    }

    const uint8_t* keys = ring + n % kStages * kTileBytes;
    const uint8_t* values = keys + kTile * kKStride;
    // [slice of 16 tokens]: rows 8i + 2t, 8i + 2t + 1 of token g, then of token g + 8.
    float x[2][kTiles][4];
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

    // Logits, then relative to the references.
    uint32_t v_scale[2][2], bins[2][2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Token token = shared.tokens[warp * 32 + s * 16 + h * 8 + g];
        v_scale[s][h] = token.v_scale;
        bins[s][h] = own_bins + token.bin_offset;
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
    const int valid = item.end - (item.start + n * kTile) - (warp * 32 + g);
    if (p.cap_log2 > 0 || valid < 32) {
#pragma unroll
      for (int i = 0; i < 8 * kTiles; ++i) {
        float& logit = x[i / 4 % 2][i / 8][i % 4];
        if (p.cap_log2 > 0) logit = soft_cap(logit, p.cap_log2);
        if (i / 4 % 2 * 16 + i % 4 / 2 * 8 >= valid) logit = -INFINITY;
      }
    }
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
    if (__syncthreads_or(n == 0 || peak > kSlack)) {
      // New references, the same for the whole block. Bits of positive floats, and of those with
      // the sign flipped below them, are ordered like the floats.
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float own = peaks[i / 2][i % 2];
        const int bits = __float_as_int(own);
        if (n == 0 || own > kSlack) {
          atomicMax(&shared.peak[i / 2 * 8 + 2 * t + i % 2], bits < 0 ? bits ^ INT_MAX : bits);
        }
      }
      __syncthreads();
      if (thread < kRows) {
        const int bits = shared.peak[thread];
        const float highest = __int_as_float(bits < 0 ? bits ^ INT_MAX : bits);
        const bool raise = n == 0 || highest > kSlack;
        const float shift = raise ? ceilf(highest) + fixed.headroom : 0.0f;
        shared.reference[thread] = n == 0 ? shift : shared.reference[thread] + shift;
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
          const float scale = n == 0 ? 0.0f : exp2_approx(-shift);
          reference[i][e] += shift;
          x[0][i][e] -= shift, x[0][i][e + 2] -= shift;
          x[1][i][e] -= shift, x[1][i][e + 2] -= shift;
#pragma unroll
          for (int d = 0; d < kDims / 2; ++d) out[d][i][e] *= scale, out[d][i][e + 2] *= scale;
        }
      }
      if (n > 0) {
        // A thread meets two rows in turns. In the first tile the histogram is still empty.
        static_assert(kThreads % (4 * kRows) == 0);
        int bits[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float shift = shared.shift[Histogram::row_of(thread + i * kThreads)];
          bits[i] = static_cast<int>(fminf(shift, 31.0f));
        }
        for (int e = thread; e < table_bytes / 4; e += 2 * kThreads) {
          histogram[e] >>= bits[0];
          histogram[e + kThreads] >>= bits[1];
        }
      }
      __syncthreads();
    }

#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t weights[kTiles][2];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float p0 = exp2_approx(x[s][i][2 * h]), p1 = exp2_approx(x[s][i][2 * h + 1]);
          add_shared(bins[s][h] ^ (i * 32), fixed.encode(p0));
          add_shared(bins[s][h] ^ (i * 32 + 4), fixed.encode(p1));
          weights[i][h] =
              movmatrix_trans(as_u32(__hmul2(__floats2half2_rn(p0, p1), as_half2(v_scale[s][h]))));
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        shared.weights[warp * 2 + s][i / 2][lane] =
            make_uint4(weights[i][0], weights[i][1], weights[i + 1][0], weights[i + 1][1]);
      }
    }
    __syncthreads();

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
    // Only now: naming what was loaded would wait for it.
    pending = fresh;
    next_slot = fresh_slot;
  }
  cp_async_wait<0>();
  __syncthreads();

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
    const float unit = channel / (VCodes::centred_step(d % VCodes::kPerHalf) * value_scale * count);
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

__host__ __device__ __forceinline__ int shared_bytes(int num_patterns) {
  return Config<kMostRows / 8>::shared_bytes(num_patterns);
}

__global__ void __launch_bounds__(kThreads, D > 128 ? 2 : 3)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  launch_dependents();
  __shared__ int next_unit;
  for_each_unit(p.work.wide(), p.pool.h_kv, next_unit, [&](const WorkItem& item, int head) {
    if (item.num_branches * p.group <= 16) {
      attend<2>(p, item, head, memory);
    } else {
      attend<4>(p, item, head, memory);
    }
  });
  end_after_previous_kernel();
}

}  // namespace wide
}  // namespace patternkv
