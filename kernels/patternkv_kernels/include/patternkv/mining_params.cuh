// What mining is called with, the memory that its blocks exchange results in, and the order of its
// steps.
//
// A problem is one head of one side, K or V: `sinks` rows and `n` sampled tokens. Eight blocks, its
// ranks, walk through the steps with a barrier between them. It is one of global memory: a GPU that
// has room for 16 problems, of 8 KV heads, does not always have it for as many clusters of blocks.
#pragma once

#include "patternkv/bits.cuh"
#include "patternkv/blocks.cuh"
#include "patternkv/layout.cuh"

namespace patternkv::mining {

constexpr int kRanks = 8;
constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMaxTokens = 2048;  // besides the sinks
constexpr int kRankTokens = kMaxTokens / kRanks;
constexpr int kMaxPatterns = 256;
constexpr int kCounterWords = 32;  // a cache line for each
constexpr int kOutlierShare = 8;  // one in this many of the centres starts as an outlier token
constexpr int kTailTokens = 64;   // the end of a long segment, its question, is never left out
constexpr int kMaxOutliers = kMaxPatterns / kOutlierShare;
constexpr int kChunks = HEAD_DIM / 8;       // of a vector: 16 bytes
constexpr int kLanes = kThreads / kChunks;  // threads that share a chunk of the vectors
constexpr float kFloat16Max = 65504.0f;

// Vectors in memory, strides in elements; no data: none.
struct Vectors {
  const void* data;
  int64_t token_stride, head_stride;
};

// The last rows of a segment and evenly spaced ones before them: of these, sample i of `count` is
// row floor(i * length / count).
struct Sampling {
  uint64_t inverse;  // ceil(2^42 / count): exact for i * rest below 2^22
  int whole;         // length / count
  uint32_t rest;     // length % count
  int skipped;       // rows that are no samples
  int count;

  // `n` rows of `segment`: all, or fewer and then of the last ones kTailTokens or half of n.
  static Sampling make(int segment, int n) {
    if (n == 0) return {};
    const int tail = segment > n ? min(kTailTokens, n / 2) : 0, count = n - tail;
    const int length = segment - tail;
    return {((uint64_t{1} << 42) + count - 1) / count, length / count,
            static_cast<uint32_t>(length % count), segment - n, count};
  }
  __device__ int operator()(int i) const {
    if (i >= count) return skipped + i;
    return i * whole + static_cast<int>(i * rest * inverse >> 42);
  }
};
static_assert(kMaxTokens <= 1 << 11, "products of sample and rest below 2^22");

// What ranks tell each other, a float per channel each.
enum Partial { kQuerySquares, kLargest, kSum, kSquares, kResiduals, kPartials };

struct MiningParams {
  Vectors x[2];               // K and V, [rows, h, HEAD_DIM]
  Vectors q;                  // [rows, group * h, HEAD_DIM], of K
  const __half* weight;       // [h, HEAD_DIM] of side 0, where there is no q; null: all alike
  __half* patterns[2];        // [h, num_patterns, HEAD_DIM]
  __half* channel_scale[2];   // [h, HEAD_DIM]
  __half* channel_weight[2];  // [h, HEAD_DIM]; null: not asked for
  uint8_t* scratch;           // scratch_bytes() of each problem
  uint32_t* arrived;          // [problems, kCounterWords], 0 at first: the blocks' barriers
  Sampling tokens, queries;   // n tokens behind the sinks, num_queries queries
  bool is_bf16;
  int problems, h, group, num_patterns, sinks, n, num_queries, num_centres, iterations;

  // Sets how many sinks, tokens and centres `rows` make.
  void count(int64_t rows, int64_t num_sinks, int64_t max_sample) {
    sinks = static_cast<int>(min(num_sinks, rows));
    n = static_cast<int>(min(rows - sinks, max_sample));
    tokens = Sampling::make(rows - sinks, n);
    num_centres = min(num_patterns - sinks, n);
  }
  void count_queries(int rows, int of_group) {
    num_queries = min(rows, kMaxTokens);
    queries = Sampling::make(rows, num_queries);
    group = of_group;
  }

  // Tokens of the products that move centres, which take 16 at a time.
  __device__ int multiplied_tokens() const { return (n + 15) / 16 * 16; }

  // Otherwise sinks and tokens are the patterns, as far as these reach.
  __host__ __device__ bool clusters() const { return num_centres > 0 && num_centres < n; }
  __host__ __device__ int num_outliers() const { return num_centres / kOutlierShare; }
  __host__ __device__ int used() const { return sinks + num_centres; }
  __host__ __device__ int free_tokens() const { return max(n - used(), 0); }
  // Tokens of each rank but the last ones; whole MMA tiles.
  __host__ __device__ int rank_tokens() const { return (n + kRanks * 16 - 1) / (kRanks * 16) * 16; }
};

// A problem's scratch memory, parts at multiples of 16 bytes.
struct Scratch {
  __half* rows;          // [sinks + n, HEAD_DIM]: NaN as 0, clamped; then what fills up a tile
  __half* centres;       // [num_centres, HEAD_DIM], weighted
  float* nearness;       // [n]: minus half the squared distance to the nearest centre
  uint8_t* ids;          // [n]: of that centre
  uint64_t* candidates;  // [kRanks, kMaxOutliers]: the farthest tokens of each rank
  float* partials;       // [kRanks, kPartials, HEAD_DIM]

