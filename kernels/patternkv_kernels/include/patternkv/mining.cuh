// Mining: patterns, channel scales and channel weights of K and V from a segment's tokens. See
// mining_reference.py for what is computed; clusters see tokens as fp16, weighted.
//
// All sums have a fixed order, and those of a problem do not depend on other problems.
#pragma once

#include "patternkv/mining_assign.cuh"
#include "patternkv/mining_move.cuh"

namespace patternkv::mining {

constexpr float kChannelScaleFloor = 0x1p-6f;  // smallest, relative to the mean square root
constexpr float kPriorTokens = 16.0f;    // weight of the plain spread next to that of the residuals
constexpr float kNoSpread = 0x1p-20f;    // added to relative spreads: negligible beside any but 0
constexpr float kWeightFloor = 0x1p-4f;  // smallest channel weight, relative to their mean
constexpr int kMostBytes = 272;          // of a thread's vectors that are loaded together

struct alignas(16) GatherShared {
  float of_lanes[kLanes][HEAD_DIM];
};

union Shared {
  GatherShared gather;
  AssignShared assign;
  MoveShared move;
};
static_assert(sizeof(Shared) + sizeof(Channels) <= 99 << 10, "what any device has for a block");

__device__ __forceinline__ uint4 load_chunk(const Vectors& vectors, int token, int head,
                                            int chunk) {
  const auto* data = static_cast<const uint16_t*>(vectors.data);
  const auto* vector = data + token * vectors.token_stride + head * vectors.head_stride;
  return reinterpret_cast<const uint4*>(vector)[chunk];
}

// Eight values of the input as floats.
template <bool kBf16>
__device__ __forceinline__ Eight widened(uint4 chunk) {
  Eight x(chunk);
  if (kBf16) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x.x[2 * j] = __int_as_float(words[j] << 16);
      x.x[2 * j + 1] = __int_as_float(words[j] & 0xffff0000);
    }
  }
  return x;
}

// In float16, NaN as 0, clamped.
template <bool kBf16>
__device__ __forceinline__ uint4 sanitized(uint4 chunk) {
  Eight x = widened<kBf16>(chunk);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    x.x[j] = isnan(x.x[j]) ? 0.0f : fminf(fmaxf(x.x[j], -kFloat16Max), kFloat16Max);
  }
  return x.halves();
}

// Folds what the threads of a chunk have into the rank's partial result of a channel.
template <typename Combine>
__device__ __forceinline__ void write_partial(GatherShared& shared, const Problem& problem,
                                              Partial kind, const float (&own)[8],
                                              Combine combine) {
  const int lane = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  __syncthreads();
  if (lane < kLanes) {
    auto* out = reinterpret_cast<float4*>(&shared.of_lanes[lane][8 * chunk]);
    out[0] = {own[0], own[1], own[2], own[3]}, out[1] = {own[4], own[5], own[6], own[7]};
  }
  __syncthreads();
  if (threadIdx.x < HEAD_DIM) {
    float value = shared.of_lanes[0][threadIdx.x];
#pragma unroll 8
    for (int i = 1; i < kLanes; ++i) value = combine(value, shared.of_lanes[i][threadIdx.x]);
    problem.partial(problem.rank, kind)[threadIdx.x] = value;
  }
}

// The rank's share of the rows: `take(item, loaded)` of what `load(item)` reads of every item of
// [first, last), by the thread's lane.
template <typename Load, typename Take>
__device__ __forceinline__ void for_each(int first, int last, Load load, Take take) {
  using Loaded = decltype(load(0));
  // The rank's tokens and its share of the sinks.
  constexpr int kAll = kRankTokens / kLanes + 1, kMost = kMostBytes / sizeof(Loaded);
  constexpr int kBatch = kAll < kMost ? kAll : kMost;
  const int lane = threadIdx.x / kChunks;
  if (lane >= kLanes) return;
  for (int item = first + lane; item < last; item += kBatch * kLanes) {
    Loaded loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) loaded[i] = load(min(item + i * kLanes, last - 1));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (item + i * kLanes < last) take(item + i * kLanes, loaded[i]);
    }
  }
}

