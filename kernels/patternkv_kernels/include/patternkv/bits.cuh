// Numbers by their bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace patternkv {

__device__ __forceinline__ uint32_t as_u32(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }

__device__ __forceinline__ float half_bits_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float load_float(const __nv_bfloat16* x) { return __bfloat162float(*x); }
__device__ __forceinline__ float load_float(const __half* x) { return __half2float(*x); }
__device__ __forceinline__ float load_float(const float* x) { return *x; }

// Vectors of bf16 or fp16, two numbers a word, and back, rounded.
template <typename T, int kDims>
__device__ __forceinline__ void to_floats(float (&out)[kDims], const uint32_t (&words)[kDims / 2]) {
#pragma unroll
  for (int i = 0; i < kDims; ++i) out[i] = load_float(reinterpret_cast<const T*>(words) + i);
}

template <typename T, int kDims>
__device__ __forceinline__ void to_words(uint32_t (&out)[kDims / 2], const float (&x)[kDims]) {
#pragma unroll
  for (int i = 0; i < kDims / 2; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      out[i] = as_u32(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      out[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
}

// The power of two that brings `largest` into [2^exponent, 2^(exponent + 1)); 1 for 0.
__device__ __forceinline__ float power_of_two_scale(float largest, int exponent) {
  const int biased = (__float_as_int(largest) >> 23) & 0xff;
  const int wanted = min(max(254 + exponent - biased, 8), 240);
  return biased == 0 ? 1.0f : __int_as_float(wanted << 23);
}

}  // namespace patternkv
