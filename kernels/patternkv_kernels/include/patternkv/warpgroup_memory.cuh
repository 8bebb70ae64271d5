// What the warpgroup kernel keeps in shared memory, and how its warpgroups hand tiles to each other
// there.
#pragma once

#include <cstddef>

#include "patternkv/decode_tile.cuh"
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
constexpr int kPieces = 8;      // 16-byte pieces of a tile's row, 8 dims each
constexpr int kUsedPieces = HEAD_DIM / 8 / kTiles;

// Named barriers: those of the producers come first (group_barrier), then the consumers' ends.
constexpr int kEnds = 1 + kMostProducers;

// Where things are in a row of operands, patterns or channel scales. Neighbouring pieces lie in
// different tiles, so that a thread that has a piece of each tile has neighbouring codes. Inside a
// piece the order is 0, 4, 1, 5, 2, 6, 3, 7, in which codes come out of their words without being
// moved one by one.
__device__ __forceinline__ int tile_of(int piece) { return piece % kTiles; }
__device__ __forceinline__ int slot_of(int piece) { return piece / kTiles; }
__device__ __forceinline__ int place_of_piece(int piece) {
  return tile_of(piece) * kUsedPieces + slot_of(piece);
}
__device__ __forceinline__ int place_of(int dim) {
  return place_of_piece(dim / 8) * 8 + dim % 4 * 2 + dim / 4 % 2;
}

// Metadata of a token's K or V as its readers need it.
struct alignas(8) Source {
  uint32_t pattern;  // bytes to the pattern in its table
  uint32_t scale;    // half2, in units that the channel scales make up for
};

// What producers and consumers wait for: a tile's operands to be written, and to be read. A warp
// arrives as one. Nobody waits for more than the next phase: consumers go through all tiles in
// order, and so a producer that has seen one of them read knows it of all before.
struct Handoff {
  static constexpr int kWriters = kGroupThreads / 32, kReaders = kMostConsumers * kWriters;

  PhaseBarrier written, read;

  __device__ __forceinline__ void init() { written.init(kWriters), read.init(kReaders); }
  __device__ __forceinline__ void have_written() {
    publish_operands();
    __syncwarp();
    if (threadIdx.x % 32 == 0) written.at().arrive();
  }
};

// Where a tile's operands lie, and the how-manieth there they are. `n` counts the tiles of a block.
struct Place {
  int stage, phase;

  __device__ __forceinline__ explicit Place(int n) : stage(n % kStages), phase(n / kStages) {}
};

struct Shared {
  // Where there are three producers, the codes of the last one take the place of the second 64
  // queries.
  uint8_t queries[kMostRows / kGroupRows][kTiles][kGroupRows * kSwizzledRow];
  float query_scale[kMostRows];  // of products to logits
  // Of each producer: half bits of the largest scales of each warp's tokens, and of channel scales.
  alignas(16) uint32_t largest[kMostProducers][3][kWarps];
  bool lost;  // whether the item must be done again, with care
  Handoff keys[kStages], values[kStages];
};

// K and V of a tile as operands.
template <int kTile>
struct alignas(1024) Operands {
  uint8_t keys[kTiles][kTile * kSwizzledRow];
  uint8_t values[kTiles][kTile * kSwizzledRow];
};

// What consumers know of a tile: where its operands and handoffs are. Carried from one tile to the
// next, since addresses that all threads share are slow to compute.
template <int kTile>
struct TileAddress {
  int stage, phase;
  uint32_t handoff;  // of the keys
  uint32_t keys;     // operand

  // Of the n-th tile of a block.
  __device__ __forceinline__ TileAddress(const Shared& shared,
                                         const Operands<kTile> (&operands)[kStages], int n) {
    const Place place(n);
    stage = place.stage, phase = place.phase;
    handoff = shared_address(&shared.keys[stage]);
    keys = operand(shared_address(&operands[stage]));
  }
  __device__ __forceinline__ TileAddress next() const {
    constexpr uint32_t kBytes = sizeof(Operands<kTile>);
    TileAddress next = *this;
    ++next.stage, next.handoff += sizeof(Handoff), next.keys += kBytes / 16;
    if (next.stage == kStages) {
      next.stage = 0, next.phase ^= 1;
      next.handoff -= kStages * sizeof(Handoff), next.keys -= kStages * kBytes / 16;
    }
    return next;
  }
  __device__ __forceinline__ uint32_t values() const {
    return keys + operand(sizeof(Operands<kTile>::keys), kTile * kSwizzledRow) - operand(0);
  }
  __device__ __forceinline__ PhaseBarrierAddress keys_written() const { return {handoff}; }
  __device__ __forceinline__ PhaseBarrierAddress values_written() const {
    return {handoff + kFromKeysToValues};
  }
  // By each of `consumers`.
  __device__ __forceinline__ void have_read_keys(int consumers) const {
    have_read(handoff, consumers);
  }
  __device__ __forceinline__ void have_read_values(int consumers) const {
    have_read(handoff + kFromKeysToValues, consumers);
  }

 private:
  static constexpr uint32_t kFromKeysToValues = offsetof(Shared, values) - offsetof(Shared, keys);
  static_assert(offsetof(Handoff, written) == 0);

  static __device__ __forceinline__ void have_read(uint32_t handoff, int consumers) {
    if (threadIdx.x % 32 > 0) return;
    constexpr uint32_t kRead = offsetof(Handoff, read);
    PhaseBarrierAddress{handoff + kRead}.arrive(kMostConsumers / consumers);
  }
};

// The tiles on their way to one producer: code rows, K's and then V's, and what is known of tokens.
template <int kTile>
using IncomingCodes = uint8_t[2][kTile * CODE_BYTES];
template <int kTile>
struct alignas(128) Incoming {
  Source sources[2][2][kTile];   // K's and V's
  __half channels[2][HEAD_DIM];  // channel scales, in the units that tokens' scales leave
  uint32_t units[2][kTile];      // offsets of code rows
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

}  // namespace warpgroup
}  // namespace patternkv
