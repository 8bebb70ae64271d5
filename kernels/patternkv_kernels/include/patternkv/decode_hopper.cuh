// Attention of up to 32 query rows over a chunk of tokens with the asynchronous matrix products of
// compute capability 9.0. A block is one warpgroup. Codes are the register operand of both
// products, tokens on M for q.k and head dims on M for p.v, and are never dequantized: a mask makes
// them fp16 subnormals, and scales and centres act on logits, probabilities and sums. The
// probabilities of a pattern's tokens are summed by a product too, with a one-hot operand.
#pragma once

#include "patternkv/hopper_state.cuh"
#include "patternkv/hopper_tiles.cuh"

namespace patternkv {
namespace hopper {

template <int kRows, int kPatterns>
__device__ void attend(const DecodeParams& p, const WorkItem& item, int head, uint8_t* bytes) {
  head = uniform(head);
  // Sizes of items share no addresses, which would outlive the registers.
  const int thread = opaque(threadIdx.x);
  using Memory = hopper::Memory<kRows, kPatterns>;
  auto& memory = *reinterpret_cast<Memory*>(bytes);
  Feed<Memory> feed(p, item, head, thread, memory);
  // What takes two look-ups first.
  const AskedQueries<Memory> queries(p, item, head, thread);
  feed.look_up();
  const KeyPatterns patterns(p, item, head, 0, thread);
  queries.issue(p, head, thread, memory);
  feed.start();
  const QueryScales scales = load_queries(p, queries, thread, memory);
  fill_table(patterns, 0, thread, memory, scales.table);
#pragma unroll
  for (int k = 1; k < Memory::kGroups; ++k) {
    fill_table(KeyPatterns(p, item, head, k, thread), k, thread, memory, scales.table);
  }
  feed.begin(scales.codes);  // a barrier: tile 0, queries and table are there

  Attention<kRows, kPatterns> attention(memory, thread, p.cap_log2);
  for (int n = 0; n < feed.count(); ++n) {
    const int stage = n % kStages;
    float x[kRows / 2];
    attention.multiply_keys(x, stage);
    const Token tokens[2] = {memory.tokens[stage][attention.warp * 16 + attention.g],
                             memory.tokens[stage][attention.warp * 16 + attention.g + 8]};
    attention.finish();
    settle(x);
    attention.add_table(x, tokens, feed.last + 1 - n * kTile);
    float peak = x[0];
#pragma unroll
    for (int i = 1; i < kRows / 2; ++i) peak = fmaxf(peak, x[i]);
    bool beyond = n == 0 || __any_sync(~0u, peak > kLimit);
    feed.receive(n);
    while (true) {
      if (!beyond) attention.weigh(x, tokens, n % 2);
      if (!__syncthreads_or(beyond)) break;
      if (!beyond) attention.unweigh(x, tokens);
      attention.raise(x, n == 0);
      beyond = false;
    }
    feed.ask(n);
    attention.multiply_values(stage, n % 2);
    attention.finish();
  }
  cp_async_wait<0>();
  __syncthreads();
  attention.store(p, item, head, feed.value_scale);
}

constexpr int kBlocks = 3;  // of a multiprocessor, for which registers are shared out

// Work items of up to kRows query rows, tables of up to kPatterns patterns. A kernel per number of
// rows: in one kernel they would share registers out badly.
template <int kRows, int kPatterns>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  launch_dependents();
  uint8_t* aligned = memory + (kAlign - shared_address(memory) % kAlign) % kAlign;
  __shared__ int next_unit;
  for_each_unit(p.work.wide(), p.pool.h_kv, next_unit, [&](const WorkItem& item, int head) {
    attend<kRows, kPatterns>(p, item, head, aligned);
  });
  end_after_previous_kernel();
}

}  // namespace hopper
}  // namespace patternkv
