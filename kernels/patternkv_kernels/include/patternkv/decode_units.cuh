// What the attention kernels share besides tiles: their loop over work, soft caps and fixed-point
// probabilities.
#pragma once

#include "patternkv/decode_params.cuh"
#include "patternkv/ptx.cuh"

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

// A grid whose blocks come here last ends after the one before it, so what waits for this grid
// waits for both, and a wait for the last kernel of a chain is one for all of them. The last block
// alone does so, which is the first to have no work: to the others, even a wait for what has long
// ended costs time, and they leave their multiprocessors to the next kernel.
__device__ __forceinline__ void end_after_previous_kernel() {
  if (blockIdx.x == gridDim.x - 1) wait_for_previous_kernel();
}

// The units of a launch, an item and a KV head each, that a block works through. The first item is
// asked for before it is known whether there is one, so that the answer costs no time. Units that
// no block starts with go to those that are done first.
class Units {
 public:
  WorkItem item;

  // `next` is in shared memory. Who takes units again has it begin with the block's first one.
  __device__ __forceinline__ Units(WorkQueue queue, int h_kv, int& next)
      : item(load(queue.items + blockIdx.x / h_kv)),
        queue_(queue),
        h_kv_(h_kv),
        unit_(blockIdx.x),
        num_units_(*queue.num_items * h_kv),
        next_(next) {}

  __device__ __forceinline__ bool any() const { return unit_ < num_units_; }
  __device__ __forceinline__ int head() const { return unit_ % h_kv_; }
  // By all threads: asks for the next unit, which is known behind a barrier.
  __device__ __forceinline__ void claim() {
    if (threadIdx.x == 0 && more()) next_ = gridDim.x + atomicAdd(queue_.taken, 1);
  }
  // Behind that barrier; one must follow before the next claim. `again`: without a claim, to the
  // same unit.
  __device__ __forceinline__ void advance(bool again = false) {
    unit_ = more() || again ? next_ : num_units_;
    if (any()) item = load(queue_.items + unit_ / h_kv_);
  }

 private:
  WorkQueue queue_;
  int h_kv_, unit_, num_units_;
  int& next_;

  static __device__ __forceinline__ WorkItem load(const WorkItem* at) {
    const auto* parts = reinterpret_cast<const uint4*>(at);
    const uint4 words[] = {load_now(parts), load_now(parts + 1)};
    static_assert(sizeof(words) == sizeof(WorkItem));
    return reinterpret_cast<const WorkItem&>(words);
  }
  // Whether there are units that no block starts with.
  __device__ __forceinline__ bool more() const { return num_units_ > static_cast<int>(gridDim.x); }
};

// `attend(item, head)` of every unit by whole blocks, whose threads may come here from several
// places. A unit of which `again()`, between two barriers, is true for all threads is taken once
// more.
template <typename AttendUnit, typename Again>
__device__ __forceinline__ void for_each_unit(WorkQueue queue, int h_kv, int& next,
                                              AttendUnit attend, Again again) {
  for (Units units(queue, h_kv, next); units.any();) {
    attend(units.item, units.head());
    __syncthreads();
    const bool same = again();
    if (!same) units.claim();
    __syncthreads();
    units.advance(same);
  }
}

template <typename AttendUnit>
__device__ __forceinline__ void for_each_unit(WorkQueue queue, int h_kv, int& next,
                                              AttendUnit attend) {
  for_each_unit(queue, h_kv, next, attend, [] { return false; });
}

}  // namespace patternkv
