// Mining on the CPU, a launch for each step (see simt.h).
#include "patternkv/mining.cuh"
#include "simt.h"

namespace patternkv {

// As tests/simt_mining.py passes it; see mine_kv and mine_table for what is what.
struct Arguments {
  const void *k, *v, *q, *weight;
  void *k_patterns, *k_scale, *k_weight, *v_patterns, *v_scale, *v_weight;
  int64_t rows, queries, h, group, num_patterns, num_sinks, max_sample, iterations, bf16;
};

extern "C" void mine(const Arguments* arguments) {
  using namespace mining;
  const Arguments& a = *arguments;
  MiningParams p = {};
  const int64_t stride = a.h * HEAD_DIM;
  p.x[0] = {a.k, stride, HEAD_DIM};
  p.x[1] = {a.v, stride, HEAD_DIM};
  p.q = {a.q, stride * a.group, HEAD_DIM};
  p.weight = static_cast<const __half*>(a.weight);
  void* const outputs[2][3] = {{a.k_patterns, a.k_scale, a.k_weight},
                               {a.v_patterns, a.v_scale, a.v_weight}};
  for (int side = 0; side < 2; ++side) {
    p.patterns[side] = static_cast<__half*>(outputs[side][0]);
    p.channel_scale[side] = static_cast<__half*>(outputs[side][1]);
    p.channel_weight[side] = static_cast<__half*>(outputs[side][2]);
  }
  p.is_bf16 = a.bf16;
  p.h = a.h;
  p.count_queries(a.queries, a.group);
  p.num_patterns = a.num_patterns;
  p.iterations = a.iterations;
  p.count(a.rows, a.num_sinks, a.max_sample);
  p.problems = a.h * (a.v == nullptr ? 1 : 2);
  const int64_t bytes = p.problems * scratch_bytes(p.sinks + p.n, p.num_centres, p.n);
  std::vector<uint4> scratch(bytes / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});  // NaN
  p.scratch = reinterpret_cast<uint8_t*>(scratch.data());
  for (int step = 0; step < num_steps(p); ++step) {
    const SimtIndex grid = {kRanks, static_cast<unsigned>(p.problems), 1};
    simt::launch(grid, kThreads, sizeof(Shared), [&] { mine_kernel(p, step, step + 1); });
  }
}

}  // namespace patternkv
