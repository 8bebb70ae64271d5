// Attention of up to 64 query rows over a chunk of tokens, with the asynchronous matrix products of
// compute capability 9.0. Three warpgroups of a block take every third tile each: they dequantize
// its K and V to fp16 operands in shared memory, once for all rows, while the products of the other
// of the two run. The three results are added at the end.
#pragma once

#include "patternkv/decode_tile.cuh"
#include "patternkv/wgmma.cuh"

namespace patternkv {
namespace warpgroup {

// Whether the kernel exists: two accumulators of 256 dims do not fit the registers.
constexpr bool kExists = PKV_WGMMA && HEAD_DIM <= 128;

constexpr int kRows = 64;
constexpr int kGroups = 3;
constexpr int kGroupThreads = 128;
constexpr int kBlockThreads = kGroups * kGroupThreads;
constexpr int kTiles = D / 64;  // operand tiles side by side
constexpr int kPieces = 8;      // 16-byte pieces of a tile's row

// Metadata of a token's K or V as its readers need it.
struct Source {
  uint32_t pattern;  // bytes to the pattern in its table
  uint32_t scale;    // half2, a quarter of the scale
};

struct Shared {
  uint8_t queries[kTiles][kRows * kSwizzledRow];
  float query_scale[kRows];  // of products to logits
  __half channels[2][D];     // a quarter of the channel scales
  float2 state[kGroups][kRows];
};

// Of one warpgroup.
template <int kTile>
struct alignas(1024) Tiles {
  uint8_t keys[kTiles][kTile * kSwizzledRow];
  uint8_t values[kTiles][kTile * kSwizzledRow];
  uint8_t codes[2][kTile * (kKStride + kVStride)];
  Source sources[2][2][kTile];  // K's and V's of the two tiles at hand
  uint32_t units[2][kTile];  // offsets of code rows
};

// [Shared][Tiles of each group][K patterns][V patterns], from an address aligned to kAlign. Once
// the tiles are done, two groups leave their output behind Shared.
constexpr int kAlign = 1024;
constexpr int kStart = (sizeof(Shared) + kAlign - 1) / kAlign * kAlign;
constexpr int kOutputBytes = kRows * D * 4;

template <int kTile>
__host__ __device__ __forceinline__ int shared_bytes(int num_patterns) {
  const int tiles = kGroups * sizeof(Tiles<kTile>) + 2 * num_patterns * HEAD_DIM * 2;
  const int outputs = (kGroups - 1) * kOutputBytes;
  return kAlign + kStart + (tiles > outputs ? tiles : outputs);
}

// 16 * (code - centre) of 8 codes of dims in a row, as half2 of neighbours.
template <int kBits>
__device__ __forceinline__ void expand_neighbours(const uint8_t* codes, uint32_t (&out)[4]) {
  uint32_t parts[4];  // the codes of a pair at the bits 4 and 20
  if constexpr (kBits == 4) {
    const uint32_t odd = *reinterpret_cast<const uint32_t*>(codes), even = odd << 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[i] = __byte_perm(even, odd, 0x4400 + 0x1111 * i);
  } else {
    const uint32_t word = *reinterpret_cast<const uint16_t*>(codes);
    const uint32_t pairs = word | word << 14;
    parts[0] = pairs << 4, parts[1] = pairs, parts[2] = pairs >> 4, parts[3] = pairs >> 8;
  }
  constexpr uint32_t mask = ((1u << kBits) - 1) * 0x00100010u;
  const __half2 centre = __float2half2_rn(1024.0f + 16 * Codes<kBits>::kCentre);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = as_u32(__hsub2(as_half2(and_or(parts[i], mask, kMagic)), centre));
  }
}

// Writes one side of a tile: pattern + scale * channel_scale * (code - centre). The threads of the
// group write a token's 16-byte pieces side by side.
template <int kBits, int kTile>
__device__ __forceinline__ void dequantize(uint8_t (&tiles)[kTiles][kTile * kSwizzledRow],
                                           const __half* channels, const uint8_t* codes,
                                           int code_stride, const uint8_t* patterns,
                                           const Source (&sources)[kTile]) {
  const int thread = threadIdx.x % kGroupThreads, piece = thread % kPieces;
  // From shared memory each time: registers are what is scarce.
  uint32_t scales[kTiles][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    load_words(scales[i], reinterpret_cast<const uint8_t*>(channels + i * 64 + piece * 8));
  }
#pragma unroll
  for (int n = 0; n < kTile / (kGroupThreads / kPieces); ++n) {
    const int token = n * (kGroupThreads / kPieces) + thread / kPieces;
    const Source own = sources[token];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int dim = i * 64 + piece * 8;
      if (dim >= HEAD_DIM) continue;
      uint32_t steps[4], x[4];
      expand_neighbours<kBits>(codes + token * code_stride + dim * kBits / 8, steps);
      load_words(x, patterns + own.pattern + dim * 2);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __half2 scaled = __hmul2(as_half2(steps[j]), as_half2(own.scale));
        x[j] = as_u32(__hfma2(scaled, as_half2(scales[i][j]), as_half2(x[j])));
      }
      store_words(tiles[i] + swizzled(token, piece), x);
    }
  }
}

