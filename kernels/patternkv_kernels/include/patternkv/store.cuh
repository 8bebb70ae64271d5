// Store: quantize tokens against their tables and write them to their slots.
//
// A warp works on 8 tokens (or twice 8) of one side, K or V, of one head. Two kernels differ in how
// warps share the work, not in what is computed for a token: `store_few` spreads the patterns of 8
// tokens over the warps of a block, for decode batches; in `store_many` every warp has its own
// tokens, for prefill. That takes about a thousand warp instructions per 8 vectors of 128 dims with
// 64 patterns, most of which wait for one before: tokens pass through shared memory, so that
// registers are left for four warps per scheduler, and one piece of code fits all tiles of a warp.
// `store_windows` does what `store_many` does for the layers of a decode step together, whose new
// tokens are in the windows by its end: each layer alone would take as long as all of them.
#pragma once

#include <type_traits>

#include "patternkv/store_fit.cuh"

namespace patternkv::store {

// Warps of a block of store_few: 8 have a multiprocessor nearly to themselves, so for more tokens
// than that takes blocks are of 4.
constexpr int kFewWarps = 8, kFewerWarps = 4;
constexpr int few_blocks_per_sm(int warps) {
  return warps == kFewWarps ? 1 : HEAD_DIM <= 128 ? 3 : 2;
}
constexpr int kManyWarps = 4;
constexpr int kManyBlocksPerSm = HEAD_DIM <= 128 ? 4 : 2;
// Tiles of 8 tokens that a warp of store_many scores together, so that a pattern is loaded once.
constexpr int kGroups = HEAD_DIM <= 128 ? 2 : 1;
constexpr int kManyAtOnce = 2;  // tiles of patterns that it scores together

// Token `row` of a tile as it lies in memory, of which a lane has its share. Past the end the last
// token stands in.
template <typename T>
struct Token {
  uint4 chunks[kChunks];
  T* copy;  // where it goes in the window, or null
  int table;
  int slot;  // -1 past the end
};

// `keeps`: this warp puts the tile into the window, if there is one.
template <typename T>
__device__ __forceinline__ Token<T> load_token(const StoreParams& p, int side, int head, int first,
                                               bool keeps) {
  const int wanted = first + threadIdx.x % 32 / 4, index = min(wanted, p.n - 1);
  const Vectors vectors = side == 0 ? p.k : p.v;
  const T* of_head = static_cast<const T*>(vectors.data) + int64_t{head} * vectors.head_stride;
  const uint4* share = share_of(of_head + p.vector_of(index) * vectors.token_stride);
  Token<T> token;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) token.chunks[i] = load_streaming(share + 4 * i);
  token.copy = nullptr;
  if (T* window = static_cast<T*>(side == 0 ? p.window_k : p.window_v);
      keeps && window != nullptr && wanted < p.n) {
    const int64_t row = p.window_rows[index];
    if (row >= 0) token.copy = window + (row * p.pool.h_kv + head) * HEAD_DIM;
  }
  token.table = p.table_ids[index];
  token.slot = wanted < p.n ? static_cast<int>(p.slots[index]) : -1;
  return token;
}

// The lane's share of a vector in float16: NaN as 0, clamped to the float16 range. Copies it as it
// is to the window.
template <typename T>
__device__ __forceinline__ void take_token(const Token<T>& token, Share& out) {
  __half2 largest = __float2half2_rn(0.0f);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const uint4 chunk = token.chunks[i];
    if (token.copy != nullptr) {
      reinterpret_cast<uint4*>(token.copy)[4 * i + threadIdx.x % 4] = chunk;
    }
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      __half2 x;
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        x = __floats2half2_rn(__uint_as_float(words[j] << 16),
                              __uint_as_float(words[j] & 0xffff0000));
      } else {
        x = as_half2(words[j]);
      }
      out[4 * i + j] = x;
      largest = __hmax2_nan(largest, __habs2(x));
    }
  }
  const float2 halves = __half22float2(largest);
  if (!isfinite(halves.x) || !isfinite(halves.y)) {
    const auto clean = [](float x) {
      return isnan(x) ? 0.0f : fminf(fmaxf(x, -65504.0f), 65504.0f);
    };
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const float2 x = __half22float2(out[j]);
      out[j] = __floats2half2_rn(clean(x.x), clean(x.y));
    }
  }
}

template <int kBits>
__device__ __forceinline__ void write_vector(const SlotPool& pool, int side, int head, int slot,
                                             int id, const StoredVector& vector) {
  const int part = threadIdx.x % 4;
  const SlotPlace place = pool.locate(slot);
  uint8_t* codes = (side == 0 ? pool.k_row(place, head) : pool.v_row(place, head)) + part * kBits;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if constexpr (kBits == 4) {
      *reinterpret_cast<uint32_t*>(codes + 4 * i * kBits) = vector.codes[i];
    } else {
      *reinterpret_cast<uint16_t*>(codes + 4 * i * kBits) = static_cast<uint16_t>(vector.codes[i]);
    }
  }
  if (part == 0) {
    Metadata* metadata = pool.metadata(place, head);
    reinterpret_cast<uint8_t*>(&metadata->pattern_ids)[side] = static_cast<uint8_t>(id);
    (side == 0 ? metadata->k_scale : metadata->v_scale) = vector.scale;
  }
}

