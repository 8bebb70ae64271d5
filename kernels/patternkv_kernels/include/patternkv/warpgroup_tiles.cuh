// How the producers of the warpgroup kernel bring code rows and patterns to shared memory and
// dequantize them to operands.
#pragma once

#include "patternkv/decode_params.cuh"
#include "patternkv/warpgroup_memory.cuh"

namespace patternkv {
namespace warpgroup {

// A thread's codes of a token, a piece for each tile.
template <int kBits>
__device__ __forceinline__ void load_codes(uint32_t (&codes)[kTiles], const uint8_t* from) {
  if constexpr (kBits == 4) {
    load_words(codes, from);
  } else if constexpr (kTiles == 2) {
    const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
    codes[0] = both & 0xffff, codes[1] = both >> 16;
  } else {
    codes[0] = *reinterpret_cast<const uint16_t*>(from);
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
  const __half* channels;
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
    const int thread = threadIdx.x % kGroupThreads;
    const int slot = min(thread % kPieces, kUsedPieces - 1);
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const int token = first + n * kTokenStep + thread / kPieces;
      sources[n] = from.sources[token];
      load_codes<kBits>(codes[n], from.codes + (token * HEAD_DIM + slot * kTiles * 8) * kBits / 8);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        load_words(patterns[n][i],
                   from.patterns + sources[n].pattern + (i * kUsedPieces + slot) * 16);
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
                                           const Packed<kTile>& from, Pieces& now,
                                           LoadFollowing load_following) {
  const int thread = threadIdx.x % kGroupThreads, slot = thread % kPieces;
  const bool used = kUsedPieces == kPieces || slot < kUsedPieces;
  const __half2 centre = __float2half2_rn(-Codes<kBits>::kCentre / (1 << 20));
  uint32_t scales[kTiles][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int place = i * kUsedPieces + min(slot, kUsedPieces - 1);
    load_words(scales[i], reinterpret_cast<const uint8_t*>(from.channels + place * 8));
  }
#pragma unroll
  for (int first = 0; first < kTile; first += 32) {
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
        if (used) store_words(tiles[i] + swizzled(token, slot), now.patterns[n][i]);
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
      const int from = place(first, i), row = from / (HEAD_DIM / 8) * (HEAD_DIM / 8);
      store_words(to + (row + place_of_piece(from - row)) * 16, out);
    }
  }
};

// Brings a producer its tiles, of which it has every `producers`-th: tile n starts at position
// first + n * stride. Every token has two threads, for the metadata of its K and of its V. Tokens
// beyond the end repeat the last one, so that no byte outside the segment is read.
template <int kTile>
struct Feed {
  const DecodeParams& p;
  HeadPool pool;
  const int* slots;
  Incoming<kTile>& incoming;
  IncomingCodes<kTile>& codes;
  uint32_t (&largest)[3][kWarps];
  int stride;
  int first, last;  // positions
  int count;        // of tiles
  int next_slot, later_slot, fresh_slot;
  uint32_t ids, scale;  // of the tile after the present one, as loaded: unpacking waits for them
  float up;             // scales count in units of 1 / up
  const int thread = threadIdx.x % kGroupThreads;
  const int token = thread % kTile, side = thread / kTile;

  __device__ __forceinline__ Feed(const DecodeParams& p, const WorkItem& item, int head,
                                  Memory<kTile>& memory, int producer, int producers)
      : p(p),
        pool(p.pool, head),
        slots(p.req_to_token + item.req * p.req_stride),
        incoming(memory.incoming[producer]),
        codes(memory.codes_of(producer)),
        largest(memory.shared.largest[producer]),
        stride(producers * kTile),
        first(item.start + producer * kTile),
        last(item.end - 1),
        count((item.end - first + stride - 1) / stride) {}

