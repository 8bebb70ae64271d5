// Barriers in shared memory that count arrivals (compute capability 9.0). Who arrives does not wait,
// and whoever waits may be any number of phases behind the others, up to one. tests/simt has a
// stand-in for this file.
#pragma once

#include "patternkv/ptx.cuh"

namespace patternkv {

using Mbarrier = uint64_t;

// By one thread, before a barrier of the block. A phase ends with `count` arrivals.
__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier, int arrivals) {
  asm volatile(
      "mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
      : "memory");
}

// For the end of a phase: of the first, third, … with parity 0, of the others with parity 1. A new
// barrier counts as one whose phase of parity 1 is over.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
      "@!done bra again; }" ::"r"(shared_address(&barrier)), "r"(parity)
      : "memory");
}

}  // namespace patternkv
