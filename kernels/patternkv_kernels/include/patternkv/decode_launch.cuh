// Which attention kernels decode launches on a device, and how.
#pragma once

#include <algorithm>

#include "patternkv/decode_hopper.cuh"
#include "patternkv/decode_narrow.cuh"
#include "patternkv/decode_warpgroup.cuh"
#include "patternkv/decode_wide.cuh"
#include "patternkv/launch.cuh"

namespace patternkv {

using AttendKernel = void (*)(DecodeParams);

// One of the attention kernels with tables of some number of patterns.
struct AttendLaunch {
  AttendKernel kernel;
  int threads;
  int rows;    // most query rows of a work item
  int bytes;   // dynamic shared memory of a block
  int blocks;  // that run at once

  // Most branches of a work item, with `group` rows each; 0: there is no such kernel.
  int64_t branches(int64_t group) const {
    return rows > 0 ? std::max<int64_t>(rows / group, 1) : 0;
  }
};

// How decode runs on one device.
struct LaunchConfig {
  AttendLaunch narrow, few, wide, many;  // by query rows of a work item; 0 rows: none
  bool dependent_launch;                 // compute capability 9.0 and later
  int sms;

  // The kernels with shared segments of a batch of so many query rows per KV head: one for items of
  // up to 16 or 32 rows, and one that takes a step's instead if these mostly have more.
  const AttendLaunch& shared(int64_t rows) const {
    static const AttendLaunch none = {};
    return rows <= narrow.rows ? none : rows <= few.rows ? few : wide;
  }
  const AttendLaunch& larger(int64_t rows) const {
    static const AttendLaunch none = {};
    return rows <= wide.rows ? none : many;
  }
};

inline int most_shared_bytes(AttendKernel kernel, int device) {
  int per_block;
  check(cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "device");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a decode kernel");
  return per_block - static_cast<int>(attributes.sharedSizeBytes);
}

inline AttendLaunch make_launch(AttendKernel kernel, int threads, int rows, int bytes,
                                int num_patterns, int device) {
  int sms, per_sm = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "device");
  // To the most there is, since other numbers of patterns share the kernel. Of all kernels alike:
  // multiprocessors would wait for one kernel's blocks to leave before they divide their memory
  // another way for the next one's.
  const int most = most_shared_bytes(kernel, device);
  TVM_FFI_CHECK(bytes <= most, ValueError)
      << num_patterns << " patterns need " << bytes << " bytes of shared memory, the GPU has "
      << most << " per block: use fewer patterns";
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "shared memory of a decode kernel");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "carve-out of a decode kernel");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, bytes),
        "occupancy of a decode kernel");
  return {kernel, threads, rows, bytes, std::max(per_sm, 1) * sms};
}

// No rows where there is no such kernel or tables leave it no room.
inline AttendLaunch make_warpgroup_launch(int num_patterns, int device) {
  if constexpr (warpgroup::kExists) {
    const auto fits = [&](AttendKernel kernel, int bytes) {
      return bytes <= most_shared_bytes(kernel, device);
    };
    const auto launch = [&](AttendKernel kernel, int bytes) {
      return make_launch(kernel, warpgroup::kBlockThreads, warpgroup::kMostRows, bytes,
                         num_patterns, device);
    };
    const int long_bytes = warpgroup::shared_bytes<64>(num_patterns),
              short_bytes = warpgroup::shared_bytes<32>(num_patterns);
    if (fits(warpgroup::attend_kernel<64>, long_bytes)) {
      return launch(warpgroup::attend_kernel<64>, long_bytes);
    }
    if (fits(warpgroup::attend_kernel<32>, short_bytes)) {
      return launch(warpgroup::attend_kernel<32>, short_bytes);
    }
  }
  return {};
}

template <int kRows, int kPatterns>
AttendLaunch make_hopper_launch(int num_patterns, int device) {
  return make_launch(hopper::attend_kernel<kRows, kPatterns>, kThreads, kRows,
                     hopper::shared_bytes<kRows, kPatterns>(), num_patterns, device);
}

inline LaunchConfig make_config(int num_patterns, int group, int device) {
  int major;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  const int rows = group <= 4 ? 4 : 8;
  const AttendKernel narrow = rows == 4 ? narrow::attend_kernel<4> : narrow::attend_kernel<8>;
  LaunchConfig config = {};
  check(cudaDeviceGetAttribute(&config.sms, cudaDevAttrMultiProcessorCount, device), "device");
  config.narrow = make_launch(narrow, kThreads, rows, narrow::shared_bytes(num_patterns, rows),
                              num_patterns, device);
  config.many = make_warpgroup_launch(num_patterns, device);
  config.dependent_launch = major >= 9;
  if constexpr (hopper::kExists) {
    if (num_patterns <= hopper::kGroupPatterns) {
      config.few = make_hopper_launch<16, hopper::kGroupPatterns>(num_patterns, device);
      config.wide = make_hopper_launch<32, hopper::kGroupPatterns>(num_patterns, device);
      return config;
    }
    if (num_patterns <= hopper::kMostPatterns) {
      config.few = make_hopper_launch<16, hopper::kMostPatterns>(num_patterns, device);
      config.wide = make_hopper_launch<32, hopper::kMostPatterns>(num_patterns, device);
      return config;
    }
  }
  config.wide = make_launch(wide::attend_kernel, kThreads, wide::kMostRows,
                            wide::shared_bytes(num_patterns), num_patterns, device);
  return config;
}

// Once per device, number of patterns and kind of group: the attributes that it sets stay set.
inline const LaunchConfig& launch_config(int num_patterns, int group, int device) {
  constexpr int kMaxDevices = 64, kMaxPatterns = 256;
  static thread_local LaunchConfig configs[kMaxDevices][kMaxPatterns + 1][2];
  TVM_FFI_ICHECK(device >= 0 && device < kMaxDevices) << "device " << device;
  TVM_FFI_ICHECK(num_patterns >= 1 && num_patterns <= kMaxPatterns) << num_patterns << " patterns";
  LaunchConfig& config = configs[device][num_patterns][group > 4];
  if (config.wide.rows == 0) config = make_config(num_patterns, group, device);
  return config;
}

template <typename Kernel, typename Params>
void launch(Kernel kernel, dim3 grid, int threads, int bytes, cudaStream_t stream, bool dependent,
            const Params& params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), "launch of a decode kernel");
}

}  // namespace patternkv
