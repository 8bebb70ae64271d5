// Launcher of the store.
#include <algorithm>
#include <climits>

#include "patternkv/launch.cuh"
#include "patternkv/store.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {
namespace {

using store::kFewWarps, store::kFewerWarps;

// Tokens of a block where warps have tokens of their own, if `blocks` of them share `n`.
int tokens_per_block(int n, int blocks) {
  constexpr int kUnit = store::kGroups * kTileTokens;
  const int shares = std::max(blocks, 1);
  return ((n + shares - 1) / shares + kUnit - 1) / kUnit * kUnit;
}

template <typename T>
void launch(const StoreParams& params, int device, cudaStream_t stream) {
  const int sides = 2 * params.pool.h_kv;
  const int tiles = (params.n + kTileTokens - 1) / kTileTokens;
  const int resident = resident_blocks<store::store_many<T>, 32 * store::kManyWarps>(device);
  const int few = resident_blocks<store::store_few<T, kFewWarps>, 32 * kFewWarps>(device);
  // As long as blocks take turns no more than three times, and smaller ones than these no more than
  // twice; beyond that it pays to share a table's set-up.
  if (int64_t{tiles} * sides <= 3 * few) {
    store::store_few<T, kFewWarps><<<dim3(tiles, sides), 32 * kFewWarps, 0, stream>>>(params);
  } else if (int64_t{tiles} * sides <= 2 * resident) {
    store::store_few<T, kFewerWarps><<<dim3(tiles, sides), 32 * kFewerWarps, 0, stream>>>(params);
  } else {
    const int tokens = tokens_per_block(params.n, resident / sides);
    const dim3 grid((params.n + tokens - 1) / tokens, sides);
    store::store_many<T><<<grid, 32 * store::kManyWarps, 0, stream>>>(params, tokens);
  }
  check(cudaGetLastError(), "launch of the store");
}

template <typename T>
void launch(const StoreParams& params, const StoreLayer* layers, int num_layers, int device,
            cudaStream_t stream) {
  const int sides = 2 * params.pool.h_kv;
  const int resident = resident_blocks<store::store_windows<T>, 32 * store::kManyWarps>(device);
  const int tokens = tokens_per_block(params.n, resident / (sides * num_layers));
  const dim3 grid((params.n + tokens - 1) / tokens, sides, num_layers);
  store::store_windows<T><<<grid, 32 * store::kManyWarps, 0, stream>>>(params, layers, tokens);
  check(cudaGetLastError(), "launch of the store of windows");
}

Vectors vectors(const TensorView& x) {
  check_vectors(x);
  TVM_FFI_ICHECK(x.stride(0) <= INT_MAX && x.stride(1) <= INT_MAX) << "strides beyond 2^31";
  return {x.data_ptr(), static_cast<int>(x.stride(0)), static_cast<int>(x.stride(1))};
}

Indices indices(const TensorView& x) {
  return {x.data_ptr(), encode_dlpack_dtype(x.dtype()) == int64_code};
}

}  // namespace

// Shapes are the caller's to check; k and v are [n, h_kv, HEAD_DIM] with contiguous, 16-byte
// aligned vectors. The window is all there or not at all.
void store_kv(TensorView buffer, int64_t page_size, TensorView slots, TensorView k, TensorView v,
              TensorView patterns, TensorView channel_scale, TensorView channel_weight,
              TensorView table_ids, ffi::Optional<TensorView> window_k,
              ffi::Optional<TensorView> window_v, ffi::Optional<TensorView> window_rows) {
  CHECK_INPUT_AND_TYPE(table_ids, dl_int32);
  for (const TensorView* x : {&slots, &k, &v, &patterns, &table_ids}) {
    check_same_device(*x, buffer, "an argument of the store", "the buffer");
  }
  const int device = k.device().device_id;
  ffi::CUDADeviceGuard guard(device);
  StoreParams params = {};
  params.pool = SlotPool::make(buffer.data_ptr(), page_size, k.size(1));
  params.k = vectors(k);
  params.v = vectors(v);
  params.slots = indices(slots);
  if (window_rows.has_value()) {
    params.window_k = window_k.value().data_ptr();
    params.window_v = window_v.value().data_ptr();
    params.window_rows = indices(window_rows.value());
    for (const void* window : {params.window_k, params.window_v}) {
      TVM_FFI_ICHECK(reinterpret_cast<uintptr_t>(window) % 16 == 0)
          << "windows must be 16-byte aligned";
    }
  }
  params.table_ids = static_cast<const int*>(table_ids.data_ptr());
  params.patterns = static_cast<const __half*>(patterns.data_ptr());
  params.channel_scale = static_cast<const __half*>(channel_scale.data_ptr());
  params.channel_weight = static_cast<const __half*>(channel_weight.data_ptr());
  params.n = k.size(0);
  params.num_patterns = patterns.size(3);
  if (params.n == 0) return;
  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(k.dtype(), T, [&] {
    launch<T>(params, device, get_stream(k.device()));
    return true;
  });
}

// Tokens at rows `index` of the windows [rows, h_kv, HEAD_DIM] of all layers, each of which is a
// row of addresses in `layers`, int64 [num_layers, 6]: see StoreLayer. Windows are bfloat16, or
// float16.
void store_windows(TensorView layers, int64_t page_size, int64_t h_kv, int64_t num_patterns,
                   bool is_bf16, TensorView slots, TensorView index, TensorView table_ids) {
  CHECK_INPUT_AND_TYPE(layers, dl_int64);
  CHECK_INPUT_AND_TYPE(table_ids, dl_int32);
  TVM_FFI_ICHECK(layers.size(1) * sizeof(int64_t) == sizeof(StoreLayer)) << "addresses of a layer";
  for (const TensorView* x : {&slots, &index, &table_ids}) {
    check_same_device(*x, layers, "an argument of the store", "the layers");
  }
  const int device = layers.device().device_id;
  ffi::CUDADeviceGuard guard(device);
  StoreParams params = {};
  params.pool = SlotPool::make(nullptr, page_size, h_kv);
  params.k = params.v = {nullptr, static_cast<int>(h_kv * HEAD_DIM), HEAD_DIM};
  params.vectors = indices(index);
  params.slots = indices(slots);
  params.table_ids = static_cast<const int*>(table_ids.data_ptr());
  params.n = slots.size(0);
  params.num_patterns = num_patterns;
  if (params.n == 0) return;
  const auto* of_layers = static_cast<const StoreLayer*>(layers.data_ptr());
  const int num_layers = layers.size(0);
  const cudaStream_t stream = get_stream(layers.device());
  if (is_bf16) {
    launch<__nv_bfloat16>(params, of_layers, num_layers, device, stream);
  } else {
    launch<__half>(params, of_layers, num_layers, device, stream);
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(store_kv, store_kv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(store_windows, store_windows);

}  // namespace patternkv
