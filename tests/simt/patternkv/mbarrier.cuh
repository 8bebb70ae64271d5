// The counting barriers of the file of this name in kernels/, on a CPU (see simt.h).
#pragma once

#include "patternkv/ptx.cuh"
#include "simt.h"

namespace patternkv {

struct Mbarrier {
  uint16_t count, missing;
  uint32_t phase;  // the present one
};

inline void mbarrier_init(Mbarrier& barrier, int count) {
  barrier = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
}

inline void mbarrier_arrive(Mbarrier& barrier, int arrivals) {
  if (barrier.missing < arrivals) __trap();  // too many for one phase
  barrier.missing -= arrivals;
  if (barrier.missing == 0) barrier.missing = barrier.count, ++barrier.phase;
}

inline void mbarrier_wait(Mbarrier& barrier, uint32_t parity) {
  while (barrier.phase % 2 == parity) simt::yield();
}

}  // namespace patternkv
