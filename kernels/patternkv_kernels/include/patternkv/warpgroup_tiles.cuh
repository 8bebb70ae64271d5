// How the producers of the warpgroup kernel bring code rows and patterns to shared memory and
// dequantize them to operands.
#pragma once

#include "patternkv/decode_params.cuh"
#include "patternkv/warpgroup_memory.cuh"

namespace patternkv {
namespace warpgroup {

template <int kBits>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* codes) {
  if constexpr (kBits == 4) {
    return *reinterpret_cast<const uint32_t*>(codes);
  } else {
    return *reinterpret_cast<const uint16_t*>(codes);
  }
}

// Codes j and j + 4 of 8 dims as a pair of fp16 numbers, the subnormals code * 2^-20: no
// conversion, and no bias to take off.
template <int kBits>
__device__ __forceinline__ void expand_pairs(uint32_t word, uint32_t (&pairs)[4]) {
  constexpr uint32_t mask = ((1u << kBits) - 1) * 0x00100010u;
  if constexpr (kBits == 4) {
    pairs[0] = word << 4 & mask, pairs[1] = word & mask;
    pairs[2] = word >> 4 & mask, pairs[3] = word >> 8 & mask;
  } else {
    word |= word << 8;
    pairs[0] = word << 4 & mask, pairs[1] = word << 2 & mask;
    pairs[2] = word & mask, pairs[3] = word >> 2 & mask;
  }
}

// One side of a tile as it came: code rows, and the patterns in the order in which codes leave
// their words.
template <int kTile>
struct Packed {
  const uint8_t* codes;
  const uint8_t* patterns;
  const Source (&sources)[kTile];
  const uint32_t (&steps)[kTile / 32];
};

// What a producer thread reads of one side of 32 tokens: of every kTokenStep-th, a piece of each
// tile.
struct Pieces {
  static constexpr int kTokenStep = kGroupThreads / kPieces, kTokens = 32 / kTokenStep;

  Source sources[kTokens];
  uint32_t codes[kTokens][kTiles];
  uint32_t patterns[kTokens][kTiles][4];

  template <int kBits, int kTile>
  __device__ __forceinline__ void load(const Packed<kTile>& from, int first) {
    const int thread = threadIdx.x % kGroupThreads, piece = thread % kPieces;
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const int token = first + n * kTokenStep + thread / kPieces;
      sources[n] = from.sources[token];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int dim = min(i * 64 + piece * 8, HEAD_DIM - 8);
        codes[n][i] = load_codes<kBits>(from.codes + (token * HEAD_DIM + dim) * kBits / 8);
        load_words(patterns[n][i], from.patterns + sources[n].pattern + dim * 2);
      }
    }
  }
};

// Writes one side of a tile: pattern + scale * channel_scale * (code - centre). The threads of the
// group write a token's 16-byte pieces side by side. `now` has the first pieces, and gets what
// `load_following` brings. Loads are issued ahead of the stores before them, which the compiler
// takes for possible sources of theirs.
template <int kBits, int kTile, typename LoadFollowing>
__device__ __forceinline__ void dequantize(uint8_t (&tiles)[kTiles][kTile * kSwizzledRow],
                                           const __half* channels, const Packed<kTile>& from,
                                           Pieces& now, LoadFollowing load_following) {
  const int thread = threadIdx.x % kGroupThreads, piece = thread % kPieces;
  const __half2 centre = __float2half2_rn(-Codes<kBits>::kCentre / (1 << 20));
#pragma unroll
  for (int first = 0; first < kTile; first += 32) {
    // From shared memory each time: registers are what is scarce.
    uint32_t scales[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      load_words(scales[i], reinterpret_cast<const uint8_t*>(channels + i * 64 + piece * 8));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __half2 scale = __hmul2(as_half2(scales[i][j]), as_half2(from.steps[first / 32]));
        scales[i][j] = as_u32(__hmin2(scale, __float2half2_rn(65504.0f)));
      }
    }
    Pieces next;
    if (first + 32 < kTile) {
      next.load<kBits>(from, first + 32);
    } else {
      load_following(next);
    }
#pragma unroll
    for (int n = 0; n < Pieces::kTokens; ++n) {
      const __half2 own = as_half2(now.sources[n].scale);
      const __half2 offset = __hmul2(own, centre);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i * 64 + piece * 8 >= HEAD_DIM) continue;
        uint32_t pairs[4];
        expand_pairs<kBits>(now.codes[n][i], pairs);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const __half2 steps = __hfma2(as_half2(pairs[j]), own, offset);
          uint32_t& x = now.patterns[n][i][j];
          x = as_u32(__hfma2(steps, as_half2(scales[i][j]), as_half2(x)));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < Pieces::kTokens; ++n) {
      const int token = first + n * Pieces::kTokenStep + thread / kPieces;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i * 64 + piece * 8 >= HEAD_DIM) continue;
        store_words(tiles[i] + swizzled(token, piece), now.patterns[n][i]);
      }
    }
    now = next;
  }
}

// Some patterns of one side on their way to shared memory, kBatch pieces of 16 bytes for each of
// `threads`, the producers'.
struct PatternBatch {
  static constexpr int kBatch = 4;

