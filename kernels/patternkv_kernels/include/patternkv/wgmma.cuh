// Asynchronous matrix products of a warpgroup (four warps, compute capability 9.0), whose operands
// lie in shared memory. tests/simt has a stand-in for this file.
//
// An operand tile has rows of 64 fp16 (128 bytes) whose 16-byte pieces are permuted by exclusive or
// with the row modulo 8; blocks of 8 rows are 1024 bytes, aligned to as many. Wider matrices are
// several such tiles behind each other.
#pragma once

#include "patternkv/ptx.cuh"

namespace patternkv {

constexpr int kSwizzledRow = 128;  // bytes

// Byte offset of 16-byte piece `piece` of row `row` in a tile.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return row * kSwizzledRow + ((piece ^ row % 8) * 16);
}

// Where a product finds an operand. `next_tile`, bytes from a tile to the next, counts only for
// products that run over rows.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t next_tile) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kNextRows = uint64_t{8 * kSwizzledRow / 16} << 32;
  return kSwizzle128 | kNextRows | uint64_t{next_tile / 16} << 16 | address / 16;
}

// Products see what threads stored before this and a barrier.
__device__ __forceinline__ void publish_operands() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first product and wherever registers of one were touched.
__device__ __forceinline__ void wgmma_begin() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for every product. Name the accumulators with `settle` before they are used.
__device__ __forceinline__ void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Keeps the compiler from reading accumulators ahead of wgmma_wait.
template <int kCount>
__device__ __forceinline__ void settle(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Zeros that the compiler does not move up among running products, which would serialize them.
template <int kSteps>
__device__ __forceinline__ void set_zero(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) asm volatile("mov.b32 %0, 0;" : "=r"(a[i / 4][i % 4]));
}

#define PATTERNKV_8(c, i)                                                                     \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define PATTERNKV_16(c, i) PATTERNKV_8(c, i), PATTERNKV_8(c, i + 8)
#define PATTERNKV_32(c, i) PATTERNKV_16(c, i), PATTERNKV_16(c, i + 16)
#define PATTERNKV_NAMES_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PATTERNKV_NAMES_32 \
  PATTERNKV_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PATTERNKV_NAMES_64                                                             \
  PATTERNKV_NAMES_32                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c[64 x 2 kCount] = or += a[64 x 16] b[2 kCount x 16]^T: 16 columns of the rows of `a` and `b`.
// Warp w of the group, with lane = 4 g + t, has in c[4 j + 2 h + e] row 16 w + g + 8 h and column
// 8 j + 2 t + e.
template <int kCount>
__device__ __forceinline__ void wgmma_rows(float (&c)[kCount], uint64_t a, uint64_t b, bool add) {
  static_assert(kCount == 16 || kCount == 32);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kCount == 32) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %34, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PATTERNKV_NAMES_32
        "}, %32, %33, add, 1, 1, 0, 0; }"
        : PATTERNKV_32(c, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %18, 0; "
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" PATTERNKV_NAMES_16
        "}, %16, %17, add, 1, 1, 0, 0; }"
        : PATTERNKV_16(c, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  }
#endif
}

// c[64 x 2 kCount] += a[64 x 16] b[16 x 2 kCount]: 16 rows of `b`, all its columns, and `a` in
// registers, as fp16 pairs laid out like c: a[2 j + h] for the columns 8 j + 2 t and the next.
template <int kCount>
__device__ __forceinline__ void wgmma_columns(float (&c)[kCount], const uint32_t (&a)[4],
                                              uint64_t b) {
  static_assert(kCount == 32 || kCount == 64);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kCount == 64) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PATTERNKV_NAMES_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : PATTERNKV_32(c, 0), PATTERNKV_32(c, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PATTERNKV_NAMES_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : PATTERNKV_32(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
#endif
}

#undef PATTERNKV_8
#undef PATTERNKV_16
#undef PATTERNKV_32
#undef PATTERNKV_NAMES_16
#undef PATTERNKV_NAMES_32
#undef PATTERNKV_NAMES_64

// Named barriers that `threads` threads of the block meet at; who arrives does not wait.
__device__ __forceinline__ void block_barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void block_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Barrier of one of several warpgroups.
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

}  // namespace patternkv
