// Blocks of a running kernel that wait for each other and read what others wrote. tests/simt has a
// stand-in for this file, with which the kernels run on a CPU.
#pragma once

#include <cstdint>

namespace patternkv {

// A barrier of `blocks` blocks that run at once, by a counter of those that have come, 0 at first;
// `count`: barriers so far, this one too. What they wrote before it, to global memory too, is visible
// to all of them behind it.
__device__ __forceinline__ void blocks_barrier(uint32_t* arrived, uint32_t blocks, uint32_t count) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    uint32_t come;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(come) : "l"(arrived) : "memory");
    } while (come < blocks * count);
  }
  __syncthreads();
}

// From the L2 cache, where writes of other multiprocessors arrive.
template <typename T>
__device__ __forceinline__ T load_coherent(const T* x) {
  return __ldcg(x);
}

}  // namespace patternkv
