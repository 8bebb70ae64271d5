// What the warpgroup kernel does with tokens and queries before products: its shared memory, code
// rows and patterns on their way there, and their dequantization to operands.
#pragma once

#include <cstddef>

#include "patternkv/decode_queries.cuh"
#include "patternkv/decode_units.cuh"
#include "patternkv/wgmma.cuh"

namespace patternkv {
namespace warpgroup {

// Whether the kernel exists: the accumulators of 256 dims do not fit the registers.
constexpr bool kExists = PKV_WGMMA && HEAD_DIM <= 128;

constexpr int kGroupRows = 64;
constexpr int kMostRows = 2 * kGroupRows;
constexpr int kGroups = 4, kGroupThreads = 128;  // warpgroups of a block
constexpr int kBlockThreads = kGroups * kGroupThreads;
constexpr int kMostConsumers = 2, kMostProducers = 3;
// Of the first two warpgroups and of the others, together what four have at launch.
constexpr int kConsumerRegisters = 152, kProducerRegisters = 104;
constexpr int kStages = 3;      // tiles of operands
constexpr int kTiles = D / 64;  // operand tiles side by side
constexpr int kPieces = 8;      // 16-byte pieces of a tile's row

// Named barriers: those of the producers come first (group_barrier), then the consumers' turns.
constexpr int kTurns = 1 + kMostProducers;

// Metadata of a token's K or V as its readers need it.
struct alignas(8) Source {
  uint32_t pattern;  // bytes to the pattern in its table
  uint32_t scale;    // half2, scaled like those of the tokens around it
};

// What producers and consumers wait for: a tile's operands to be written, and to be read. A warp
// arrives as one. Nobody falls a phase behind: consumers go through all tiles in order, and who
// writes a tile has seen the one before in its place, or one after that, read.
struct Handoff {
  static constexpr int kWriters = kGroupThreads / 32, kReaders = kMostConsumers * kWriters;

  PhaseBarrier written, read;

  __device__ __forceinline__ void init() { written.init(kWriters), read.init(kReaders); }
  __device__ __forceinline__ void have_written() {
    publish_operands();
    __syncwarp();
    if (threadIdx.x % 32 == 0) written.arrive();
  }
  // By each of `consumers`.
  __device__ __forceinline__ void have_read(int consumers) {
    if (threadIdx.x % 32 == 0) read.arrive(kMostConsumers / consumers);
  }
};

struct Shared {
  // Where there are three producers, the codes of the last one take the place of the second 64
  // queries.
  uint8_t queries[kMostRows / kGroupRows][kTiles][kGroupRows * kSwizzledRow];
  float query_scale[kMostRows];  // of products to logits
  __half channels[2][D];         // channel scales
  Handoff keys[kStages], values[kStages];
};

// K and V of a tile as operands.
template <int kTile>
struct alignas(1024) Operands {
  uint8_t keys[kTiles][kTile * kSwizzledRow];
  uint8_t values[kTiles][kTile * kSwizzledRow];
};

// The tiles on their way to one producer: code rows, K's and then V's, and what is known of tokens.
template <int kTile>
using IncomingCodes = uint8_t[2][kTile * CODE_BYTES];
template <int kTile>
struct alignas(128) Incoming {
  Source sources[2][2][kTile];       // K's and V's
  uint32_t steps[2][2][kTile / 32];  // half2: scales of 32 tokens count in these
  uint32_t units[2][kTile];          // offsets of code rows
};

// In front of K's and V's patterns, from an address aligned to kAlign.
template <int kTile>
struct Memory {
  Shared shared;
  Operands<kTile> operands[kStages];
  Incoming<kTile> incoming[kMostProducers];
  alignas(128) IncomingCodes<kTile> codes[kMostProducers - 1];

  static_assert(sizeof(IncomingCodes<kTile>) <= sizeof(shared.queries[1]));
  __device__ __forceinline__ IncomingCodes<kTile>& codes_of(int producer) {
    return producer < kMostProducers - 1
               ? codes[producer]
               : reinterpret_cast<IncomingCodes<kTile>&>(shared.queries[1]);
  }
};
constexpr int kAlign = 1024, kLeastAlign = 256;  // of a tile; what the launch gives anyway

template <int kTile>
__host__ __device__ __forceinline__ int shared_bytes(int num_patterns) {
  return kAlign - kLeastAlign + sizeof(Memory<kTile>) + 2 * num_patterns * HEAD_DIM * 2;
}

// Inside a group of 8 dims everything here has the order 0, 4, 1, 5, 2, 6, 3, 7, in which codes
// come out of their words without being moved one by one.
__device__ __forceinline__ int place_of(int dim) { return dim / 8 * 8 + dim % 4 * 2 + dim / 4 % 2; }

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

// Fills the query operands of `rows` rows, 64 for each consumer, and the scales of their products.
// By the consumers; ends without a barrier.
__device__ __forceinline__ void load_queries(const DecodeParams& p, const WorkItem& item, int head,
                                             int rows, Shared& shared) {
  // All rows at once: what they wait for twice is the memory.
  constexpr int kThreadsPerRow = kGroupThreads / kGroupRows, kDims = HEAD_DIM / kThreadsPerRow;
  const int first = threadIdx.x % kThreadsPerRow * kDims;
  const int row = threadIdx.x / kThreadsPerRow;
  if (row < rows) {
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
        pairs[j] = as_u32(__floats2half2_rn(q[i][j] * scale, q[i][j + 4] * scale));
      }
      store_words(
          shared.queries[row / kGroupRows][dim / 64] + swizzled(row % kGroupRows, dim % 64 / 8),
          pairs);
    }
  }
}

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