// Quantizes the tile's tokens as if all of them had this table, and writes those that do.
template <int kBits>
__device__ __forceinline__ void store_tile(const StoreParams& p, const StoreTable& table,
                                           const __half* patterns, int side, int head,
                                           const Share& x, Nearest nearest, int slot) {
  const StoredVector vector = fit<kBits>(table, patterns, p.num_patterns, x, slot >= 0, nearest);
  if (slot >= 0) write_vector<kBits>(p.pool, side, head, slot, nearest.id, vector);
}

// Calls `body` with the bits of the block's side, K or V, with the side itself and with the head:
// blockIdx.y counts heads of K, then of V.
template <typename Body>
__device__ __forceinline__ void with_side(int h_kv, Body body) {
  const int side = blockIdx.y / h_kv, head = blockIdx.y % h_kv;
  if constexpr (K_BITS == V_BITS) {
    body(std::integral_constant<int, K_BITS>{}, side, head);
  } else if (side == 0) {
    body(std::integral_constant<int, K_BITS>{}, 0, head);
  } else {
    body(std::integral_constant<int, V_BITS>{}, 1, head);
  }
}

// Lanes of a warp that hold the first token of each table.
__device__ __forceinline__ uint32_t first_lanes(int table) {
  const uint32_t same = __match_any_sync(kAllLanes, table);
  return __ballot_sync(kAllLanes, static_cast<int>(threadIdx.x % 32) == __ffs(same) - 1);
}

template <int kWarps>
struct FewShared {
  StoreTable tables[kTileTokens];
  Nearest nearest[kWarps][kTileTokens];
};

template <typename T, int kBits, int kWarps>
__device__ __forceinline__ void store_few_side(const StoreParams& p, int side, int head,
                                               FewShared<kWarps>& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const auto token = load_token<T>(p, side, head, blockIdx.x * kTileTokens, warp == 0);
  Share x;
  take_token(token, x);
  const auto read = [&](int, int i, __half2(&out)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = x[4 * i + j];
  };
  const uint32_t firsts = first_lanes(token.table);

  // Every warp meets the same tables in the same order.
  int count = 0;
  for (uint32_t rest = firsts; rest != 0; rest &= rest - 1, ++count) {
    const int table = __shfl_sync(kAllLanes, token.table, __ffs(rest) - 1);
    // The warp that works out the channels takes turns.
    fill_table(shared.tables[count], p, p.table_head(table, side, head),
               (warp + kWarps - count % kWarps) % kWarps, kWarps);
  }
  __syncthreads();

  int mine = 0;  // place of the token's table among the tables
  count = 0;
  for (uint32_t rest = firsts; rest != 0; rest &= rest - 1, ++count) {
    const int table = __shfl_sync(kAllLanes, token.table, __ffs(rest) - 1);
    Nearest nearest[1];
    nearest_patterns<1>(shared.tables[count], p.patterns_of(p.table_head(table, side, head)),
                        p.num_patterns, read, warp, kWarps, nearest);
    if (token.table == table) {
      mine = count;
      if (lane % 4 == 0) shared.nearest[warp][row] = nearest[0];
    }
  }
  __syncthreads();

  Nearest nearest = shared.nearest[0][row];
#pragma unroll
  for (int other = 1; other < kWarps; ++other) {
    const Nearest& theirs = shared.nearest[other][row];
    nearest.offer(theirs.score, theirs.id);
  }
  // A table after the other, each by one warp.
  for (int at = warp; at < count; at += kWarps) {
    const int leader = __ffs(__ballot_sync(kAllLanes, mine == at)) - 1;
    const int table = __shfl_sync(kAllLanes, token.table, leader);
    store_tile<kBits>(p, shared.tables[at], p.patterns_of(p.table_head(table, side, head)), side,
                      head, x, nearest, mine == at ? token.slot : -1);
  }
}

// Grid: tiles of 8 tokens, 2 * h_kv.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, few_blocks_per_sm(kWarps))
    store_few(const StoreParams p) {
  __shared__ FewShared<kWarps> shared;
  with_side(p.pool.h_kv, [&](auto bits, int side, int head) {
    store_few_side<T, bits(), kWarps>(p, side, head, shared);
  });
}

