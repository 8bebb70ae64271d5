// Launchers of tree decode: the planner once per step, attention and merge once per layer.
#include <algorithm>
#include <cmath>

#include "patternkv/decode_hopper.cuh"
#include "patternkv/decode_merge.cuh"
#include "patternkv/decode_narrow.cuh"
#include "patternkv/decode_plan.cuh"
#include "patternkv/decode_warpgroup.cuh"
#include "patternkv/decode_wide.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {
namespace {

void check(cudaError_t error, const char* what) {
  TVM_FFI_ICHECK(error == cudaSuccess) << what << ": " << cudaGetErrorString(error);
}

// Capacities of a workspace and the places of the parts of its work list in one int32 tensor: the
// same ones for every batch, so a captured graph finds them where it left them.
struct WorkSizes {
  int64_t max_rows, max_entries, max_narrow, max_wide;

  int64_t words() const {
    return (sizeof(WorkHeader) + (max_narrow + max_wide) * sizeof(WorkItem)) / sizeof(int) +
           max_rows + 1 + 3 * max_entries;
  }
};

struct WorkParts {
  WorkList list;
  int* places;
};

WorkParts work_parts(const TensorView& work, const WorkSizes& sizes) {
  CHECK_INPUT_AND_TYPE(work, dl_int32);
  TVM_FFI_ICHECK_GE(work.numel(), sizes.words()) << "work list is too small";
  auto* at = static_cast<int*>(work.data_ptr());
  WorkParts parts;
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(at);
    at += count * sizeof(*part) / sizeof(int);
  };
  take(parts.list.header, 1);
  take(parts.list.narrow_items, sizes.max_narrow);
  take(parts.list.wide_items, sizes.max_wide);
  take(parts.list.runs, sizes.max_entries);
  take(parts.places, sizes.max_entries);
  take(parts.list.run_indptr, sizes.max_rows + 1);
  return parts;
}

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

int most_shared_bytes(AttendKernel kernel, int device) {
  int per_block;
  check(cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "device");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a decode kernel");
  return per_block - static_cast<int>(attributes.sharedSizeBytes);
}

AttendLaunch make_launch(AttendKernel kernel, int threads, int rows, int bytes, int num_patterns,
                         int device) {
  int sms, per_sm = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "device");
  // To the most there is, since other numbers of patterns share the kernel.
  const int most = most_shared_bytes(kernel, device);
  TVM_FFI_CHECK(bytes <= most, ValueError)
      << num_patterns << " patterns need " << bytes << " bytes of shared memory, the GPU has "
      << most << " per block: use fewer patterns";
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "shared memory of a decode kernel");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, bytes),
        "occupancy of a decode kernel");
  return {kernel, threads, rows, bytes, std::max(per_sm, 1) * sms};
}

