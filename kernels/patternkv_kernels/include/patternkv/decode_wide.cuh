// Attention of up to 64 query rows over a chunk of tokens: segments that many branches share. The
// four warps of a block share every 128-token tile: each takes 32 of its tokens through q.k and the
// softmax, and a quarter of the head dims through p.v; probabilities pass through shared memory.
#pragma once

#include "patternkv/decode_tile.cuh"

namespace patternkv {
namespace wide {

constexpr int kTile = 128;
constexpr int kSlices = kTile / 16;
constexpr int kTileBytes = kTile * (kKStride + kVStride);
constexpr int kDims = D / 32;  // of V and the output, per lane
constexpr int kMaxRows = D > 128 ? 32 : 64;

// kTiles: n-tiles of 8 query rows.
template <int kTiles>
struct Config {
  static constexpr int kRows = 8 * kTiles;
  // Two blocks fit a Hopper multiprocessor with the default number of patterns: 64, and 256 where K
  // has 2 bits.
  static constexpr int kStages = kTiles * kTileBytes > (K_BITS == 2 ? 40000 : 80000) ? 2 : 3;

  struct Shared {
    QueryTile<kRows> queries;
    union {
      RawQueries<kRows> raw_queries;            // before the first tile
      uint4 weights[kSlices][kTiles / 2][32];  // p * v_scale, B operand of two n-tiles
    };
    TokenWords tokens[kStages][kTile];
    RowOffsets offsets[kTile];
    float reference[kRows];
    float shift[kRows];
    float peak[kWarps][kRows];
    float mass[kWarps][kRows];
    float largest[kWarps];
  };