  // Returns where the next problem's begins.
  __host__ __device__ uint8_t* place(uint8_t* base, int rows_count, int num_centres, int n) {
    const auto take = [&](int64_t bytes) {
      uint8_t* part = base;
      base += (bytes + 15) / 16 * 16;
      return part;
    };
    rows = reinterpret_cast<__half*>(take(int64_t{rows_count + 15} * HEAD_DIM * 2));
    centres = reinterpret_cast<__half*>(take(int64_t{num_centres} * HEAD_DIM * 2));
    nearness = reinterpret_cast<float*>(take(int64_t{n} * 4));
    ids = take(n);
    candidates = reinterpret_cast<uint64_t*>(take(kRanks * kMaxOutliers * 8));
    partials = reinterpret_cast<float*>(take(kRanks * kPartials * HEAD_DIM * 4));
    return base;
  }
};

inline int64_t scratch_bytes(int rows, int num_centres, int n) {
  Scratch scratch;
  uint8_t* const base = nullptr;
  return scratch.place(base, rows, num_centres, n) - base;
}

// What one block sees of its problem.
struct Problem : Scratch {
  int side, head, rank;
  int first, last;  // the rank's tokens, of n

  __device__ Problem(const MiningParams& p, int index)
      : side(index / p.h), head(index % p.h), rank(blockIdx.x) {
    uint8_t* base = p.scratch;
    const int64_t bytes = place(base, p.sinks + p.n, p.num_centres, p.n) - base;
    place(base + bytes * index, p.sinks + p.n, p.num_centres, p.n);
    first = min(rank * p.rank_tokens(), p.n);
    last = min(first + p.rank_tokens(), p.n);
  }

  __device__ float* partial(int of_rank, Partial kind) const {
    return partials + (of_rank * kPartials + kind) * HEAD_DIM;
  }
  // Of all ranks, in a fixed order.
  template <typename Combine>
  __device__ float combined(Partial kind, int channel, Combine combine) const {
    float value = load_coherent(partial(0, kind) + channel);
#pragma unroll
    for (int other = 1; other < kRanks; ++other) {
      value = combine(value, load_coherent(partial(other, kind) + channel));
    }
    return value;
  }
};

enum class Work {
  kGather,     // tokens and what the channels are like
  kAssign,     // tokens to centres, outliers looked for
  kOutliers,   // tokens to centres at the farthest tokens
  kMove,       // centres to the means of their tokens
  kCopy,       // tokens are the patterns
  kResiduals,  // spread around the patterns
  kFinish,     // channel scales
};

struct Step {
  Work work;
  int centres;       // assigned to or moved
  bool from_tokens;  // centres are evenly spaced tokens still
  bool last;         // of its kind: all centres move, or the farthest tokens are looked for
};

__host__ __device__ inline int num_steps(const MiningParams& p) {
  if (!p.clusters()) return 4;
  return 5 + 2 * p.iterations + (p.num_outliers() > 0);
}

__host__ __device__ inline Step step_at(const MiningParams& p, int index) {
  const int behind = num_steps(p) - 1 - index;
  if (index == 0) return {Work::kGather};
  if (behind == 0) return {Work::kFinish};
  if (behind == 1) return {Work::kResiduals};
  if (!p.clusters()) return {Work::kCopy};
  if (behind == 2) return {Work::kMove, p.num_centres, false, true};
  const int num_starts = p.num_centres - p.num_outliers();
  if (behind == 3 && p.num_outliers() > 0) return {Work::kOutliers, num_starts};
  if (index % 2 == 0) return {Work::kMove, num_starts};
  return {Work::kAssign, num_starts, index == 1, index == 2 * p.iterations + 1};
}

// Channels of a problem, in shared memory.
struct alignas(16) Channels {
  float unit[HEAD_DIM];  // weight times the power of two that fits weighted tokens into float16
  float weight[HEAD_DIM];
  float reduced[kWarps];
};

// The sum, or another fold, over a block, in a fixed order; the same in all threads.
template <typename Combine>
__device__ float block_reduce(float x, float (&reduced)[kWarps], Combine combine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffff, x, lanes));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) reduced[threadIdx.x / 32] = x;
  __syncthreads();
  x = reduced[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = combine(x, reduced[warp]);
  return x;
}

struct Add {
  __device__ float operator()(float x, float y) const { return __fadd_rn(x, y); }
};
struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// Eight dims of a vector, in float.
struct Eight {
  float x[8];

  __device__ explicit Eight(uint4 halves) {
    const uint32_t words[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = __half22float2(as_half2(words[j]));
      x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
    }
  }
  __device__ uint4 halves() const {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = as_u32(__floats2half2_rn(x[2 * j], x[2 * j + 1]));
    return {words[0], words[1], words[2], words[3]};
  }
};

// Eight dims of a token in the units of the centres.
__device__ __forceinline__ uint4 weighted(uint4 token, const float* unit) {
  Eight x(token);
  const float4 low = reinterpret_cast<const float4*>(unit)[0];
  const float4 high = reinterpret_cast<const float4*>(unit)[1];
  const float by[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) x.x[j] *= by[j];
  return x.halves();
}

}  // namespace patternkv::mining
