// The instructions of the file of this name in kernels/, on a CPU (see simt.h).
#pragma once

#include "patternkv/bits.cuh"
#include "simt.h"

#define PATTERNKV_DYNAMIC_SHARED(name) uint8_t* name = simt::memory.data()

namespace patternkv {

inline void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  struct Operands {
    float* c;
    uint32_t a[4], b[2];
  };
  const Operands own = {c, {a0, a1, a2, a3}, {b0, b1}};
  simt::exchange(reinterpret_cast<uint64_t>(&own), [](const uint64_t* in, uint64_t*) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < simt::kLanes; ++lane) {
      const auto& operands = *reinterpret_cast<const Operands*>(in[lane]);
      const int g = lane / 4, x = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(as_half2(operands.a[i]));
        double* at = &a[g + i % 2 * 8][x + i / 2 * 8];
        at[0] = pair.x, at[1] = pair.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = __half22float2(as_half2(operands.b[i]));
        b[x + i * 8][g] = pair.x, b[x + i * 8 + 1][g] = pair.y;
      }
    }
    for (int lane = 0; lane < simt::kLanes; ++lane) {
      float* c = reinterpret_cast<const Operands*>(in[lane])->c;
      for (int i = 0; i < 4; ++i) {
        double sum = c[i];
        for (int k = 0; k < 16; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
        c[i] = static_cast<float>(sum);
      }
    }
  });
}

inline uint32_t movmatrix_trans(uint32_t x) {
  return simt::exchange(x, [](const uint64_t* in, uint64_t* out) {
    for (int lane = 0; lane < simt::kLanes; ++lane) {
      const int column = lane / 4, row = lane % 4 * 2;
      const int shift = column % 2 * 16;
      const uint64_t low = in[row * 4 + column / 2] >> shift & 0xffff;
      const uint64_t high = in[(row + 1) * 4 + column / 2] >> shift & 0xffff;
      out[lane] = low | high << 16;
    }
  });
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t magic) { return (x & mask) | magic; }
inline float exp2_approx(float x) { return std::exp2(x); }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - simt::memory.data();
}

template <int kBytes>
void cp_async(uint32_t shared, const void* global) {
  std::memcpy(simt::memory.data() + shared, global, kBytes);
}

inline void cp_async_commit() {}

template <int kPending>
void cp_async_wait() {}

inline uint4 load_streaming(const uint4* x) { return *x; }
inline uint4 load_early(const uint4* x) { return *x; }
inline uint2 load_early(const uint2* x) { return *x; }
inline uint32_t load_early(const uint32_t* x) { return *x; }
inline uint32_t load_early(const uint16_t* x) { return *x; }
inline uint4 load_now(const uint4* x) { return *x; }
inline int load_now(const int* x) { return *x; }
inline void prefetch(const void*) {}
inline void store_streaming(uint4* at, uint4 x) { *at = x; }

inline float4 load_shared_float4(uint32_t address) {
  return *reinterpret_cast<const float4*>(simt::memory.data() + address);
}

inline void load_matrices_trans(uint32_t (&x)[4], uint32_t address) {
  for (int i = 0; i < 4; ++i) {
    uint64_t row[8];
    for (int r = 0; r < 8; ++r) row[r] = __shfl_sync(~0u, address, 8 * i + r);
    const int column = simt::current % simt::kLanes / 4, first = simt::current % 4 * 2;
    const auto element = [&](int r) {
      return uint32_t{*reinterpret_cast<uint16_t*>(simt::memory.data() + row[r] + 2 * column)};
    };
    x[i] = element(first) | element(first + 1) << 16;
  }
}

inline void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  for (int i = 0; i < 4; ++i) {
    const int lane = simt::current % simt::kLanes;
    const uint32_t row = __shfl_sync(~0u, address, 8 * i + lane / 4);
    *reinterpret_cast<uint32_t*>(simt::memory.data() + row + lane % 4 * 4) = x[i];
  }
}

inline void add_shared(uint32_t address, uint32_t x) {
  *reinterpret_cast<uint32_t*>(simt::memory.data() + address) += x;
}

inline void compute_now(float&) {}
inline void compute_now(uint32_t&) {}
inline int opaque(int x) { return x; }

inline void launch_dependents() {}
inline void wait_for_previous_kernel() {}

}  // namespace patternkv