// Sinks and sampled tokens to scratch memory, and what channels are like: the spread of tokens
// (around the first of them, so that what is constant has none), the largest component, and of K
// the squares of its queries.
template <bool kBf16>
__device__ __forceinline__ void gather_step(GatherShared& shared, const MiningParams& p,
                                            const Problem& problem) {
  const int chunk = threadIdx.x % kChunks;
  const Vectors& x = p.x[problem.side];
  const int rows = p.sinks + p.n, share = (rows + kRanks - 1) / kRanks;
  const int first = min(problem.rank * share, rows), last = min(first + share, rows);
  const auto load = [&](int row) {
    const int at = row < p.sinks ? row : p.sinks + p.tokens(row - p.sinks);
    return load_chunk(x, at, problem.head, chunk);
  };
  // Of every thread, though some have no lane.
  const Eight origin(sanitized<kBf16>(load(min(p.sinks, rows - 1))));
  float largest[8] = {}, sum[8] = {}, squares[8] = {};
  for_each(first, last, load, [&](int row, uint4 loaded) {
    const uint4 clean = sanitized<kBf16>(loaded);
    reinterpret_cast<uint4*>(problem.rows + int64_t{row} * HEAD_DIM)[chunk] = clean;
    const Eight value(clean);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      largest[j] = fmaxf(largest[j], fabsf(value.x[j]));
      if (row < p.sinks) continue;
      const float apart = __fsub_rn(value.x[j], origin.x[j]);
      sum[j] = __fadd_rn(sum[j], apart);
      squares[j] = __fmaf_rn(apart, apart, squares[j]);
    }
  });
  write_partial(shared, problem, kLargest, largest, Max());
  write_partial(shared, problem, kSum, sum, Add());
  write_partial(shared, problem, kSquares, squares, Add());
  if (problem.side != 0 || p.q.data == nullptr) return;

  const int query_share = (p.num_queries + kRanks - 1) / kRanks;
  const int first_query = min(problem.rank * query_share, p.num_queries);
  const int last_query = min(first_query + query_share, p.num_queries);
  float query_squares[8] = {};
  for (int head = problem.head * p.group; head < (problem.head + 1) * p.group; ++head) {
    for_each(
        first_query, last_query,
        [&](int query) { return load_chunk(p.q, p.queries(query), head, chunk); },
        [&](int, uint4 loaded) {
          const Eight query = widened<kBf16>(loaded);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            query_squares[j] = __fmaf_rn(query.x[j], query.x[j], query_squares[j]);
          }
        });
  }
  write_partial(shared, problem, kQuerySquares, query_squares, Add());
}

// The channels' weights: those of K by the root mean square of its queries, relative to the mean
// over channels.
__device__ __forceinline__ void fill_channels(Channels& channels, const MiningParams& p,
                                              const Problem& problem) {
  const int channel = threadIdx.x;
  const bool own = channel < HEAD_DIM;
  float largest = own ? problem.combined(kLargest, channel, Max()) : 0.0f;
  float weight = 1.0f;
  if (problem.side == 0 && p.q.data != nullptr) {
    const float squares = own ? problem.combined(kQuerySquares, channel, Add()) : 0.0f;
    const float norm = __fsqrt_rn(squares);
    const float mean = block_reduce(norm, channels.reduced, Add()) / HEAD_DIM;
    weight = __fdiv_rn(norm, mean);
    weight = isnan(weight) ? 1.0f : fminf(fmaxf(weight, kWeightFloor), kFloat16Max);
    weight = __half2float(__float2half_rn(weight));
  } else if (problem.side == 0 && p.weight != nullptr && own) {
    weight = __half2float(p.weight[problem.head * HEAD_DIM + channel]);
  }
  largest = block_reduce(weight * largest, channels.reduced, Max());
  if (own) {
    channels.weight[channel] = weight;
    channels.unit[channel] = weight * power_of_two_scale(largest, 14);
  }
  __syncthreads();
}