// No rows where there is no such kernel or tables leave it no room.
AttendLaunch make_warpgroup_launch(int num_patterns, int device) {
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

LaunchConfig make_config(int num_patterns, int group, int device) {
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
const LaunchConfig& launch_config(int num_patterns, int group, int device) {
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

}  // namespace

// {items that the planner may make of each kind beyond one per segment and tile of branches, and
// beyond one per kMaxChunk tokens; most branches of such an item}: narrow, then wide. Behind them,
// the most rows of an item in each kernel: libraries that agree in these can read each other's
// plans.
ffi::Array<int64_t> limits(int64_t num_patterns, int64_t group, int64_t h_kv, int64_t device) {
  ffi::CUDADeviceGuard guard(device);
  const LaunchConfig& c = launch_config(num_patterns, group, device);
  const auto extra = [&](int64_t blocks) { return plan::kMaxRounds * blocks / h_kv; };
  // Shared segments may make few items of many branches or many of few.
  int64_t wide_extra = 0, wide_states = 0;
  for (const AttendLaunch& launch : {c.few, c.wide, c.many}) {
    wide_extra = std::max(wide_extra, extra(launch.blocks));
    wide_states = std::max(wide_states, extra(launch.blocks) * launch.branches(group));
  }
  return {extra(c.narrow.blocks),
          c.narrow.branches(group),
          wide_extra,
          (wide_states + wide_extra - 1) / std::max<int64_t>(wide_extra, 1),
          c.narrow.rows,
          c.few.rows,
          c.wide.rows,
          c.many.rows};
}

// Writes the work list of one step into `work`; capacities as the caller allocated them.
void plan_work(TensorView segments, TensorView row_indptr, TensorView rows, TensorView work,
               int64_t b, int64_t group, int64_t h_kv, int64_t num_patterns, int64_t max_rows,
               int64_t max_entries, int64_t max_narrow, int64_t max_wide, int64_t max_states) {
  CHECK_INPUT_AND_TYPE(segments, dl_int32);
  CHECK_INPUT_AND_TYPE(row_indptr, dl_int32);
  CHECK_INPUT_AND_TYPE(rows, dl_int32);
  TVM_FFI_ICHECK(reinterpret_cast<uintptr_t>(segments.data_ptr()) % 16 == 0)
      << "segments unaligned";
  const int device = segments.device().device_id;
  ffi::CUDADeviceGuard guard(device);
  const LaunchConfig& config = launch_config(num_patterns, group, device);
  TVM_FFI_ICHECK_LE(b, max_rows) << "rows of a batch";
  const WorkParts parts = work_parts(work, {max_rows, max_entries, max_narrow, max_wide});
  plan::PlanParams params = {};
  params.segments = static_cast<const int4*>(segments.data_ptr());
  params.row_indptr = static_cast<const int*>(row_indptr.data_ptr());
  params.rows = static_cast<const int*>(rows.data_ptr());
  params.num_segments = segments.size(0);
  params.b = b;
  params.group = group;
  params.h_kv = h_kv;
  params.narrow_rows = config.narrow.rows;
  params.narrow_blocks = config.narrow.blocks;
  const AttendLaunch& shared = config.shared(b * group);
  params.wide_branches = shared.branches(group);
  params.wide_blocks = shared.blocks;
  const AttendLaunch& larger = config.larger(b * group);
  params.many_branches = larger.branches(group);
  params.many_blocks = larger.blocks;
  params.fewest_rows = kFewestRows;
  params.max_narrow = max_narrow;
  params.max_wide = max_wide;
  params.max_states = max_states;
  params.max_runs = max_entries;
  params.work = parts.list;
  params.places = parts.places;
  launch(plan::plan_kernel, dim3(1), plan::kPlanThreads, 0, get_stream(segments.device()), false,
         params);
}

// One layer: `states` is float32 [max_states * h_q * (d + 2)].
void decode_layer(TensorView q, TensorView buffer, int64_t page_size, TensorView patterns,
                  TensorView channel_scale, TensorView req_to_token, TensorView rows,
                  TensorView work, int64_t max_rows, int64_t max_entries, int64_t max_narrow,
                  int64_t max_wide, TensorView states, int64_t max_states, TensorView out,
                  TensorView lse, ffi::Optional<TensorView> window_k,
                  ffi::Optional<TensorView> window_v, ffi::Optional<TensorView> ring,
                  ffi::Optional<TensorView> start, ffi::Optional<TensorView> end,
                  ffi::Optional<TensorView> new_k, ffi::Optional<TensorView> new_v, double sm_scale,
                  double logit_cap) {
  const int device = q.device().device_id;
  ffi::CUDADeviceGuard guard(device);
  const cudaStream_t stream = get_stream(q.device());
  const int b = q.size(0), h_q = q.size(1), h_kv = patterns.size(2), group = h_q / h_kv;
  const int num_patterns = patterns.size(3);
  const LaunchConfig& config = launch_config(num_patterns, group, device);
  TVM_FFI_ICHECK_LE(b, max_rows) << "rows of a batch";
  const WorkParts parts = work_parts(work, {max_rows, max_entries, max_narrow, max_wide});
  CHECK_INPUT_AND_TYPE(states, dl_float32);
  TVM_FFI_ICHECK_GE(states.numel(), max_states * h_q * (HEAD_DIM + 2)) << "states of the plan";

  DecodeParams params = {};
  params.q = q.data_ptr();
  params.q_stride = q.stride(0);
  params.q_is_bf16 = encode_dlpack_dtype(q.dtype()) == bfloat16_code;
  params.pool = SlotPool::make(buffer.data_ptr(), page_size, h_kv);
  params.copy16 = params.pool.page_bytes % 16 == 0 && K_ROW_BYTES % 16 == 0 &&
                  V_ROW_BYTES % 16 == 0 && reinterpret_cast<uintptr_t>(buffer.data_ptr()) % 16 == 0;
  params.req_to_token = static_cast<const int*>(req_to_token.data_ptr());
  params.req_stride = req_to_token.stride(0);
  params.patterns = static_cast<const __half*>(patterns.data_ptr());
  params.channel_scale = static_cast<const __half*>(channel_scale.data_ptr());
  params.num_patterns = num_patterns;
  params.rows = static_cast<const int*>(rows.data_ptr());
  params.reads_new_tokens = !window_k.has_value();
  params.work = parts.list;
  params.state_out = static_cast<float*>(states.data_ptr());
  params.state_sum = reinterpret_cast<float2*>(params.state_out + max_states * h_q * HEAD_DIM);
  params.scale_log2 = static_cast<float>(sm_scale * M_LOG2E);
  params.cap_log2 = static_cast<float>(logit_cap * M_LOG2E);
  params.h_q = h_q;
  params.group = group;
  params.group_inverse = (65536 + group - 1) / group;
  // The narrow kernel first: what it leaves idle the wide one fills.
  launch(config.narrow.kernel, dim3(config.narrow.blocks), kThreads, config.narrow.bytes, stream,
         config.dependent_launch, params);
  // The planner gives shared segments to one of these.
  for (const AttendLaunch* attend : {&config.shared(b * group), &config.larger(b * group)}) {
    if (attend->rows == 0) continue;
    launch(attend->kernel, dim3(attend->blocks), attend->threads, attend->bytes, stream,
           config.dependent_launch, params);
  }

  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(q.dtype(), T, [&] {
    merge::MergeParams<T> merged = {};
    merged.q = static_cast<const T*>(q.data_ptr());
    merged.q_stride = params.q_stride;
    merged.work = params.work;
    merged.state_out = params.state_out;
    merged.state_sum = params.state_sum;
    merged.out = static_cast<T*>(out.data_ptr());
    merged.lse = static_cast<float*>(lse.data_ptr());
    if (window_k.has_value()) {
      merged.window_k = static_cast<const T*>(window_k.value().data_ptr());
      merged.window_v = static_cast<const T*>(window_v.value().data_ptr());
      merged.ring = static_cast<const int64_t*>(ring.value().data_ptr());
      merged.start = static_cast<const int64_t*>(start.value().data_ptr());
      merged.end = static_cast<const int64_t*>(end.value().data_ptr());
      merged.new_k = static_cast<const T*>(new_k.value().data_ptr());
      merged.new_v = static_cast<const T*>(new_v.value().data_ptr());
      merged.new_k_stride = new_k.value().stride(0);
      merged.new_v_stride = new_v.value().stride(0);
      merged.window = window_k.value().size(1);
    }
    merged.h_kv = h_kv;
    merged.group = group;
    merged.scale_log2 = params.scale_log2;
    merged.cap_log2 = params.cap_log2;
    merge::choose_merge<T>(
        b, h_kv, group, merged.window > 0, config.sms, [&](auto kernel, dim3 grid, int threads) {
          launch(kernel, grid, threads, 0, stream, config.dependent_launch, merged);
        });
    return true;
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(limits, limits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, plan_work);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, decode_layer);

}  // namespace patternkv
