// Asynchronous matrix products of a warpgroup (four warps, compute capability 9.0), whose right
// operand lies in shared memory and whose left one there or in registers. tests/simt has a stand-in
// for this file.
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

// Where a product finds an operand: the low word of a descriptor, so that operands `bytes` (a
// multiple of 16) further are at this plus bytes / 16. `next_tile`, bytes from a tile to the next,
// counts only for products by columns that span several.
__device__ __forceinline__ uint32_t operand(uint32_t address, uint32_t next_tile = 16) {
  return address / 16 | next_tile / 16 << 16;
}
// The high word of all: 128-byte swizzle, 1024 bytes from 8 rows to the next.
constexpr uint32_t kOperandHigh = 1u << 30 | 8 * kSwizzledRow / 16;

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

// Waits for every product but those of the last kPending commits. Name the accumulators with
// `settle` before they are used.
template <int kPending = 0>
__device__ __forceinline__ void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from reading accumulators ahead of wgmma_wait, from writing operands in
// registers after wgmma_begin, which would make products wait for each other, and from writing them
// ahead of the wait for products that still read these registers.
template <int kCount>
__device__ __forceinline__ void settle(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount, int kWords>
__device__ __forceinline__ void settle(uint32_t (&x)[kCount][kWords]) {
#pragma unroll
  for (int i = 0; i < kWords * kCount; ++i) {
    asm volatile("" : "+r"(x[i / kWords][i % kWords])::"memory");
  }
}

#define PATTERNKV_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PATTERNKV_8(c, i) PATTERNKV_4(c, i), PATTERNKV_4(c, i + 4)
#define PATTERNKV_16(c, i) PATTERNKV_8(c, i), PATTERNKV_8(c, i + 8)
#define PATTERNKV_32(c, i) PATTERNKV_16(c, i), PATTERNKV_16(c, i + 16)
#define PATTERNKV_64(c, i) PATTERNKV_32(c, i), PATTERNKV_32(c, i + 32)
#define PATTERNKV_NAMES_4 "%0, %1, %2, %3"
#define PATTERNKV_NAMES_8 PATTERNKV_NAMES_4 ", %4, %5, %6, %7"
#define PATTERNKV_NAMES_16 PATTERNKV_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PATTERNKV_NAMES_32 \
  PATTERNKV_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PATTERNKV_NAMES_64                                                             \
  PATTERNKV_NAMES_32                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PATTERNKV_WGMMA(n, names, count, c, a0, a1, a2, a3, desc, high, transposed, plus)   \
  asm volatile("{ .reg .pred add; .reg .b64 b; setp.ne.b32 add, %" #plus                    \
               ", 0; "                                                                      \
               "mov.b64 b, {%" #desc ", %" #high                                            \
               "}; "                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" names "}, {%" #a0 \
               ", %" #a1 ", %" #a2 ", %" #a3 "}, b, add, 1, 1, %" #transposed "; }"         \
               : PATTERNKV_##count(c, 0)                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperandHigh),     \
                 "n"(kTransposed), "r"(static_cast<int>(add)))

template <int kTransposed, int kCount>
__device__ __forceinline__ void wgmma(float (&c)[kCount], const uint32_t (&a)[4], uint32_t b,
                                      bool add) {
  static_assert(kCount == 8 || kCount == 16 || kCount == 32 || kCount == 64);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kCount == 8) {
    PATTERNKV_WGMMA(16, PATTERNKV_NAMES_8, 8, c, 8, 9, 10, 11, 12, 13, 14, 15);
  } else if constexpr (kCount == 16) {
    PATTERNKV_WGMMA(32, PATTERNKV_NAMES_16, 16, c, 16, 17, 18, 19, 20, 21, 22, 23);
  } else if constexpr (kCount == 32) {
    PATTERNKV_WGMMA(64, PATTERNKV_NAMES_32, 32, c, 32, 33, 34, 35, 36, 37, 38, 39);
  } else {
    PATTERNKV_WGMMA(128, PATTERNKV_NAMES_64, 64, c, 64, 65, 66, 67, 68, 69, 70, 71);
  }