  int thread, threads, end;
  uint32_t words[kBatch][4];

  __device__ __forceinline__ int place(int first, int i) const {
    return min(first + i * threads + thread, end - 1);
  }
  __device__ __forceinline__ void load(const __half* from, int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      load_words(words[i], reinterpret_cast<const uint8_t*>(from + place(first, i) * 8));
    }
  }
  __device__ __forceinline__ void store(uint8_t* to, int first) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t (&in)[4] = words[i];
      const uint32_t out[4] = {__byte_perm(in[0], in[2], 0x5410), __byte_perm(in[0], in[2], 0x7632),
                               __byte_perm(in[1], in[3], 0x5410),
                               __byte_perm(in[1], in[3], 0x7632)};
      store_words(to + place(first, i) * 16, out);
    }
  }
};

// Brings a producer its tiles, of which it has every `producers`-th: tile n starts at position
// first + n * stride. Threads below kTile own a token each; tokens beyond the end repeat the last
// one, so that no byte outside the segment is read.
template <int kTile>
struct Feed {
  const DecodeParams& p;
  HeadPool pool;
  const int* slots;
  Incoming<kTile>& incoming;
  IncomingCodes<kTile>& codes;
  int stride;
  int first, last;  // positions
  int count;        // of tiles
  int next_slot, later_slot, fresh_slot;
  RawToken raw;
  const int thread = threadIdx.x % kGroupThreads;

  __device__ __forceinline__ Feed(const DecodeParams& p, const WorkItem& item, int head,
                                  Memory<kTile>& memory, int producer, int producers)
      : p(p),
        pool(p.pool, head),
        slots(p.req_to_token + item.req * p.req_stride),
        incoming(memory.incoming[producer]),
        codes(memory.codes_of(producer)),
        stride(producers * kTile),
        first(item.start + producer * kTile),
        last(item.end - 1),
        count((item.end - first + stride - 1) / stride) {}

  __device__ __forceinline__ int load_slot(int n) const {
    return slots[min(first + n * stride + thread, last)];
  }
  __device__ __forceinline__ void put_units(int n, int slot) {
    if (thread < kTile) incoming.units[n % 2][thread] = pool.row_units(p.pool, slot);
  }
  __device__ __forceinline__ void put_sources(int n) {
    if (thread >= kTile) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t bits = side == 0 ? raw.k_scale : raw.v_scale;
      const uint32_t pattern = side == 0 ? raw.pattern_ids & 0xff : raw.pattern_ids >> 8;
      // The largest of a warp's scales gets to 2^10, so that what is far below it keeps its
      // precision; beyond 32, as far above as leaves the steps to fp16.
      const float largest = half_bits_to_float(__reduce_max_sync(~0u, bits & 0x7fff));
      const float up = fmaxf(power_of_two_scale(largest, 10), 32.0f);
      const float scale = fminf(half_bits_to_float(bits) * up, 65504.0f);
      incoming.sources[n % 2][side][thread] = {pattern * (HEAD_DIM * 2),
                                               as_u32(__float2half2_rn(scale))};
      if (thread % 32 == 0) {
        incoming.steps[n % 2][side][thread / 32] = as_u32(__float2half2_rn((1 << 20) / up));
      }
    }
  }
  __device__ __forceinline__ void issue(int n) {
    copy_rows<kTile, kGroupThreads, K_ROW_BYTES, V_ROW_BYTES>(
        p.copy16, shared_address(codes[n % 2]), pool.codes, thread,
        [&](int token) { return incoming.units[n % 2][token]; });
    cp_async_commit();
  }

  // The first tile, but for a wait for copies and a barrier.
  __device__ __forceinline__ void start(int producer) {
    const int slot = load_slot(0);
    next_slot = load_slot(1), later_slot = load_slot(2);
    raw = load_token(pool.metadata_words(p.pool, slot));
    put_units(0, slot);
    put_units(1, next_slot);
    group_barrier(producer);
    issue(0);
    put_sources(0);
  }
  // Before work on tile n: asks for the next.
  __device__ __forceinline__ void ask(int n) {
    if (n + 1 >= count) return;
    issue(n + 1);
    raw = load_token(pool.metadata_words(p.pool, next_slot));
    fresh_slot = load_slot(n + 3);
  }
  // After work on tile n: the next is there, once a barrier follows.
  __device__ __forceinline__ void receive(int n) {
    if (n + 1 < count) {
      put_sources(n + 1);
      put_units(n + 2, later_slot);
      next_slot = later_slot;
      later_slot = fresh_slot;
    }
    cp_async_wait<0>();
  }

  // A side of tile n.
  __device__ __forceinline__ Packed<kTile> keys(int n, const uint8_t* patterns) const {
    return {codes[n % 2], patterns, incoming.sources[n % 2][0], incoming.steps[n % 2][0]};
  }
  __device__ __forceinline__ Packed<kTile> values(int n, const uint8_t* patterns) const {
    return {codes[n % 2] + kTile * K_ROW_BYTES, patterns, incoming.sources[n % 2][1],
            incoming.steps[n % 2][1]};
  }
};

}  // namespace warpgroup
}  // namespace patternkv
