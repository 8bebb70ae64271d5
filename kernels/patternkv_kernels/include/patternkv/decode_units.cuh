// What the attention kernels share besides tiles: their loop over work, soft caps and fixed-point
// probabilities.
#pragma once

#include "patternkv/decode_params.cuh"

namespace patternkv {

// tanh soft cap of a logit in log2 units (SGLang: cap * tanh(logit / cap)).
__device__ __forceinline__ float soft_cap(float x, float cap) {
  const float e = exp2_approx(x / cap * 2.885390081777927f);  // 2 log2(e)
  return cap * (1.0f - 2.0f / (1.0f + e));
}

// Fixed-point probabilities of a chunk: `fraction` bits behind the point, so that the sum of
// `tokens` of them, each at most 2^kSlack, fits 32 bits.
struct FixedPoint {
  int fraction;
  float magic;
  uint32_t magic_bits;
  // How far above a row's largest logit its reference goes: as far as rounding stays small, since a
  // later logit above the reference makes the row's sums be rescaled.
  float headroom;

  static __device__ FixedPoint of(int tokens) {
    const int log2_tokens = tokens > 1 ? 32 - __clz(tokens - 1) : 0;
    const int fraction = min(20, 28 - log2_tokens);
    const float magic = __int_as_float((127 + 23 - fraction) << 23);
    return {fraction, magic, __float_as_uint(magic), fmaxf(fraction - 14, 2)};
  }
  // Adding 2^(23 - fraction) leaves the rounded value in the mantissa.
  __device__ uint32_t encode(float p) const { return __float_as_uint(p + magic) - magic_bits; }
  __device__ float unit() const { return __int_as_float((127 - fraction) << 23); }
};

// A grid whose blocks come here last ends after the one before it, and what waits for this grid
// waits for both. The block that is the last to have work does so: to the others, even a wait for what
// has long ended costs time, and they leave their multiprocessors to the next kernel.
__device__ __forceinline__ void end_after_previous_kernel() {
  if (blockIdx.x == gridDim.x - 1) wait_for_previous_kernel();
}

// Works through the units of a launch, an item and a KV head each, block by block: `attend(item,
// head)` by whole blocks, whose threads may come here from several places. The first item is asked
// for before it is known whether there is one, so that the answer costs no time. Units that no block
// starts with go to those that are done first. `next` is in shared memory.
template <typename AttendUnit>
__device__ __forceinline__ void for_each_unit(WorkQueue queue, int h_kv, int& next,
                                              AttendUnit attend) {
  int unit = blockIdx.x;
  WorkItem item = queue.items[unit / h_kv];
  const int num_units = queue.sign * *queue.num_items * h_kv;
  while (unit < num_units) {
    attend(item, unit % h_kv);
    if (num_units <= static_cast<int>(gridDim.x)) return;
    __syncthreads();
    if (threadIdx.x == 0) next = gridDim.x + atomicAdd(queue.taken, 1);
    __syncthreads();
    unit = next;
    if (unit < num_units) item = queue.items[unit / h_kv];
  }
}

}  // namespace patternkv