  // [Shared][table][histogram][ring], the second and third by the number of patterns.
  static __host__ __device__ __forceinline__ int table_words(int num_patterns) {
    return round_up(num_patterns, 16) * kRows;
  }
  static __host__ __device__ __forceinline__ int shared_bytes(int num_patterns) {
    return round_up(static_cast<int>(sizeof(Shared)), 16) + table_words(num_patterns) * 8 +
           kStages * kTileBytes;
  }
};

// A lane's V codes of two tokens, in the low and the high half: kDims codes each, or 16 bits of them.
__device__ __forceinline__ uint32_t load_value_pair(const uint8_t* a, const uint8_t* b, int g) {
  constexpr int kBitsPerLane = kDims * V_BITS;
  if constexpr (kBitsPerLane >= 16) {
    return *reinterpret_cast<const uint16_t*>(a) |
           static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(b)) << 16;
  } else {
    uint32_t pair = *a | static_cast<uint32_t>(*b) << 16;
    if constexpr (kBitsPerLane == 4) pair = pair >> (g % 2 * 4) & 0x000f000f;
    return pair;
  }
}

template <int kTiles>
__device__ void attend(const DecodeParams& p, const WorkItem& item, int head, uint8_t* memory) {
  using Config = wide::Config<kTiles>;
  using Shared = typename Config::Shared;
  constexpr int kRows = Config::kRows, kStages = Config::kStages;
  constexpr int kOwnPairs = kTiles * 2;  // rows of a lane: 8n + 2t, 8n + 2t + 1

  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto* table = reinterpret_cast<float*>(memory + round_up(static_cast<int>(sizeof(Shared)), 16));
  auto* histogram = reinterpret_cast<uint32_t*>(table + Config::table_words(p.num_patterns));
  auto* ring = reinterpret_cast<uint8_t*>(histogram + Config::table_words(p.num_patterns));
  const uint32_t ring_address = shared_address(ring);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int num_rows = item.num_branches * p.group;
  const int* slots = p.req_to_token + item.req * p.req_stride;
  const int num_tiles = (item.end - item.start + kTile - 1) / kTile;

  // Thread i owns token i of every tile. Tokens beyond the end repeat the last one, so that no byte
  // outside the segment is read.
  const auto load_slot = [&](int n) {
    return slots[min(item.start + n * kTile + thread, item.end - 1)];
  };
  const auto publish_offsets = [&](int slot) {
    shared.offsets[thread] = row_offsets(p.pool, p.pool.locate(slot), head);
  };
  const auto issue = [&](int n) {
    const uint32_t stage = ring_address + n % kStages * kTileBytes;
    copy_rows<K_ROW_BYTES, kKStride, kTile, kThreads>(
        p.copy16, stage, p.pool.base, thread, [&](int token) { return shared.offsets[token].k; });
    copy_rows<V_ROW_BYTES, kVStride, kTile, kThreads>(
        p.copy16, stage + kTile * kKStride, p.pool.base, thread,
        [&](int token) { return shared.offsets[token].v; });
  };

  float largest = 0;
#pragma unroll
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < num_tiles) {
      const int slot = load_slot(n);
      publish_offsets(slot);
      shared.tokens[n][thread] = load_token(p.pool, p.pool.locate(slot), head);
      if (n == 0) largest = shared.tokens[0][thread].v_scale_float();
      __syncthreads();
      issue(n);
      __syncthreads();
    }
    cp_async_commit();
  }
  int next_slot = load_slot(kStages - 1);

  for (int e = thread; e < Config::table_words(p.num_patterns); e += kThreads) histogram[e] = 0;
  if (thread < kRows) shared.reference[thread] = -INFINITY;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  if (lane == 0) shared.largest[warp] = largest;
  const QueryScales scales = load_queries<kRows>(p, item, head, shared.queries, shared.raw_queries);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  // A power of two that keeps p * v_scale away from fp16's limits.
  const float value_scale = power_of_two_scale(largest, 0);
  const FixedPoint fixed = FixedPoint::of(item.end - item.start);

  // A pattern's row of the table: for pair of n-tiles i and lane t the rows 16i + 2t, + 1, + 8, + 9.
  // Odd patterns swap neighbouring pairs, which spreads patterns over the banks.
  const auto table_at = [&](int pattern, int pair, int lane_t) {
    const int place = kTiles >= 4 ? pair ^ (pattern & 1) : pair;
    return table + pattern * kRows + place * 16 + lane_t * 4;
  };
  fill_table<kRows>(p, item, head, shared.raw_queries, scales.table,
                    [&](int pattern, int row, float value) {
                      const int in_tile = row % 8;
                      table_at(pattern, row / 16, in_tile / 2)[row / 8 % 2 * 2 + in_tile % 2] = value;
                    });

  float out[kDims / 2][kTiles][4] = {};  // dims 2i, 2i, 2i+1, 2i+1 of rows 8n + 2t, 8n + 2t + 1
  float reference[kOwnPairs], mass[kOwnPairs] = {};
#pragma unroll
  for (int i = 0; i < kOwnPairs; ++i) reference[i] = -INFINITY;
  TokenWords pending = {};  // of the tile issued in the last iteration
  bool has_pending = false;

  for (int n = 0; n < num_tiles; ++n) {
    const int ahead = n + kStages - 1;
    if (has_pending) shared.tokens[(ahead - 1) % kStages][thread] = pending;
    if (ahead < num_tiles) publish_offsets(next_slot);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile is here, and everybody is done with the one before
    has_pending = ahead < num_tiles;
    if (has_pending) {
      issue(ahead);
      pending = load_token(p.pool, p.pool.locate(next_slot), head);
      next_slot = load_slot(ahead + 1);
    }
    cp_async_commit();

    const uint8_t* keys = ring + n % kStages * kTileBytes;
    const uint8_t* values = keys + kTile * kKStride;
    float x[2][kTiles][4];  // [slice]: rows 8n + 2t, 8n + 2t + 1 of token g, then of token g + 8
    {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const float2 bias = *reinterpret_cast<const float2*>(&shared.queries.bias[8 * i + 2 * t]);
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
              mma_m16n8k16(x[s][i], low[s][r + 2], high[s][r + 2], low[s][r + 3], high[s][r + 3], q.z,
                           q.w);
            }
          }
        }
      }
    }

    const TokenWords* tokens = shared.tokens[n % kStages];
    float v_scale[2][2];
    int v_pattern[2][2];
    float ahead_by = -INFINITY;  // how far a logit gets beyond its row's reference
    const int valid = item.end - (item.start + n * kTile);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = warp * 32 + s * 16 + h * 8 + g;
        const TokenWords words = tokens[token];
        const float scale = words.k_scale() * scales.codes;
        const int pattern = words.k_pattern();
        v_scale[s][h] = fminf(words.v_scale_float() * value_scale, 4096.0f);
        v_pattern[s][h] = words.v_pattern();
