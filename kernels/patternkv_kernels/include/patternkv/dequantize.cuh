// Dequantize: packed slots back to vectors.
//
// A block has one head and walks over runs of tokens; half of its warps make K, the others V. A
// thread of the block works out where a vector's parts are, while the vectors of the run before are
// made; then a thread makes 8 consecutive dims of a vector: one code word, 16 bytes of its pattern
// and of the channel scales, one 16-byte store (two for float32). Blocks of all heads reach a token
// at about the same time, so that its page is read and its vectors are written whole. Bound by
// memory: an exactly rounded float32 takes one multiply-add, since the product of the scales has 22
// bits and a level 4.
#pragma once

#include <type_traits>

#include "patternkv/codes.cuh"
#include "patternkv/layout.cuh"

namespace patternkv::dequantize {

constexpr int kDims = 8;  // of a thread
constexpr int kVectorThreads = HEAD_DIM / kDims;
constexpr int kTokens = HEAD_DIM == 96 ? 8 : 128 / kVectorThreads;  // of a block at once
constexpr int kSideThreads = kTokens * kVectorThreads;
static_assert(kSideThreads % 32 == 0, "a warp has one side");
constexpr int kThreads = 2 * kSideThreads;
constexpr int kBatch = 4;  // vectors of a thread, whose loads are under way together
constexpr int kRunTokens = 2 * kBatch * kTokens;
static_assert(2 * kRunTokens <= kThreads, "a thread for every place");

struct DequantizeParams {
  SlotPool pool;
  const void* slots;  // int64 or int32 [n]
  bool slots_are_int64;
  const int* table_ids;         // [n]
  const __half* patterns;       // [num_tables, 2, h_kv, num_patterns, HEAD_DIM]
  const __half* channel_scale;  // [num_tables, 2, h_kv, HEAD_DIM]
  void* x[2];                   // K and V, [n, h_kv, HEAD_DIM]
  int n, num_patterns;
};

// Where the parts of a vector are.
struct alignas(16) Place {
  uint32_t codes;                   // 8 bytes each into the pool
  uint32_t pattern, channel_scale;  // 16 bytes each
  float scale;
};

struct Slot {
  int slot, table;
};

// What a place is made from, as loaded.
struct Record {
  uint32_t ids, scale;
};

// What a thread loads of one vector.
struct Packed {
  uint4 pattern, channel_scale;
  uint32_t codes;  // low bits first
  float scale;
};

__device__ __forceinline__ Slot load_slot(const DequantizeParams& p, int token) {
  token = min(token, p.n - 1);
  // The low half of an int64.
  const auto* words = static_cast<const uint32_t*>(p.slots);
  const uint32_t slot = load_early(words + (p.slots_are_int64 ? 2 * int64_t{token} : token));
  const uint32_t table = load_early(reinterpret_cast<const uint32_t*>(p.table_ids) + token);
  return {static_cast<int>(slot), static_cast<int>(table)};
}

__device__ __forceinline__ Record load_record(const DequantizeParams& p, int side, int head,
                                              Slot slot) {
  const SlotPlace place = p.pool.locate(slot.slot);
  const auto* metadata = reinterpret_cast<const uint16_t*>(p.pool.metadata(place, head));
  return {load_early(metadata), load_early(metadata + 1 + side)};
}

__device__ __forceinline__ Place make_place(const DequantizeParams& p, int side, int head,
                                            Slot slot, Record record) {
  const SlotPlace place = p.pool.locate(slot.slot);
  const uint8_t* codes = side == 0 ? p.pool.k_row(place, head) : p.pool.v_row(place, head);
  const uint32_t table_head = (slot.table * 2 + side) * p.pool.h_kv + head;
  const uint32_t id = side == 0 ? record.ids & 0xff : record.ids >> 8;
  return {static_cast<uint32_t>((codes - p.pool.base) / 8),
          (table_head * p.num_patterns + id) * kVectorThreads, table_head * kVectorThreads,
          half_bits_to_float(record.scale)};
}

template <int kBits>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* row, int chunk) {
  if constexpr (kBits == 4) {
    return load_early(reinterpret_cast<const uint32_t*>(row) + chunk);
  } else {
    return load_early(reinterpret_cast<const uint16_t*>(row) + chunk);
  }
}

template <int kBits>
__device__ __forceinline__ Packed load_packed(const DequantizeParams& p, const Place& at,
                                              int chunk) {
  const uint4 words = reinterpret_cast<const uint4&>(at);  // one load
  const Place place = {words.x, words.y, words.z, __uint_as_float(words.w)};
  Packed out;
  out.codes = load_codes<kBits>(p.pool.base + uint64_t{place.codes} * 8, chunk);
  out.pattern = load_early(reinterpret_cast<const uint4*>(p.patterns) + chunk + place.pattern);
  out.channel_scale =
      load_early(reinterpret_cast<const uint4*>(p.channel_scale) + chunk + place.channel_scale);
  out.scale = place.scale;
  return out;
}

