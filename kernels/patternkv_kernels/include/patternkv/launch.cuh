// What launchers share.
#pragma once

#include <algorithm>

#include "patternkv/layout.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {

// Raises for what went wrong with `what`.
inline void check(cudaError_t error, const char* what) {
  TVM_FFI_ICHECK(error == cudaSuccess) << what << ": " << cudaGetErrorString(error);
}

// Raises unless `x` is [n, heads, HEAD_DIM] with contiguous vectors that start at 16 bytes.
inline void check_vectors(const TensorView& x) {
  TVM_FFI_ICHECK(x.size(2) == HEAD_DIM && x.stride(2) == 1 && x.stride(0) % 8 == 0 &&
                 x.stride(1) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0)
      << "vectors must be contiguous and 16-byte aligned";
}

// Blocks of kKernel, of kThreads threads with kBytes of dynamic shared memory, that fill `device`.
// Allows the kernel that much.
template <auto kKernel, int kThreads, int kBytes = 0>
int resident_blocks(int device) {
  constexpr int kMaxDevices = 64;
  static thread_local int blocks[kMaxDevices];
  TVM_FFI_ICHECK(device >= 0 && device < kMaxDevices) << "device " << device;
  if (blocks[device] == 0) {
    int per_sm = 0, sms = 0;
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "device");
    if constexpr (kBytes > 0) {
      check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
            "shared memory of a kernel");
    }
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, kThreads, kBytes),
          "occupancy of a kernel");
    blocks[device] = std::max(per_sm, 1) * std::max(sms, 1);
  }
  return blocks[device];
}

}  // namespace patternkv