#pragma unroll
        for (int pair = 0; pair < kTiles / 2; ++pair) {
          const float4 product = *reinterpret_cast<const float4*>(table_at(pattern, pair, t));
          const float products[4] = {product.x, product.y, product.z, product.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& logit = x[s][2 * pair + i / 2][2 * h + i % 2];
            logit = fmaf(logit, scale, products[i]);
            if (p.cap_log2 > 0) logit = soft_cap(logit, p.cap_log2);
            if (valid < kTile && token >= valid) logit = -INFINITY;
            ahead_by = fmaxf(ahead_by, logit - reference[4 * pair + i]);
          }
        }
      }
    }
    if (__syncthreads_or(ahead_by > kSlack)) {
      // New references, the same for the whole block: the ceiling of a row's largest logit.
#pragma unroll
      for (int i = 0; i < kOwnPairs; ++i) {
        float peak = fmaxf(fmaxf(x[0][i / 2][i % 2], x[0][i / 2][2 + i % 2]),
                           fmaxf(x[1][i / 2][i % 2], x[1][i / 2][2 + i % 2]));
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, distance));
        }
        if (g == 0) shared.peak[warp][i / 2 * 8 + 2 * t + i % 2] = peak;
      }
      __syncthreads();
      if (thread < kRows) {
        float peak = shared.peak[0][thread];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) peak = fmaxf(peak, shared.peak[w][thread]);
        const float old = shared.reference[thread];
        const float raised = fmaxf(old, ceilf(peak));
        shared.reference[thread] = raised;
        shared.shift[thread] = old == -INFINITY ? INFINITY : raised - old;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOwnPairs; ++i) {
        const int row = i / 2 * 8 + 2 * t + i % 2;
        const float scale = exp2_approx(-shared.shift[row]);
        reference[i] = shared.reference[row];
        mass[i] *= scale;
#pragma unroll
        for (int d = 0; d < kDims / 2; ++d) {
          out[d][i / 2][i % 2] *= scale;
          out[d][i / 2][2 + i % 2] *= scale;
        }
      }
      // An empty histogram shifts by 31 bits to nothing.
      for (int e = thread; e < Config::table_words(p.num_patterns); e += kThreads) {
        const int bits = static_cast<int>(fminf(shared.shift[e % kRows], 31.0f));
        const uint32_t value = histogram[e];
        if (bits > 0) histogram[e] = (value >> bits) + (value >> (bits - 1) & 1);
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
          const float p0 = exp2_approx(x[s][i][2 * h] - reference[2 * i]);
          const float p1 = exp2_approx(x[s][i][2 * h + 1] - reference[2 * i + 1]);
          mass[2 * i] += p0;
          mass[2 * i + 1] += p1;
          const int row = 8 * i + 2 * t;
          uint32_t* bin = histogram + v_pattern[s][h] * kRows + row;
          if (row < num_rows) atomicAdd(bin, fixed.encode(p0));
          if (row + 1 < num_rows) atomicAdd(bin + 1, fixed.encode(p1));
          weights[i][h] =
              movmatrix_trans(as_u32(__floats2half2_rn(p0 * v_scale[s][h], p1 * v_scale[s][h])));
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        shared.weights[warp * 2 + s][i / 2][lane] =
            make_uint4(weights[i][0], weights[i][1], weights[i + 1][0], weights[i + 1][1]);
      }
    }
    __syncthreads();

    const uint8_t* own_values = values + (warp * 8 + g) * (kDims * V_BITS) / 8;
