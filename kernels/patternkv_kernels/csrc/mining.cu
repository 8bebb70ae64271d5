// Launcher of mining.
#include "patternkv/launch.cuh"
#include "patternkv/mining.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {
namespace {

using mining::MiningParams;
using OptionalTensor = ffi::Optional<TensorView>;

mining::Vectors vectors(const TensorView& x) {
  check_vectors(x);
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

__half* halves(const TensorView& x) { return static_cast<__half*>(x.data_ptr()); }

// All steps in one launch, of as many blocks as run at once.
void launch(const MiningParams& params, int device, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  constexpr int kBytes = sizeof(mining::Shared);
  const int blocks = resident_blocks<mining::mine_kernel, mining::kThreads, kBytes>(device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(mining::kRanks, std::min(params.problems, blocks / mining::kRanks));
  config.blockDim = dim3(mining::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaMemsetAsync(params.arrived, 0, params.problems * mining::kCounterWords * 4, stream),
        "launch of mining");
  check(cudaLaunchKernelEx(&config, mining::mine_kernel, params, 0, mining::num_steps(params)),
        "launch of mining");
}

}  // namespace

// Bytes of scratch memory that mine() takes for `problems` heads of `rows` tokens each.
int64_t scratch_bytes(int64_t problems, int64_t rows, int64_t num_patterns, int64_t num_sinks,
                      int64_t max_sample) {
  MiningParams params = {};
  params.num_patterns = num_patterns;
  params.count(rows, num_sinks, max_sample);
  return problems * (mining::kCounterWords * 4 +
                     mining::scratch_bytes(params.sinks + params.n, params.num_centres, params.n));
}

// Shapes are the caller's to check; k, v and q are [n, heads, HEAD_DIM] with contiguous, 16-byte
// aligned vectors, the results contiguous; V and its results are all there or not at all.
void mine(TensorView k, OptionalTensor v, OptionalTensor q, OptionalTensor weight,
          TensorView k_patterns, TensorView k_scale, OptionalTensor k_weight,
          OptionalTensor v_patterns, OptionalTensor v_scale, OptionalTensor v_weight,
          TensorView scratch, int64_t num_sinks, int64_t max_sample, int64_t iterations) {
  const int device = k.device().device_id;
  ffi::CUDADeviceGuard guard(device);
  MiningParams params = {};
  params.x[0] = vectors(k);
  params.patterns[0] = halves(k_patterns);
  params.channel_scale[0] = halves(k_scale);
  if (k_weight.has_value()) params.channel_weight[0] = halves(k_weight.value());
  if (v.has_value()) {
    params.x[1] = vectors(v.value());
    params.patterns[1] = halves(v_patterns.value());
    params.channel_scale[1] = halves(v_scale.value());
    if (v_weight.has_value()) params.channel_weight[1] = halves(v_weight.value());
  }
  if (q.has_value()) {
    params.q = vectors(q.value());
    params.count_queries(q.value().size(0), q.value().size(1) / k.size(1));
  }
  if (weight.has_value()) params.weight = halves(weight.value());
  params.problems = k.size(1) * (v.has_value() ? 2 : 1);
  params.arrived = static_cast<uint32_t*>(scratch.data_ptr());
  params.scratch =
      reinterpret_cast<uint8_t*>(params.arrived + params.problems * mining::kCounterWords);
  params.is_bf16 = encode_dlpack_dtype(k.dtype()) == bfloat16_code;
  params.h = k.size(1);
  params.num_patterns = k_patterns.size(1);
  params.iterations = iterations;
  params.count(k.size(0), num_sinks, max_sample);
  launch(params, device, get_stream(k.device()));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mine, mine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scratch_bytes, scratch_bytes);

}  // namespace patternkv
