// Launcher of dequantize.
#include <algorithm>

#include "patternkv/dequantize.cuh"
#include "patternkv/launch.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {

// Shapes are the caller's to check; k and v are contiguous [n, h_kv, HEAD_DIM].
void dequantize_kv(TensorView buffer, int64_t page_size, TensorView slots, TensorView patterns,
                   TensorView channel_scale, TensorView table_ids, TensorView k, TensorView v) {
  CHECK_INPUT_AND_TYPE(table_ids, dl_int32);
  for (const TensorView* x : {&slots, &patterns, &table_ids, &k, &v}) {
    check_same_device(*x, buffer, "an argument of dequantize", "the buffer");
  }
  ffi::CUDADeviceGuard guard(buffer.device().device_id);
  dequantize::DequantizeParams params = {};
  params.pool = SlotPool::make(buffer.data_ptr(), page_size, k.size(1));
  params.slots = slots.data_ptr();
  params.slots_are_int64 = encode_dlpack_dtype(slots.dtype()) == int64_code;
  params.table_ids = static_cast<const int*>(table_ids.data_ptr());
  params.patterns = static_cast<const __half*>(patterns.data_ptr());
  params.channel_scale = static_cast<const __half*>(channel_scale.data_ptr());
  params.x[0] = k.data_ptr();
  params.x[1] = v.data_ptr();
  params.n = k.size(0);
  params.num_patterns = patterns.size(3);
  if (params.n == 0) return;
  const int device = buffer.device().device_id, h_kv = params.pool.h_kv;
  const int runs = (params.n + dequantize::kRunTokens - 1) / dequantize::kRunTokens;
  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP32_FP16(k.dtype(), T, [&] {
    constexpr auto kKernel = dequantize::dequantize_kernel<T>;
    const int resident = resident_blocks<kKernel, dequantize::kThreads>(device);
    const int blocks = std::clamp(resident / h_kv, 1, runs);
    kKernel<<<dim3(h_kv, blocks), dequantize::kThreads, 0, get_stream(k.device())>>>(params);
    return true;
  });
  check(cudaGetLastError(), "launch of dequantize");
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, dequantize_kv);

}  // namespace patternkv