#pragma unroll 2
    for (int slice = 0; slice < kSlices; ++slice) {
      const uint8_t* row = own_values + (slice * 16 + 2 * t) * kVStride;
      uint32_t first[VCodes::kPerHalf], second[VCodes::kPerHalf];
      uint32_t more_first[VCodes::kPerHalf], more_second[VCodes::kPerHalf];
      VCodes::expand_centred(load_value_pair(row, row + kVStride, g), first);
      VCodes::expand_centred(load_value_pair(row + 8 * kVStride, row + 9 * kVStride, g), second);
      if constexpr (kDims > VCodes::kPerHalf) {  // two 16-bit units per lane
        VCodes::expand_centred(load_value_pair(row + 2, row + kVStride + 2, g), more_first);
        VCodes::expand_centred(
            load_value_pair(row + 8 * kVStride + 2, row + 9 * kVStride + 2, g), more_second);
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

#pragma unroll
  for (int i = 0; i < kOwnPairs; ++i) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      mass[i] += __shfl_xor_sync(~0u, mass[i], distance);
    }
    if (g == 0) shared.mass[warp][i / 2 * 8 + 2 * t + i % 2] = mass[i];
  }
  cp_async_wait<0>();
  __syncthreads();

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
  add_patterns<kTiles, kDims>(
      p, table_rows(p, item.table, 1, head), dim, out, 0, 1, [&](int pattern, int row) {
        return static_cast<float>(histogram[pattern * kRows + row]) * (1.0f / (1 << 20));
      });
#pragma unroll
  for (int i = 0; i < kOwnPairs; ++i) {
    const int row = i / 2 * 8 + 2 * t + i % 2;
    if (row >= num_rows) continue;
    const int64_t state_index = item.first_state + row / p.group * item.state_stride;
    const int64_t at = state_index * p.h_q + head * p.group + row % p.group;
    if (dim < HEAD_DIM) {
#pragma unroll
      for (int d = 0; d < kDims; d += 2) {
        reinterpret_cast<float2&>(p.state_out[at * HEAD_DIM + dim + d]) =
            make_float2(out[d / 2][i / 2][i % 2] * count, out[d / 2][i / 2][2 + i % 2] * count);
      }
    }
    if (warp == 0 && g == 0) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared.mass[w][row];
      p.state_sum[at] = make_float2(shared.reference[row], sum);
    }
  }
}

// Blocks of the launch keep the largest tile's shared memory, whatever items they take.
__host__ __device__ __forceinline__ int shared_bytes(int num_patterns, int max_rows) {
  if (max_rows > 32) return Config<8>::shared_bytes(num_patterns);
  if (max_rows > 16) return Config<4>::shared_bytes(num_patterns);
  return Config<2>::shared_bytes(num_patterns);
}

__global__ void __launch_bounds__(kThreads, 2)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ int next_unit;
  launch_dependents();
  const int num_units = p.work.header->num_wide * p.pool.h_kv;
  while (true) {
    if (threadIdx.x == 0) next_unit = atomicAdd(&p.work.header->next_wide, 1);
    __syncthreads();
    const int unit = next_unit;
    if (unit >= num_units) break;
    const WorkItem item = p.work.wide[unit / p.pool.h_kv];
    const int head = unit % p.pool.h_kv, num_rows = item.num_branches * p.group;
    if (num_rows <= 16) {
      attend<2>(p, item, head, memory);
    } else if (num_rows <= 32) {
      attend<4>(p, item, head, memory);
    } else {
      if constexpr (kMaxRows == 64) attend<8>(p, item, head, memory);
    }
    __syncthreads();
  }
}

}  // namespace wide
}  // namespace patternkv
