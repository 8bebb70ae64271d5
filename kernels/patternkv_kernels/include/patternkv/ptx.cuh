// Thin wrappers of the instructions that the kernels name themselves. tests/simt has a stand-in for
// this file, with which the kernels run on a CPU.
#pragma once

#include "patternkv/bits.cuh"

// Dynamic shared memory of a block, as an array of bytes.
#define PATTERNKV_DYNAMIC_SHARED(name) extern __shared__ __align__(256) uint8_t name[]

namespace patternkv {

// c[16 x 8] += a[16 x 16] * b[16 x 8], fp16 operands, f32 accumulators. In lane l, with g = l / 4
// and x = 2 (l % 4) and the next, the registers hold
//   a0: A[g; x], a1: A[g+8; x], a2: A[g; x+8], a3: A[g+8; x+8],
//   b0: B[x; g], b1: B[x+8; g], c0, c1: C[g; x], c2, c3: C[g+8; x].
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes the 8 x 8 matrix of 16-bit elements whose row g, columns 2t and 2t+1 are in lane l.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// (x & mask) | magic in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t magic) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(magic));
  return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t shared, const void* global) {
  static_assert(kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global));
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Reads what nothing writes meanwhile and nobody reads again: past the L1 cache.
__device__ __forceinline__ uint4 load_streaming(const uint4* x) {
  uint4 y;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
               : "l"(x));
  return y;
}

// The same of what others do read again. These loads stay where they are written, ahead of what
// waits for their values, instead of moving behind a branch.
__device__ __forceinline__ uint4 load_early(const uint4* x) {
  uint4 y;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
               : "l"(x));
  return y;
}

__device__ __forceinline__ uint2 load_early(const uint2* x) {
  uint2 y;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(y.x), "=r"(y.y) : "l"(x));
  return y;
}

__device__ __forceinline__ uint32_t load_early(const uint32_t* x) {
  uint32_t y;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(y) : "l"(x));
  return y;
}

__device__ __forceinline__ uint32_t load_early(const uint16_t* x) {
  uint16_t y;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(y) : "l"(x));
  return y;
}

// Loads that not even the assembler moves behind a branch that follows.
__device__ __forceinline__ uint4 load_now(const uint4* x) {
  uint4 y;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
               : "l"(x));
  return y;
}

__device__ __forceinline__ int load_now(const int* x) {
  int y;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(y) : "l"(x));
  return y;
}

// Keeps the compiler from computing x later than here.
__device__ __forceinline__ void compute_now(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void compute_now(uint32_t& x) { asm volatile("" : "+r"(x)); }

// Hides from the compiler what x is, so that it neither computes what depends on x ahead of a loop,
// where registers are scarce, nor x itself anew wherever it is used.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Brings the line of an address to the L2 cache.
__device__ __forceinline__ void prefetch(const void* x) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x));
}

// Writes what is first to leave the caches.
__device__ __forceinline__ void store_streaming(uint4* at, uint4 x) { __stcs(at, x); }

// Shared memory by 32-bit address: where addresses are computed once and used with offsets.
__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address));
  return x;
}

// Four 8 x 8 matrices of 16-bit elements, whose 16-byte rows lanes 8 i to 8 i + 7 give addresses of
// for matrix i. Lane 4 g + t loads rows 2 t and 2 t + 1 of column g, transposed.
__device__ __forceinline__ void load_matrices_trans(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// The same addresses. Lane 4 g + t stores row g, columns 2 t and 2 t + 1. Compute capability 9.0.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#endif
}

// No memory clobber, so that loads of other data may move past it: a barrier must stand between it
// and reads of the sum.
__device__ __forceinline__ void add_shared(uint32_t address, uint32_t x) {
  asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(x));
}

// Programmatic dependent launch: lets the next kernel of the stream start as soon as every block of
// this one has called it or ended.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the previous kernel of the stream has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace patternkv
