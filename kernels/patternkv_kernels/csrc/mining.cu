// Launcher of mining.
#include "patternkv/launch.cuh"
#include "patternkv/mining.cuh"
#include "tvm_ffi_utils.h"

namespace patternkv {
namespace {

using mining::MiningParams;
using OptionalTensor = ffi::Optional<TensorView>;

void check(cudaError_t error) {
  TVM_FFI_ICHECK(error == cudaSuccess) << "launch of mining: " << cudaGetErrorString(error);
}

mining::Vectors vectors(const TensorView& x) {
  check_vectors(x);
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

__half* halves(const TensorView& x) { return static_cast<__half*>(x.data_ptr()); }

bool has_clusters(int device) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

// All steps in one launch, or one launch for each where there are no clusters.
void launch(const MiningParams& params, int problems, int device, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {mining::kRanks, 1, 1};
  const bool clusters = has_clusters(device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(mining::kRanks, problems);
  config.blockDim = dim3(mining::kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = clusters;
  const int steps = mining::num_steps(params), at_once = clusters ? steps : 1;
  for (int first = 0; first < steps; first += at_once) {
    check(cudaLaunchKernelEx(&config, mining::mine_kernel, params, first, first + at_once));
  }
}

}  // namespace

// Bytes of scratch memory that mine() takes for `problems` heads of `rows` tokens each.
int64_t scratch_bytes(int64_t problems, int64_t rows, int64_t num_patterns, int64_t num_sinks,
                      int64_t max_sample) {
  MiningParams params = {};
  params.num_patterns = num_patterns;
  params.count(rows, num_sinks, max_sample);
  return problems * mining::scratch_bytes(params.sinks + params.n, params.num_centres, params.n);
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
  params.scratch = static_cast<uint8_t*>(scratch.data_ptr());
  params.is_bf16 = encode_dlpack_dtype(k.dtype()) == bfloat16_code;
  params.h = k.size(1);
  params.num_patterns = k_patterns.size(1);
  params.iterations = iterations;
  params.count(k.size(0), num_sinks, max_sample);
  launch(params, params.h * (v.has_value() ? 2 : 1), device, get_stream(k.device()));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mine, mine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scratch_bytes, scratch_bytes);

}  // namespace patternkv