// Squares of what the patterns leave of the rank's tokens, by channel.
__device__ __forceinline__ void write_residuals(GatherShared& shared, const MiningParams& p,
                                                const Problem& problem) {
  const int chunk = threadIdx.x % kChunks;
  const auto* rows = reinterpret_cast<const uint4*>(problem.rows) + p.sinks * kChunks + chunk;
  const auto* patterns = reinterpret_cast<const uint4*>(p.patterns[problem.side]) +
                         int64_t{problem.head} * p.num_patterns * kChunks + chunk;
  struct Pair {
    uint4 token, pattern;
  };
  float squares[8] = {};
  for_each(
      problem.first, problem.last,
      [&](int token) {
        const int id = load_coherent(problem.ids + token);
        return Pair{load_coherent(rows + int64_t{token} * kChunks),
                    load_coherent(patterns + id * kChunks)};
      },
      [&](int, const Pair& loaded) {
        const Eight x(loaded.token), pattern(loaded.pattern);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float residual = __fsub_rn(x.x[j], pattern.x[j]);
          squares[j] = __fmaf_rn(residual, residual, squares[j]);
        }
      });
  write_partial(shared, problem, kResiduals, squares, Add());
}

// Over the root mean square of all channels; 0 where all are 0.
__device__ __forceinline__ float relative(Channels& channels, float x) {
  const float mean = block_reduce(__fmul_rn(x, x), channels.reduced, Add()) / HEAD_DIM;
  return __fdiv_rn(x, __fsqrt_rn(__fadd_rn(mean, 1e-30f)));
}

// The channel scales by one block: the spread of the residuals, and where these are few that of the
// tokens too.
__device__ __forceinline__ void finish_step(Channels& channels, const MiningParams& p,
                                            const Problem& problem) {
  if (problem.rank != 0) return;
  const int channel = threadIdx.x;
  const bool own = channel < HEAD_DIM;
  float residual = 0.0f, spread = 0.0f;
  if (own && p.free_tokens() > 0) {
    residual = __fsqrt_rn(problem.combined(kResiduals, channel, Add()));
  }
  if (own && p.n > 0) {
    const float count = static_cast<float>(p.n);
    const float mean = __fdiv_rn(problem.combined(kSum, channel, Add()), count);
    const float squares = __fdiv_rn(problem.combined(kSquares, channel, Add()), count);
    spread = __fsqrt_rn(fmaxf(__fsub_rn(squares, __fmul_rn(mean, mean)), 0.0f));
  }
  residual = relative(channels, residual);
  spread = relative(channels, spread);
  const float share = static_cast<float>(p.free_tokens()) / kPriorTokens;
  const float both = __fsqrt_rn(__fmaf_rn(share * residual, residual, __fmul_rn(spread, spread)));
  const float scale = relative(channels, own ? both + kNoSpread : 0.0f);
  if (!own) return;
  const int at = problem.head * HEAD_DIM + channel;
  p.channel_scale[problem.side][at] = __float2half_rn(fmaxf(scale, kChannelScaleFloor));
  if (p.channel_weight[problem.side] != nullptr) {
    p.channel_weight[problem.side][at] = __float2half_rn(channels.weight[channel]);
  }
}

// Steps [first, last) of all problems, of which a row of kRanks blocks has every gridDim.y-th: several
// steps need all blocks of a row to run at once. Dynamic shared memory: Shared.
__global__ void __launch_bounds__(kThreads, 1)
    mine_kernel(const __grid_constant__ MiningParams p, int first, int last) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  __shared__ Channels channels;
  for (int at = blockIdx.y; at < p.problems; at += gridDim.y) {
    const Problem problem(p, at);
    for (int index = first; index < last; ++index) {
      if (index > first) {
        blocks_barrier(p.arrived + at * kCounterWords, kRanks, index - first);
      }
      if (index == max(first, 1)) fill_channels(channels, p, problem);
      const Step step = step_at(p, index);
      switch (step.work) {
        case Work::kGather:
          if (p.is_bf16) {
            gather_step<true>(shared.gather, p, problem);
          } else {
            gather_step<false>(shared.gather, p, problem);
          }
          break;
        case Work::kMove:
          move_step(shared.move, p, problem, channels, step);
          break;
        case Work::kCopy:
          copy_step(p, problem);
          break;
        case Work::kFinish:
          finish_step(channels, p, problem);
          break;
        default:
          if (step.work == Work::kResiduals && p.free_tokens() == 0) break;
          assign_step(shared.assign, p, problem, channels, step);
          if (step.work == Work::kResiduals) write_residuals(shared.gather, p, problem);
      }
    }
  }
}

}  // namespace patternkv::mining
