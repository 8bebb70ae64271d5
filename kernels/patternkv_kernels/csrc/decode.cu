// Launchers of tree decode: the planner once per step, attention and merge once per layer.
#include <algorithm>
#include <cmath>

#include "patternkv/decode_launch.cuh"
#include "patternkv/decode_merge.cuh"
#include "patternkv/decode_plan.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {
namespace {

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

// Writes the work list of one step into `work`; capacities as the caller allocated them. With
// `sources` also the segments' slots into `slots`: see plan::SlotList.
void plan_work(TensorView segments, TensorView row_indptr, TensorView rows, TensorView work,
               int64_t b, int64_t group, int64_t h_kv, int64_t num_patterns, int64_t max_rows,
               int64_t max_entries, int64_t max_narrow, int64_t max_wide, int64_t max_states,
               ffi::Optional<TensorView> sources, ffi::Optional<TensorView> req_to_token,
               ffi::Optional<TensorView> slots, int64_t num_tokens) {
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
  int64_t blocks = 1;
  if (sources.has_value()) {
    const TensorView source = sources.value(), from = req_to_token.value(), to = slots.value();
    CHECK_INPUT_AND_TYPE(source, dl_int64);
    CHECK_INPUT_AND_TYPE(from, dl_int32);
    CHECK_INPUT_AND_TYPE(to, dl_int32);
    TVM_FFI_ICHECK_LE(num_tokens, to.numel()) << "slots to list";
    params.list = {static_cast<const int*>(from.data_ptr()),
                   static_cast<const int64_t*>(source.data_ptr()), static_cast<int*>(to.data_ptr()),
                   static_cast<int>(num_tokens)};
    const int64_t wanted = (num_tokens + plan::kPlanThreads - 1) / plan::kPlanThreads;
    blocks += std::min<int64_t>(wanted, config.sms);
  }
  launch(plan::plan_kernel, dim3(blocks), plan::kPlanThreads, 0, get_stream(segments.device()),
         false, params);
}

// One layer: `states` is float32 [(max_states + max_rows) * h_q * (d + 2)], the planner's states
// and those of rows' windows.
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
  CHECK_INPUT_AND_TYPE(rows, dl_int32);
  CHECK_INPUT_AND_TYPE(patterns, dl_float16);
  CHECK_INPUT_AND_TYPE(channel_scale, dl_float16);
  CHECK_INPUT_TYPE(req_to_token, dl_int32);
  const int64_t num_states = max_states + max_rows;
  TVM_FFI_ICHECK_GE(states.numel(), num_states * h_q * (HEAD_DIM + 2)) << "states";

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
  params.work = parts.list;
  params.state_out = static_cast<float*>(states.data_ptr());
  params.state_sum = reinterpret_cast<float2*>(params.state_out + num_states * h_q * HEAD_DIM);
  params.scale_log2 = static_cast<float>(sm_scale * M_LOG2E);
  params.cap_log2 = static_cast<float>(logit_cap * M_LOG2E);
  params.h_q = h_q;
  params.group = group;
  params.group_inverse = (65536 + group - 1) / group;

  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(q.dtype(), T, [&] {
    merge::MergeParams<T> merged = {};
    merged.q = static_cast<const T*>(q.data_ptr());
    merged.q_stride = params.q_stride;
    merged.work = params.work;
    merged.state_out = params.state_out;
    merged.state_sum = params.state_sum;
    merged.first_window_state = max_states;
    merged.out = static_cast<T*>(out.data_ptr());
    merged.lse = static_cast<float*>(lse.data_ptr());
    if (window_k.has_value()) {
      for (const auto& positions : {ring, start, end}) {
        CHECK_INPUT_AND_TYPE(positions.value(), dl_int64);
      }
      merged.window = {static_cast<T*>(window_k.value().data_ptr()),
                       static_cast<T*>(window_v.value().data_ptr()),
                       static_cast<const int64_t*>(ring.value().data_ptr()),
                       static_cast<const int64_t*>(start.value().data_ptr()),
                       static_cast<const int64_t*>(end.value().data_ptr()),
                       static_cast<const T*>(new_k.value().data_ptr()),
                       static_cast<const T*>(new_v.value().data_ptr()),
                       new_k.value().stride(0),
                       new_v.value().stride(0),
                       static_cast<int>(window_k.value().size(1))};
    }
    merged.h_kv = h_kv;
    merged.group = group;
    merged.scale_log2 = params.scale_log2;
    merged.cap_log2 = params.cap_log2;
    // The first kernel starts behind what made its queries, each other one beside that before it.
    bool dependent = false;
    const auto launch_next = [&](auto kernel, dim3 grid, int threads, int bytes,
                                 const auto& arguments) {
      launch(kernel, grid, threads, bytes, stream, dependent, arguments);
      dependent = config.dependent_launch;
    };
    const auto launch_merged = [&](auto kernel, dim3 grid, int threads) {
      launch_next(kernel, grid, threads, 0, merged);
    };
    const AttendLaunch &shared = config.shared(b * group), &larger = config.larger(b * group);
    const auto place = merge::place_of_windows(merged.window.size, larger.rows > 0);
    const auto launch_attend = [&](const AttendLaunch& attend) {
      if (attend.rows == 0) return;
      launch_next(attend.kernel, dim3(attend.blocks), attend.threads, attend.bytes, params);
    };
    // The narrow kernel first: what it leaves idle others fill. The planner gives shared segments
    // to one of the last two.
    launch_attend(config.narrow);
    if (place == merge::WindowPlace::kAhead) {
      window::choose_kernel<T>(b, h_kv, group, config.sms, launch_merged);
    }
    launch_attend(shared);
    launch_attend(larger);
    merge::choose_merge<T>(b, h_kv, group, place, config.sms, launch_merged);
    return true;
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(limits, limits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, plan_work);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, decode_layer);

}  // namespace patternkv