  __device__ __forceinline__ int load_slot(int n) const {
    return slots[min(first + n * stride + token, last)];
  }
  __device__ __forceinline__ void put_units(int n, int slot) {
    if (side == 0) incoming.units[n % 2][token] = pool.row_units(p.pool, slot);
  }
  __device__ __forceinline__ void load_metadata(int slot) {
    const uint16_t* words = pool.metadata_words(p.pool, slot);
    ids = words[0], scale = words[1 + min(side, 1)];
  }
  __device__ __forceinline__ void put_sources(int n) {
    if (side > 1) return;
    const uint32_t pattern = side == 0 ? ids & 0xff : ids >> 8;
    const float scaled = fminf(half_bits_to_float(scale) * up, 65504.0f);
    incoming.sources[n % 2][side][token] = {pattern * (HEAD_DIM * 2),
                                            as_u32(__float2half2_rn(scaled))};
  }
  // Chooses the units of scales. The largest of the first tile gets to 2^8, with room for larger
  // ones and precision for smaller ones; units of large scales are as far above as leaves fp16 to
  // channel scales.
  __device__ __forceinline__ void put_channels(const __half* (&channels)[2], int producer) {
    const int dim = min(thread, HEAD_DIM - 1), warp = thread / 32;
    const __half own[2] = {channels[0][dim], channels[1][dim]};
    const uint32_t bits[] = {scale, __half_as_ushort(own[0]), __half_as_ushort(own[1])};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const uint32_t of_warp = __reduce_max_sync(~0u, bits[i] & 0x7fff);
      if (thread % 32 == 0) largest[i][warp] = of_warp;
    }
    group_barrier(producer);
    float ups[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t scales[kTile / 32], factors[kWarps];
      load_words(scales, reinterpret_cast<const uint8_t*>(&largest[0][i * kTile / 32]));
      load_words(factors, reinterpret_cast<const uint8_t*>(largest[1 + i]));
      const float least = 32.0f / power_of_two_scale(half_bits_to_float(highest(factors)), 0);
      ups[i] = fmaxf(power_of_two_scale(half_bits_to_float(highest(scales)), 8), least);
      const float factor = __half2float(own[i]) * ((1 << 20) / ups[i]);
      if (thread < HEAD_DIM) incoming.channels[i][place_of(thread)] = __float2half_rn(factor);
    }
    up = side == 0 ? ups[0] : ups[1];
  }
  template <int kCount>
  static __device__ __forceinline__ uint32_t highest(const uint32_t (&x)[kCount]) {
    uint32_t most = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) most = max(most, x[i]);
    return most;
  }
  __device__ __forceinline__ void issue(int n) {
    copy_rows<kTile, kGroupThreads, K_ROW_BYTES, V_ROW_BYTES>(
        p.copy16, shared_address(codes[n % 2]), pool.codes, thread,
        [&](int token) { return incoming.units[n % 2][token]; });
    cp_async_commit();
  }

  // The first tile, but for a wait for copies and a barrier.
  __device__ __forceinline__ void start(const __half* (&channels)[2], int producer) {
    const int slot = load_slot(0);
    next_slot = load_slot(1), later_slot = load_slot(2);
    load_metadata(slot);
    put_units(0, slot);
    put_units(1, next_slot);
    group_barrier(producer);
    issue(0);
    put_channels(channels, producer);
    put_sources(0);
  }
  // Before work on tile n: asks for the next.
  __device__ __forceinline__ void ask(int n) {
    if (n + 1 >= count) return;
    issue(n + 1);
    load_metadata(next_slot);
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
    return {codes[n % 2], patterns, incoming.sources[n % 2][0], incoming.channels[0]};
  }
  __device__ __forceinline__ Packed<kTile> values(int n, const uint8_t* patterns) const {
    return {codes[n % 2] + kTile * K_ROW_BYTES, patterns, incoming.sources[n % 2][1],
            incoming.channels[1]};
  }
};

}  // namespace warpgroup
}  // namespace patternkv