// Fills the query operand and the scales of its products. Ends without a barrier.
__device__ __forceinline__ void load_queries(const DecodeParams& p, const WorkItem& item, int head,
                                             Shared& shared) {
  constexpr int kThreadsPerRow = 4, kDims = HEAD_DIM / kThreadsPerRow;
  if (threadIdx.x >= kRows * kThreadsPerRow) return;
  const int row = threadIdx.x / kThreadsPerRow, first = threadIdx.x % kThreadsPerRow * kDims;
  uint32_t words[kDims / 8][4] = {};
  if (row < item.num_branches * p.group) {
    const int batch_row = p.rows[item.first_entry + p.branch_of(row)];
    const int64_t at =
        batch_row * p.q_stride + (head * p.group + p.member_of(row)) * HEAD_DIM + first;
#pragma unroll
    for (int i = 0; i < kDims / 8; ++i) {
      load_words(words[i], static_cast<const uint8_t*>(p.q) + 2 * (at + 8 * i));
    }
  }
  float q[kDims / 8][8], largest = 0;
#pragma unroll
  for (int i = 0; i < kDims / 8; ++i) {
    if (p.q_is_bf16) {
      to_floats<__nv_bfloat16>(q[i], words[i]);
    } else {
      to_floats<__half>(q[i], words[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(q[i][j]));
  }
#pragma unroll
  for (int distance = 1; distance < kThreadsPerRow; distance *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  // As large as fp16 takes: small components stay normal numbers.
  const float scale = copysignf(power_of_two_scale(largest, 14), p.scale_log2);
  if (first == 0) shared.query_scale[row] = p.scale_log2 / scale;
#pragma unroll
  for (int i = 0; i < kDims / 8; ++i) {
    const int dim = first + 8 * i;
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs[j] = as_u32(__floats2half2_rn(q[i][2 * j] * scale, q[i][2 * j + 1] * scale));
    }
    store_words(shared.queries[dim / 64] + swizzled(row, dim % 64 / 8), pairs);
  }
}

// The running softmax of a thread's two rows, 16 w + g and 8 further.
struct Softmax {
  float reference[2] = {-INFINITY, -INFINITY};
  float mass[2] = {};  // of the thread's columns

  // Logits (products, to be multiplied by `factor` > 0) to probabilities, as operands of the next
  // product. Rescales `out` where a reference rises.
  template <int kCount, int kOut>
  __device__ __forceinline__ void apply(const float (&x)[kCount], float (&factor)[2],
                                        float (&out)[kOut], uint32_t (&weights)[kCount / 8][4]) {
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kCount; ++i) peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], x[i]);
    const auto ahead = [&](int h) { return peak[h] * factor[h] > reference[h] + kSlack; };
    if (__any_sync(~0u, ahead(0) || ahead(1))) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 1));
        peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 2));
        const float raised = ahead(h) ? peak[h] * factor[h] : reference[h];
        const float scale = exp2_approx(reference[h] - raised);
        reference[h] = raised;
        mass[h] *= scale;
#pragma unroll
        for (int i = 0; i < kOut / 4; ++i) {
          out[4 * i + 2 * h] *= scale;
          out[4 * i + 2 * h + 1] *= scale;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int h = i % 2;
      const float p0 = exp2_approx(fmaf(x[2 * i], factor[h], -reference[h]));
      const float p1 = exp2_approx(fmaf(x[2 * i + 1], factor[h], -reference[h]));
      mass[h] += p0 + p1;
      weights[i / 4][i % 4] = as_u32(__floats2half2_rn(p0, p1));
    }
  }
};

