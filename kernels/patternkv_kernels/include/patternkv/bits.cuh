// Numbers by their bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace patternkv {

__device__ __forceinline__ uint32_t as_u32(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }

__device__ __forceinline__ float half_bits_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float load_float(const __nv_bfloat16* x) { return __bfloat162float(*x); }
__device__ __forceinline__ float load_float(const __half* x) { return __half2float(*x); }
__device__ __forceinline__ float load_float(const float* x) { return *x; }

// The power of two that brings `largest` into [2^exponent, 2^(exponent + 1)); 1 for 0.
__device__ __forceinline__ float power_of_two_scale(float largest, int exponent) {
  const int biased = (__float_as_int(largest) >> 23) & 0xff;
  const int wanted = min(max(254 + exponent - biased, 8), 240);
  return biased == 0 ? 1.0f : __int_as_float(wanted << 23);
}

}  // namespace patternkv
