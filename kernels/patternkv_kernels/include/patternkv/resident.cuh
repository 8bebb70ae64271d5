// How many blocks of a kernel run at once.
#pragma once

#include <algorithm>

#include "tvm_ffi_utils.h"

namespace patternkv {

// Blocks of kKernel, of kThreads threads without dynamic shared memory, that fill `device`.
template <auto kKernel, int kThreads>
int resident_blocks(int device) {
  constexpr int kMaxDevices = 64;
  static thread_local int blocks[kMaxDevices];
  TVM_FFI_ICHECK(device >= 0 && device < kMaxDevices) << "device " << device;
  if (blocks[device] == 0) {
    int per_sm = 0, sms = 0;
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, kThreads, 0);
    blocks[device] = std::max(per_sm, 1) * std::max(sms, 1);
  }
  return blocks[device];
}

}  // namespace patternkv
