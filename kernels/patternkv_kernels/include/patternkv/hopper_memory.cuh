// What the kernel of decode_hopper.cuh keeps in shared memory, and how the table of query-pattern
// products lies there.
#pragma once

#include "patternkv/decode_queries.cuh"
#include "patternkv/decode_units.cuh"
#include "patternkv/wgmma.cuh"

namespace patternkv {
namespace hopper {

constexpr bool kExists = PKV_WGMMA && (HEAD_DIM == 64 || HEAD_DIM == 128);

constexpr int kGroupPatterns = 64;  // whose probabilities a product sums
constexpr int kMostPatterns = 128;  // of a table
constexpr int kTile = 64;           // tokens
constexpr int kStages = 3;          // tiles on their way or at work
constexpr int kDimTiles = D / 64;   // products that the output takes
constexpr int kAlign = 1024;        // of an operand tile
constexpr int kLeastAlign = 256;    // of dynamic shared memory
constexpr int kTileBytes = kTile * (kKStride + kVStride);
constexpr float kMostScale = 16.0f;  // of a token's V, once scaled

// A lane has 2 kDimTiles dims of V. The 16 bits of a row that a transposed load hands to a lane
// hold those of one warp or of several, which then take their share of the bits.
constexpr int kDimsPerHalf = 16 / V_BITS;
constexpr int kWarpsPerChunk =
    kDimsPerHalf / (2 * kDimTiles) > 0 ? kDimsPerHalf / (2 * kDimTiles) : 1;

__device__ __forceinline__ int first_dim(int warp, int g) {
  return (warp / kWarpsPerChunk * 8 + g) * kDimsPerHalf + warp % kWarpsPerChunk * (2 * kDimTiles);
}

// The same for all lanes, which the compiler cannot know of what was loaded: it then keeps it in
// registers that all lanes share.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// A token's metadata as its readers need it.
struct alignas(16) Token {
  float k_scale;          // products of codes to logits
  uint32_t table_offset;  // bytes to the pattern's row of the table
  uint32_t v_scale;       // half2, scaled into fp16's range
  uint32_t unused;
};

template <int kRows, int kPatterns>
struct alignas(kAlign) Memory {
  static constexpr int kQueryRows = kRows;
  static constexpr int kGroups = kPatterns / kGroupPatterns;  // of patterns
  static_assert(kGroups == 1 || kGroups == 2, "their sums leave through the buffers of weights");
  // Up to 32 columns of weights leave room in their rows for the same weights without V scales.
  static_assert(kRows <= 32);
  static constexpr int kPlainPiece = 4, kPlainOffset = kPlainPiece * 16;

  uint8_t weights[2][kTile * kSwizzledRow];  // queries before the first tile
  uint8_t queries[kDimTiles][kRows * kSwizzledRow];
  uint8_t codes[kStages][kTileBytes];
  float table[kPatterns * kRows];
  Token tokens[kStages][kTile];
  __half patterns[kStages][kTile];  // ids of V patterns, as numbers
  uint32_t units[2][kTile];         // offsets of code rows
  float2 totals[kWarps][kRows];
  float bias[kRows];  // of the codes' products
  float reference[kRows];
  float shift[kRows];
  int peak[kRows];
  int states[kRows];  // where rows leave their state, counted in query heads
  float largest[kWarps][2];

  // Where a lane addresses store_matrices to put its warp's weights of the first 8 rows and their
  // tokens, with V scales and without; those of n-tile j are at this, exclusive or 16 j.
  __device__ __forceinline__ uint32_t weights_place(int buffer, int warp, int lane) const {
    const int token = warp * 16 + lane % 16;
    return shared_address(weights[buffer]) + swizzled(token, lane < 16 ? 0 : kPlainPiece);
  }
};

template <int kRows, int kPatterns>
__host__ __device__ constexpr int shared_bytes() {
  return kAlign - kLeastAlign + sizeof(Memory<kRows, kPatterns>);
}

// The table of query-pattern products. A pattern's row holds, for each pair of n-tiles i and each
// lane t, the query rows 16 i + 2 t, + 1, + 8 and + 9. Odd patterns swap neighbouring pairs, which
// spreads patterns over the banks.
template <int kRows>
struct Table {
  static constexpr int kSwap = kRows == 32 ? 64 : 0;  // bytes of a pair

  static __device__ __forceinline__ uint32_t pattern_offset(int pattern) {
    return pattern * (kRows * 4) + (pattern & 1) * kSwap;
  }
  // Where, in a pattern's row at `row`, a lane's products of n-tile i, even, and the next are.
  static __device__ __forceinline__ uint32_t place(uint32_t row, int i, int t) {
    return (row + t * 16) ^ (i / 2 * 64);
  }
  // Subtracts a row's `shift` from all of its products.
  template <int kPatterns>
  static __device__ __forceinline__ void lower(float* table, const float* shift, int thread) {
    // A thread meets one row, in patterns of one parity.
    static_assert(kThreads % (2 * kRows) == 0);
    const int at = thread % kRows ^ thread / kRows % 2 * (kSwap / 4);
    const float down = shift[at / 16 * 16 + at % 16 / 4 * 2 + at % 4 / 2 * 8 + at % 2];
#pragma unroll 1
    for (int e = thread; e < kPatterns * kRows; e += kThreads) table[e] -= down;
  }
};

}  // namespace hopper
}  // namespace patternkv
