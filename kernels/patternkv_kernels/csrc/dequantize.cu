// Launcher of dequantize.
#include <algorithm>

#include "patternkv/dequantize.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {
namespace {

// Blocks that run at once on the current device.
template <typename T>
int resident_blocks(int device) {
  constexpr int kMaxDevices = 64;
  static thread_local int blocks[kMaxDevices];
  TVM_FFI_ICHECK(device >= 0 && device < kMaxDevices) << "device " << device;
  if (blocks[device] == 0) {
    int per_sm = 0, sms = 0;
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, dequantize::dequantize_kernel<T>,
                                                  dequantize::kThreads, 0);
    blocks[device] = std::max(per_sm, 1) * std::max(sms, 1);
  }
  return blocks[device];
}

}  // namespace

// Shapes are the caller's to check; k and v are contiguous [n, h_kv, HEAD_DIM].
void dequantize_kv(TensorView buffer, int64_t page_size, TensorView slots, TensorView patterns,
                   TensorView channel_scale, TensorView table_ids, TensorView k, TensorView v) {
  CHECK_INPUT_TYPE(table_ids, dl_int32);
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
    const int blocks = std::clamp(resident_blocks<T>(device) / h_kv, 1, runs);
    dequantize::dequantize_kernel<T>
        <<<dim3(h_kv, blocks), dequantize::kThreads, 0, get_stream(k.device())>>>(params);
    return true;
  });
  const cudaError_t error = cudaGetLastError();
  TVM_FFI_ICHECK(error == cudaSuccess) << "launch of dequantize: " << cudaGetErrorString(error);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, dequantize_kv);

}  // namespace patternkv