// The vectors of kGroups tiles from token `first` on, which are stored next, to the L2 cache.
template <typename T>
__device__ __forceinline__ void prefetch_tokens(const StoreParams& p, int side, int head, int first,
                                                int end) {
  constexpr int kLine = 64, kLines = (HEAD_DIM + kLine - 1) / kLine;  // elements; of a vector
  const Vectors vectors = side == 0 ? p.k : p.v;
  const T* of_head = static_cast<const T*>(vectors.data) + int64_t{head} * vectors.head_stride;
  for (int i = threadIdx.x % 32; i < kGroups * kTileTokens * kLines; i += 32) {
    const int token = first + i / kLines;
    if (token >= end) continue;
    prefetch(of_head + p.vector_of(token) * vectors.token_stride + i % kLines * kLine);
  }
}

struct ManyShared {
  StoreTable common;                               // of the block's first token
  StoreTable others[kManyWarps];                   // of whatever other table a warp meets
  uint4 tokens[kManyWarps][kGroups][kChunks][32];  // chunks of shares, lane by lane
};

template <typename T, int kBits>
__device__ __forceinline__ void store_many_side(const StoreParams& p, int side, int head,
                                                int tokens_per_block, ManyShared& shared) {
  constexpr int kTokens = kGroups * kTileTokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = blockIdx.x * tokens_per_block, end = min(begin + tokens_per_block, p.n);
  const int common = p.table_ids[begin];
  fill_table(shared.common, p, p.table_head(common, side, head), warp, kManyWarps);
  __syncthreads();

  // Lanes read what they wrote themselves.
  auto& chunks = shared.tokens[warp];
  const auto read = [&](int group, int i, __half2(&out)[4]) {
    unpack_chunk(chunks[group][i][lane], out);
  };
  for (int first = begin + warp * kTokens; first < end; first += kManyWarps * kTokens) {
    prefetch_tokens<T>(p, side, head, first + kManyWarps * kTokens, end);
    // All loads before the first value is used.
    Token<T> token[kGroups];
    bool done[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      token[group] = load_token<T>(p, side, head, first + group * kTileTokens, true);
      done[group] = false;
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Share x;
      take_token(token[group], x);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) chunks[group][i][lane] = pack_chunk(&x[4 * i]);
    }
    // The table of the first token that is not done; -1: all are.
    const auto next_table = [&] {
      int table = -1;
#pragma unroll
      for (int group = kGroups - 1; group >= 0; --group) {
        const uint32_t left = __ballot_sync(kAllLanes, !done[group]);
        const int candidate = __shfl_sync(kAllLanes, token[group].table, (__ffs(left) - 1) & 31);
        if (left != 0) table = candidate;
      }
      return table;
    };
    // Once per table among the tokens.
    for (int table = next_table(); table >= 0; table = next_table()) {
      const int table_head = p.table_head(table, side, head);
      const __half* patterns = p.patterns_of(table_head);
      int slot[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const bool now = token[group].table == table;
        done[group] |= now;
        slot[group] = now ? token[group].slot : -1;
      }
      const StoreTable* prepared = &shared.common;
      if (table != common) {
        __syncwarp();
        fill_table(shared.others[warp], p, table_head, 0, 1);
        __syncwarp();
        prepared = &shared.others[warp];
      }
      Nearest nearest[kGroups];
      nearest_patterns<kManyAtOnce>(*prepared, patterns, p.num_patterns, read, 0, 1, nearest);
#pragma unroll 1
      for (int group = 0; group < kGroups; ++group) {
        const int last = kGroups - 1;  // of one or two: no indexing of registers
        const int to = group == 0 ? slot[0] : slot[last];
        if (!__any_sync(kAllLanes, to >= 0)) continue;
        Share x;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          __half2 chunk[4];
          read(group, i, chunk);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[4 * i + j] = chunk[j];
        }
        store_tile<kBits>(p, *prepared, patterns, side, head, x,
                          group == 0 ? nearest[0] : nearest[last], to);
      }
    }
  }
}

// Grid: runs of tokens_per_block tokens, 2 * h_kv.
template <typename T>
__global__ void __launch_bounds__(32 * kManyWarps, kManyBlocksPerSm)
    store_many(const StoreParams p, int tokens_per_block) {
  __shared__ ManyShared shared;
  with_side(p.pool.h_kv, [&](auto bits, int side, int head) {
    store_many_side<T, bits()>(p, side, head, tokens_per_block, shared);
  });
}

// The same of tokens that windows hold, of all layers. Grid: as of store_many, layers.
template <typename T>
__global__ void __launch_bounds__(32 * kManyWarps, kManyBlocksPerSm)
    store_windows(const StoreParams common, const StoreLayer* layers, int tokens_per_block) {
  __shared__ ManyShared shared;
  const StoreParams p = common.of(layers[blockIdx.z]);
  with_side(p.pool.h_kv, [&](auto bits, int side, int head) {
    store_many_side<T, bits()>(p, side, head, tokens_per_block, shared);
  });
}

}  // namespace patternkv::store