#endif
}

// c[64 x 2 kCount] = or += a[64 x 16] b[2 kCount x 16]^T: 16 columns of the rows of `b`. Warp w of
// the group, with lane = 4 g + t, has in c[4 j + 2 h + e] row 16 w + g + 8 h and column 8 j + 2 t +
// e. `a` is in registers, as fp16 pairs: a[2 i + h] has row 16 w + g + 8 h, columns 8 i + 2 t and
// the next.
template <int kCount>
__device__ __forceinline__ void wgmma_by_rows(float (&c)[kCount], const uint32_t (&a)[4],
                                              uint32_t b, bool add = true) {
  wgmma<0>(c, a, b, add);
}

// c[64 x 2 kCount] += a[64 x 16] b[16 x 2 kCount]: 16 rows of `b`, all its columns.
template <int kCount>
__device__ __forceinline__ void wgmma_by_columns(float (&c)[kCount], const uint32_t (&a)[4],
                                                 uint32_t b) {
  wgmma<1>(c, a, b, true);
}

// c += a b^T of 16 columns of the rows of both, `a` in shared memory too; c as above.
template <int kCount>
__device__ __forceinline__ void wgmma_shared_by_rows(float (&c)[kCount], uint32_t a, uint32_t b) {
  static_assert(kCount == 16 || kCount == 32);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kCount == 32) {
    asm volatile(
        "{ .reg .b64 a, b; mov.b64 a, {%32, %34}; mov.b64 b, {%33, %34}; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{" PATTERNKV_NAMES_32 "}, a, b, 1, 1, 1, 0, 0; }"
        : PATTERNKV_32(c, 0)
        : "r"(a), "r"(b), "n"(kOperandHigh));
  } else {
    asm volatile(
        "{ .reg .b64 a, b; mov.b64 a, {%16, %18}; mov.b64 b, {%17, %18}; "
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{" PATTERNKV_NAMES_16 "}, a, b, 1, 1, 1, 0, 0; }"
        : PATTERNKV_16(c, 0)
        : "r"(a), "r"(b), "n"(kOperandHigh));
  }
#endif
}

#undef PATTERNKV_4
#undef PATTERNKV_8
#undef PATTERNKV_16
#undef PATTERNKV_32
#undef PATTERNKV_64
#undef PATTERNKV_NAMES_4
#undef PATTERNKV_NAMES_8
#undef PATTERNKV_NAMES_16
#undef PATTERNKV_NAMES_32
#undef PATTERNKV_NAMES_64
#undef PATTERNKV_WGMMA

// A named barrier that `threads` threads of the block meet at.
__device__ __forceinline__ void block_barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A barrier in shared memory, whose phases end with their last arrival, by its address. Unlike at a
// named barrier, who waits is not counted, so that several who wait do not wait for each other.
struct PhaseBarrierAddress {
  uint32_t address;

  __device__ __forceinline__ void arrive(int times = 1) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(times)
                 : "memory");
#endif
  }
  // Whether a phase has ended, counted from 0, of which the one before has.
  __device__ __forceinline__ bool test(int phase) const {
    uint32_t ended = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred ended; mbarrier.test_wait.parity.shared::cta.b64 ended, [%1], %2; "
        "selp.u32 %0, 1, 0, ended; }"
        : "=r"(ended)
        : "r"(address), "r"(phase & 1)
        : "memory");
#endif
    return ended != 0;
  }
  // Waits for the end of such a phase.
  __device__ __forceinline__ void wait(int phase) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(address),
        "r"(phase & 1)
        : "memory");
#endif
  }
};

struct PhaseBarrier {
  uint64_t state;

  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ PhaseBarrierAddress at() const { return {shared_address(&state)}; }
};

// Registers of each thread of a warpgroup from here on, more or less than the launch gave it.
template <int kCount>
__device__ __forceinline__ void raise_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void lower_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Barrier of one of several warpgroups.
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

}  // namespace patternkv