template <int kTile>
__device__ void attend(const DecodeParams& p, const WorkItem item, int head, uint8_t* memory) {
  // The same for all lanes, which the compiler cannot know of threadIdx.x.
  const int group = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  const int thread = threadIdx.x % kGroupThreads;
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  auto& shared = *reinterpret_cast<Shared*>(memory);
  auto* all_tiles = reinterpret_cast<Tiles<kTile>*>(memory + kStart);
  auto& tiles = all_tiles[group];
  uint8_t* k_patterns = reinterpret_cast<uint8_t*>(all_tiles + kGroups);
  uint8_t* v_patterns = k_patterns + p.num_patterns * HEAD_DIM * 2;
  const int num_rows = item.num_branches * p.group;
  const int* slots = p.req_to_token + item.req * p.req_stride;
  const int num_tiles = (item.end - item.start + kTile - 1) / kTile;
  const int own_tiles = (num_tiles - group + kGroups - 1) / kGroups;

  // Tile n of this group starts at position first + n * kGroups * kTile; threads below kTile own
  // its tokens. Tokens beyond the end repeat the last one, so that no byte outside the segment is
  // read.
  const int first = item.start + group * kTile;
  const auto load_slot = [&](int n) {
    return slots[min(first + n * kGroups * kTile + thread, item.end - 1)];
  };
  const HeadPool pool(p.pool, head);
  const auto load_raw = [&](int slot) { return load_token(pool.metadata_words(p.pool, slot)); };
  const auto put_units = [&](int n, int slot) {
    if (thread < kTile) tiles.units[n % 2][thread] = pool.row_units(p.pool, slot);
  };
  const auto put_token = [&](int n, const RawToken& raw) {
    const auto quarter = [](uint32_t scale) {
      return as_u32(__float2half2_rn(half_bits_to_float(scale) * 0.25f));
    };
    if (thread < kTile) {
      tiles.sources[n % 2][0][thread] = {(raw.pattern_ids & 0xff) * (HEAD_DIM * 2),
                                         quarter(raw.k_scale)};
      tiles.sources[n % 2][1][thread] = {(raw.pattern_ids >> 8) * (HEAD_DIM * 2),
                                         quarter(raw.v_scale)};
    }
  };
  const auto issue = [&](int n) {
    copy_rows<kTile, kGroupThreads>(p.copy16, shared_address(tiles.codes[n % 2]), pool.codes,
                                    thread, [&](int token) { return tiles.units[n % 2][token]; });
    cp_async_commit();
  };

  const int first_slot = load_slot(0);
  int next_slot = load_slot(1), later_slot = load_slot(2);
  const int pattern_bytes = p.num_patterns * HEAD_DIM * 2;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const auto* from = reinterpret_cast<const uint8_t*>(table_rows(p, item.table, side, head));
    const uint32_t to = shared_address(side == 0 ? k_patterns : v_patterns);
    for (int at = threadIdx.x * 16; at < pattern_bytes; at += kBlockThreads * 16) {
      cp_async<16>(to + at, from + at);
    }
  }
  const RawToken first_raw = load_raw(first_slot);
  put_units(0, first_slot);
  put_units(1, next_slot);
  group_barrier(group);
  issue(0);
  if (threadIdx.x < 2 * HEAD_DIM) {
    const int side = threadIdx.x / HEAD_DIM, dim = threadIdx.x % HEAD_DIM;
    const float channel = __half2float(table_channels(p, item.table, side, head)[dim]);
    shared.channels[side][dim] = __float2half_rn(channel * 0.25f);
  }
  load_queries(p, item, head, shared);
  put_token(0, first_raw);
  cp_async_wait<0>();
  __syncthreads();

  const uint32_t queries = shared_address(shared.queries), keys = shared_address(tiles.keys),
                 values = shared_address(tiles.values);
  const bool busy = warp * 16 < num_rows;  // else the warp's rows are empty
  float query_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) query_scale[h] = shared.query_scale[warp * 16 + g + 8 * h];

  Softmax softmax;
  float out[D / 2] = {};
  for (int n = 0; n < own_tiles; ++n) {
    RawToken next_raw = {};
    int fresh_slot = 0;
    if (n + 1 < own_tiles) {
      issue(n + 1);
      next_raw = load_raw(next_slot);
      fresh_slot = load_slot(n + 3);
    }
    dequantize<K_BITS, kTile>(tiles.keys, shared.channels[0], tiles.codes[n % 2], kKStride,
                              k_patterns, tiles.sources[n % 2][0]);
    wgmma_wait();
    settle(out);
    publish_operands();
    group_barrier(group);  // the keys are there, and nobody reads the values before

    float x[kTile / 2];
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      const int tile = step / 4, byte = step % 4 * 32;
      wgmma_rows(x, operand(queries + tile * (kRows * kSwizzledRow) + byte, 16),
                 operand(keys + tile * (kTile * kSwizzledRow) + byte, 16), step > 0);
    }
    wgmma_commit();
    dequantize<V_BITS, kTile>(tiles.values, shared.channels[1],
                              tiles.codes[n % 2] + kTile * kKStride, kVStride, v_patterns,
                              tiles.sources[n % 2][1]);
    wgmma_wait();
    settle(x);

    uint32_t weights[kTile / 16][4];
    if (busy) {
      float factor[2] = {query_scale[0], query_scale[1]};
      if (p.cap_log2 > 0) {
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) x[i] = soft_cap(x[i] * factor[i / 2 % 2], p.cap_log2);
        factor[0] = factor[1] = 1;
      }
      const int valid = item.end - (first + n * kGroups * kTile);
      if (valid < kTile) {
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) {
          if (i / 4 * 8 + 2 * t + i % 2 >= valid) x[i] = -INFINITY;
        }
      }
      softmax.apply(x, factor, out, weights);
    } else {
      set_zero(weights);
    }
    if (n + 1 < own_tiles) {
      put_token(n + 1, next_raw);
      put_units(n + 2, later_slot);
      next_slot = later_slot;
      later_slot = fresh_slot;
    }
    cp_async_wait<0>();
    publish_operands();
    group_barrier(group);  // the values are there, and the next tile's codes

    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      wgmma_columns(out, weights[step],
                    operand(values + step * (16 * kSwizzledRow), kTile * kSwizzledRow));
    }
    wgmma_commit();
  }
  wgmma_wait();
  settle(out);

  // Add up the groups. One without tokens has reference -inf, hence weight 0.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float mass = softmax.mass[h];
    mass += __shfl_xor_sync(~0u, mass, 1);
    mass += __shfl_xor_sync(~0u, mass, 2);
    if (t == 0) {
      shared.state[group][warp * 16 + g + 8 * h] = make_float2(softmax.reference[h], mass);
    }
  }
  __syncthreads();
  float top[2], weight[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + g + 8 * h;
    top[h] = shared.state[0][row].x;
#pragma unroll
    for (int i = 1; i < kGroups; ++i) top[h] = fmaxf(top[h], shared.state[i][row].x);
    weight[h] = exp2_approx(softmax.reference[h] - top[h]);
  }
  auto* outputs = reinterpret_cast<float4*>(memory + kStart);
  constexpr int kQuads = D / 8;
  if (group > 0 && busy) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      outputs[((group - 1) * kQuads + i) * kGroupThreads + thread] =
          make_float4(out[4 * i] * weight[0], out[4 * i + 1] * weight[0], out[4 * i + 2] * weight[1],
                      out[4 * i + 3] * weight[1]);
    }
  }
  __syncthreads();
  if (group > 0 || !busy) return;
  const bool live[2] = {warp * 16 + g < num_rows, warp * 16 + g + 8 < num_rows};
  int64_t at[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + g + 8 * h;
    if (!live[h]) continue;
    at[h] = state_index(p, item, head, row);
    if (t == 0) {
      float mass = 0;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const float2 state = shared.state[i][row];
        mass += state.y * exp2_approx(state.x - top[h]);
      }
      p.state_sum[at[h]] = make_float2(top[h], mass);
    }
  }
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int dim = 8 * i + 2 * t;
    float2 sums[2] = {make_float2(out[4 * i] * weight[0], out[4 * i + 1] * weight[0]),
                      make_float2(out[4 * i + 2] * weight[1], out[4 * i + 3] * weight[1])};
#pragma unroll
    for (int j = 0; j < kGroups - 1; ++j) {
      const float4 other = outputs[(j * kQuads + i) * kGroupThreads + thread];
      sums[0] = make_float2(sums[0].x + other.x, sums[0].y + other.y);
      sums[1] = make_float2(sums[1].x + other.z, sums[1].y + other.w);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (live[h] && 8 * i < HEAD_DIM) {
        *reinterpret_cast<float2*>(p.state_out + at[h] * HEAD_DIM + dim) = sums[h];
      }
    }
  }
}

// kTile is 64, or 32 where large tables leave no room.
template <int kTile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  launch_dependents();
  uint8_t* aligned = memory + (kAlign - shared_address(memory) % kAlign) % kAlign;
  for_each_unit(p.work.wide(), p.pool.h_kv,
                [&](const WorkItem& item, int head) { attend<kTile>(p, item, head, aligned); });
  // This grid then ends after the one before it, and the merge, which waits for this one, after
  // both.
  wait_for_previous_kernel();
}

}  // namespace warpgroup
}  // namespace patternkv
