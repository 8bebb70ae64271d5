// Dequantize: packed slots back to vectors.
//
// A thread makes 8 consecutive dims of a vector: one code word, 16 bytes of its pattern, one
// 16-byte store (two for float32). A block has one head; half of its warps do K, the others V.
// Bound by memory: an exactly rounded float32 takes one multiply-add, since the product of the
// scales has 22 bits and a level 4.
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
constexpr int kUnroll = 4;  // tokens of a thread, whose loads are under way together
constexpr int kBlockTokens = kTokens * kUnroll;

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

// What a thread loads of one token.
struct Packed {
  uint4 pattern, channel_scale;
  uint32_t codes;  // two halves of four codes each, low bits first
  float scale;
};

// Codes of a thread's dims as a half of codes 0-3 and a half of codes 4-7.
template <int kBits>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* row, int chunk) {
  if constexpr (kBits == 4) {
    return __ldg(reinterpret_cast<const uint32_t*>(row) + chunk);
  } else {
    return __byte_perm(__ldg(reinterpret_cast<const uint16_t*>(row) + chunk), 0, 0x4140);
  }
}

template <int kSide>
__device__ __forceinline__ Packed load_packed(const DequantizeParams& p, int head, int token,
                                              int chunk) {
  constexpr int kBits = kSide == 0 ? K_BITS : V_BITS;
  const int slot = p.slots_are_int64
                       ? static_cast<int>(__ldg(static_cast<const int64_t*>(p.slots) + token))
                       : __ldg(static_cast<const int*>(p.slots) + token);
  const int64_t table_head = (int64_t{__ldg(p.table_ids + token)} * 2 + kSide) * p.pool.h_kv + head;
  const SlotPlace place = p.pool.locate(slot);
  const auto* metadata = reinterpret_cast<const uint16_t*>(p.pool.metadata(place, head));
  const int id = kSide == 0 ? __ldg(metadata) & 0xff : __ldg(metadata) >> 8;
  const __half* pattern = p.patterns + (table_head * p.num_patterns + id) * HEAD_DIM;
  const __half* channel_scale = p.channel_scale + table_head * HEAD_DIM;
  Packed out;
  out.codes =
      load_codes<kBits>(kSide == 0 ? p.pool.k_row(place, head) : p.pool.v_row(place, head), chunk);
  out.scale = half_bits_to_float(__ldg(metadata + 1 + kSide));
  out.pattern = __ldg(reinterpret_cast<const uint4*>(pattern) + chunk);
  out.channel_scale = __ldg(reinterpret_cast<const uint4*>(channel_scale) + chunk);
  return out;
}

template <int kBits>
__device__ __forceinline__ void unpack(const Packed& packed, float (&x)[kDims]) {
  uint32_t pairs[Codes<kBits>::kPerHalf];  // pairs[r]: codes r and r + 4, scaled by a power of two
  Codes<kBits>::expand_centred(packed.codes, pairs);
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
    reinterpret_cast<float4*>(out)[0] = {x[0], x[1], x[2], x[3]};
    reinterpret_cast<float4*>(out)[1] = {x[4], x[5], x[6], x[7]};
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair pairs[kDims / 2];
#pragma unroll
    for (int j = 0; j < kDims / 2; ++j) {
      if constexpr (std::is_same_v<T, __half>) {
        pairs[j] = __floats2half2_rn(x[2 * j], x[2 * j + 1]);
      } else {
        pairs[j] = __floats2bfloat162_rn(x[2 * j], x[2 * j + 1]);
      }
    }
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(pairs);
  }
}

template <typename T, int kSide>
__device__ __forceinline__ void dequantize_side(const DequantizeParams& p, int head, int first,
                                                int chunk) {
  Packed packed[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    packed[i] = load_packed<kSide>(p, head, min(first + i * kTokens, p.n - 1), chunk);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int token = first + i * kTokens;
    if (token >= p.n) return;
    float x[kDims];
    unpack<kSide == 0 ? K_BITS : V_BITS>(packed[i], x);
    T* vector = static_cast<T*>(p.x[kSide]) + (int64_t{token} * p.pool.h_kv + head) * HEAD_DIM;
    store_dims(vector + kDims * chunk, x);
  }
}

// Grid: runs of kBlockTokens tokens, h_kv.
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p) {
  const int thread = threadIdx.x % kSideThreads;
  const int first = blockIdx.x * kBlockTokens + thread / kVectorThreads;
  const int chunk = thread % kVectorThreads;
  if (threadIdx.x < kSideThreads) {
    dequantize_side<T, 0>(p, blockIdx.y, first, chunk);
  } else {
    dequantize_side<T, 1>(p, blockIdx.y, first, chunk);
  }
}

}  // namespace patternkv::dequantize
