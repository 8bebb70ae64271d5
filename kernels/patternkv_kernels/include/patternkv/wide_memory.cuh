// What the wide kernel keeps in shared memory, and how it lies there.
#pragma once

#include "patternkv/decode_queries.cuh"
#include "patternkv/decode_units.cuh"

namespace patternkv {
namespace wide {

constexpr int kMostRows = 32;
constexpr int kTile = 128;
constexpr int kSlices = kTile / 16;
constexpr int kTileBytes = kTile * (kKStride + kVStride);
constexpr int kDims = D / 32;  // of V and the output, per lane

// A token's metadata as its readers need it.
struct Token {
  float k_scale;          // products of codes to logits
  uint32_t table_offset;  // bytes to the pattern's row of the table
  uint32_t v_scale;       // half2, scaled into fp16's range
  uint32_t bin_offset;    // bytes to the pattern's bins
};

// kTiles: n-tiles of 8 query rows.
template <int kTiles>
struct Config {
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kStages = 2;

  struct Shared {
    QueryTile<kRows> queries;
    union {
      RawQueries<kRows> raw_queries;           // before the first tile
      uint4 weights[kSlices][kTiles / 2][32];  // p * v_scale, B operand of two n-tiles
    };
    Token tokens[kTile];
    uint32_t units[kTile];   // offsets of code rows
    float2 bias[kRows / 2];  // of the codes' products
    float reference[kRows];
    float shift[kRows];
    int peak[kRows];  // a float's bits
    float largest[kWarps];
    uint32_t mass[kRows];
  };

  // [Shared][table][histogram][ring], the second and third by the number of patterns.
  static __host__ __device__ __forceinline__ int table_words(int num_patterns) {
    return round_up(num_patterns, 16) * kRows;
  }
  static __host__ __device__ __forceinline__ int table_start() {
    return round_up(static_cast<int>(sizeof(Shared)), 256);
  }
  static __host__ __device__ __forceinline__ int shared_bytes(int num_patterns) {
    return table_start() + table_words(num_patterns) * 8 + kStages * kTileBytes;
  }
};

// A lane's V codes of two tokens, in the low and the high half: kDims codes each, or 16 bits of
// them.
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

// The table of query-pattern products. A pattern's row holds, for each pair of n-tiles i and each
// lane t, the query rows 16i + 2t, + 1, + 8 and + 9. Odd patterns swap neighbouring pairs, which
// spreads patterns over the banks.
template <int kTiles>
struct Table {
  static constexpr int kRowBytes = 8 * kTiles * 4;
  static constexpr int kSwap = kTiles >= 4 ? 64 : 0;  // bytes of a pair

  static __device__ __forceinline__ uint32_t pattern_offset(int pattern) {
    return pattern * kRowBytes + (pattern & 1) * kSwap;
  }
  // Byte offset of a query row, to be combined with pattern_offset by exclusive or.
  static __device__ __forceinline__ uint32_t row_offset(int row) {
    return row / 16 * 64 + row % 8 / 2 * 16 + row / 8 % 2 * 8 + row % 2 * 4;
  }
};

// The histogram of V patterns. The words of a pattern's rows are permuted by exclusive or, so that
// the bins that a warp adds to at once, of eight tokens and four rows, spread over the banks.
template <int kTiles>
struct Histogram {
  static constexpr int kRows = 8 * kTiles;

  // Byte offset of row 0 of a pattern's bins; row r is at this, exclusive or 4r.
  static __device__ __forceinline__ uint32_t pattern_offset(int pattern) {
    const int which = kTiles == 2 ? pattern / 2 : pattern;  // two patterns' 16 rows cover all banks
    const int swap = which % kTiles * 8 | which / kTiles % 2;
    return (pattern * kRows | swap) * 4;
  }
  static __device__ __forceinline__ uint32_t count(const uint32_t* bins, int pattern, int row) {
    return bins[pattern_offset(pattern) / 4 ^ row];
  }
  // The row that the word at `place` of an array of bins counts.
  static __device__ __forceinline__ int row_of(int place) {
    return (pattern_offset(place / kRows) / 4 ^ place) % kRows;
  }
};

}  // namespace wide
}  // namespace patternkv
