// Launcher of rotate.
#include "patternkv/launch.cuh"
#include "patternkv/rotate.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {
namespace {

rotate::Heads heads(const TensorView& x) {
  check_vectors(x);
  return {x.data_ptr(), x.stride(0), x.stride(1), static_cast<int>(x.size(1))};
}

}  // namespace

// Shapes and dtypes are the caller's to check; factors and out are contiguous.
void rotate_heads(TensorView q, TensorView k, TensorView factors, TensorView out) {
  for (const TensorView* x : {&k, &factors, &out}) {
    check_same_device(*x, q, "an argument of rotate", "the queries");
  }
  ffi::CUDADeviceGuard guard(q.device().device_id);
  rotate::RotateParams params = {};
  params.q = heads(q);
  params.k = heads(k);
  params.factors = factors.data_ptr();
  params.out = out.data_ptr();
  params.n = q.size(0);
  if (params.n == 0) return;
  const int64_t count = out.numel() / rotate::kChannels;
  const auto blocks = static_cast<unsigned>((count + rotate::kThreads - 1) / rotate::kThreads);
  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(q.dtype(), T, [&] {
    rotate::rotate_kernel<T><<<blocks, rotate::kThreads, 0, get_stream(q.device())>>>(params);
    return true;
  });
  check(cudaGetLastError(), "launch of rotate");
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate, rotate_heads);

}  // namespace patternkv
