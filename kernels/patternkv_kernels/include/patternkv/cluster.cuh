// Clusters of blocks, and reads of what other blocks of a running kernel wrote. tests/simt has a
// stand-in for this file, with which the kernels run on a CPU.
#pragma once

#include <cstdint>

namespace patternkv {

// A barrier of all threads of the cluster; what they wrote before it, to global memory too, is
// visible to all of them behind it. Clusters came with compute capability 9.0.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // aligned: by whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// From the L2 cache, where writes of other multiprocessors arrive.
template <typename T>
__device__ __forceinline__ T load_coherent(const T* x) {
  return __ldcg(x);
}

}  // namespace patternkv