template <int kBits>
__device__ __forceinline__ void unpack(const Packed& packed, float (&x)[kDims]) {
  uint32_t pairs[Codes<kBits>::kPerHalf];  // pairs[r]: codes r and r + 4, scaled by a power of two
  // A half of codes 0-3 and one of codes 4-7.
  Codes<kBits>::expand_centred(kBits == 4 ? packed.codes : __byte_perm(packed.codes, 0, 0x4140),
                               pairs);
  const uint32_t pattern[4] = {packed.pattern.x, packed.pattern.y, packed.pattern.z,
                               packed.pattern.w};
  const uint32_t channels[4] = {packed.channel_scale.x, packed.channel_scale.y,
                                packed.channel_scale.z, packed.channel_scale.w};
  float level[kDims];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float2 pair = __half22float2(as_half2(pairs[r]));
    level[r] = pair.x, level[r + 4] = pair.y;
  }
#pragma unroll
  for (int j = 0; j < kDims; j += 2) {
    const float2 p = __half22float2(as_half2(pattern[j / 2]));
    const float2 c = __half22float2(as_half2(channels[j / 2]));
    const float first = packed.scale * (1.0f / Codes<kBits>::centred_step(j % 4));
    const float second = packed.scale * (1.0f / Codes<kBits>::centred_step(j % 4 + 1));
    x[j] = __fmaf_rn(__fmul_rn(first, c.x), level[j], p.x);
    x[j + 1] = __fmaf_rn(__fmul_rn(second, c.y), level[j + 1], p.y);
  }
}

template <typename T>
__device__ __forceinline__ void store_dims(T* out, const float (&x)[kDims]) {
  if constexpr (std::is_same_v<T, float>) {
    const auto* words = reinterpret_cast<const uint4*>(x);
    store_streaming(reinterpret_cast<uint4*>(out), words[0]);
    store_streaming(reinterpret_cast<uint4*>(out) + 1, words[1]);
  } else {
    alignas(16) uint32_t words[kDims / 2];
    to_words<T>(words, x);
    store_streaming(reinterpret_cast<uint4*>(out), *reinterpret_cast<const uint4*>(words));
  }
}

// kWhole: all tokens of the run exist. A condition on stores would let loads move behind it.
template <typename T, int kSide, bool kWhole>
__device__ __forceinline__ void dequantize_run(const DequantizeParams& p, const Place* places,
                                               int head, int first) {
  constexpr int kBits = kSide == 0 ? K_BITS : V_BITS;
  const int thread = threadIdx.x % kSideThreads;
  const int own = thread / kVectorThreads, chunk = thread % kVectorThreads;
  T* vectors = static_cast<T*>(p.x[kSide]) + int64_t{head} * HEAD_DIM + kDims * chunk;
#pragma unroll 1
  for (int batch = own; batch < kRunTokens; batch += kBatch * kTokens) {
    Packed packed[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      packed[i] = load_packed<kBits>(p, places[batch + i * kTokens], chunk);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int token = first + batch + i * kTokens;
      alignas(16) float x[kDims];
      unpack<kBits>(packed[i], x);
      if (kWhole || token < p.n) store_dims(vectors + int64_t{token} * (p.pool.h_kv * HEAD_DIM), x);
    }
  }
}

template <typename T, int kSide>
__device__ __forceinline__ void dequantize_side(const DequantizeParams& p, const Place* places,
                                                int head, int first) {
  if (first + kRunTokens <= p.n) {
    dequantize_run<T, kSide, true>(p, places, head, first);
  } else {
    dequantize_run<T, kSide, false>(p, places, head, first);
  }
}

// Grid: h_kv, up to the number of runs of kRunTokens tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) dequantize_kernel(const DequantizeParams p) {
  // Of two runs, so that one barrier a run keeps makers and readers of places apart.
  __shared__ Place places[2][2][kRunTokens];
  const int head = blockIdx.x, stride = gridDim.y * kRunTokens;
  const bool is_k = threadIdx.x < kSideThreads;
  // The vector whose place this thread makes.
  const int side = threadIdx.x / kRunTokens, token = threadIdx.x % kRunTokens;
  int first = blockIdx.y * kRunTokens;
  Slot slot = load_slot(p, first + token);
  Record record = load_record(p, side & 1, head, slot);
  Slot next_slot = load_slot(p, first + stride + token);
  for (int turn = 0; first < p.n; first += stride, turn ^= 1) {
    if (side < 2) places[turn][side][token] = make_place(p, side, head, slot, record);
    __syncthreads();
    slot = next_slot;
    record = load_record(p, side & 1, head, slot);
    next_slot = load_slot(p, first + 2 * stride + token);
    if (is_k) {
      dequantize_side<T, 0>(p, places[turn][0], head, first);
    } else {
      dequantize_side<T, 1>(p, places[turn][1], head, first);
    }
  }
}

}  // namespace patternkv::dequantize
