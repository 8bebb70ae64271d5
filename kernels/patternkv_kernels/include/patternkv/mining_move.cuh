// Centres to the means of their tokens. A rank makes some dims of all centres from all tokens, as a
// product of memberships, ones and zeros, with the tokens: exact terms, summed in a fixed order
// however many tokens a centre has.
#pragma once

#include "patternkv/mining_params.cuh"
#include "patternkv/ptx.cuh"

namespace patternkv::mining {

constexpr int kSlice = 128 / kRanks;  // dims that a rank makes at a time
constexpr int kSliceChunks = kSlice / 8;
constexpr int kCentreTiles = kMaxPatterns / (16 * kWarps);  // of a warp, 16 centres each
constexpr int kIdWords = kMaxTokens / (4 * kThreads);       // of a thread, four ids each
constexpr uint16_t kIdBits = 0x6400;  // float16 1024 + id: exact, and never subnormal

struct alignas(16) MoveShared {
  // Rows of kSlice dims, whose chunks trade places so that reads of a matrix of eight rows meet all
  // banks; later the sums, [splits, centres, kSlice] floats.
  uint8_t tokens[kMaxTokens * kSlice * 2];
  uint16_t ids[kMaxTokens];
  int count[kMaxPatterns];
  int moved[kMaxPatterns];  // for a centre without tokens the token that it moves to
};
static_assert(kMaxPatterns * kSlice * 4 <= kMaxTokens * kSlice * 2);
static_assert(kCentreTiles * 16 * kWarps == kMaxPatterns, "whole tiles of centres in every warp");
static_assert(kIdWords * 4 * kThreads == kMaxTokens, "whole words of ids in every thread");

__device__ __forceinline__ uint32_t token_offset(int token, int chunk) {
  constexpr int kRows = 8 / kSliceChunks;  // that meet all banks as they are
  return (token * kSliceChunks + (chunk ^ token / kRows % kSliceChunks)) * 16;
}

// Ids, counts and where centres without tokens go: to the farthest of every m-th token, each such
// centre to one of others.
__device__ __forceinline__ void count_members(MoveShared& shared, const MiningParams& p,
                                              const Problem& problem, int m) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // What fills up the last MMA is in nobody's set.
  const int end = p.multiplied_tokens();
  uint32_t ids[kIdWords] = {};
#pragma unroll
  for (int word = 0; word < kIdWords; ++word) {
    const int at = threadIdx.x + word * kThreads;
    if (4 * at < end) ids[word] = load_coherent(reinterpret_cast<uint32_t*>(problem.ids) + at);
  }
  __syncthreads();
  if (threadIdx.x < kMaxPatterns) shared.count[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4 * kIdWords; ++i) {
    const int token = 4 * (threadIdx.x + i / 4 * kThreads) + i % 4;
    if (token >= end) continue;
    const int id = token < p.n ? ids[i / 4] >> i % 4 * 8 & 0xff : kMaxPatterns;
    shared.ids[token] = kIdBits + id;
    if (token < p.n) atomicAdd(&shared.count[id], 1);
  }
  __syncthreads();
  for (int c = warp; c < m; c += kWarps) {
    if (shared.count[c] > 0) continue;
    float least = INFINITY;
    int farthest = c;
    for (int token = c + lane * m; token < p.n / m * m; token += 32 * m) {
      const float nearness = load_coherent(problem.nearness + token);
      if (nearness < least) least = nearness, farthest = token;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(0xffffffff, least, lanes);
      const int token = __shfl_xor_sync(0xffffffff, farthest, lanes);
      if (other < least || (other == least && token < farthest)) least = other, farthest = token;
    }
    if (lane == 0) shared.moved[c] = farthest;
  }
}

// Warps take the centres in tiles of 16, every width-th, and where there are fewer tiles than warps
// these split the tokens.
struct Split {
  int tiles, tile, splits, split;

  __device__ explicit Split(int m) : tiles((m + 15) / 16) {
    int width = 1;
    while (width < min(tiles, kWarps)) width *= 2;
    splits = kWarps / width;
    tile = threadIdx.x / 32 % width;
    split = threadIdx.x / 32 / width;
  }
};

// Sends all tokens' dims [slice * kSlice, +kSlice) on their way to shared memory.
__device__ __forceinline__ void copy_tokens(MoveShared& shared, const MiningParams& p,
                                            const Problem& problem, int slice) {
  const __half* rows = problem.rows + int64_t{p.sinks} * HEAD_DIM + slice * kSlice;
  const int end = p.multiplied_tokens() * kSliceChunks;
#pragma unroll 8
  for (int at = threadIdx.x; at < end; at += kThreads) {
    const int token = at / kSliceChunks, chunk = at % kSliceChunks;
    // The last one stands in for those beyond it.
    const __half* row = rows + int64_t{min(token, p.n - 1)} * HEAD_DIM;
    cp_async<16>(shared_address(shared.tokens + token_offset(token, chunk)), row + 8 * chunk);
  }
  cp_async_commit();
}

// Sums of the members of all centres, of the slice whose tokens are on their way, to shared memory.
__device__ __forceinline__ void sum_members(MoveShared& shared, const MiningParams& p,
                                            const Split& own) {
  const int lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
  // Of the matrices that operand B is made of: tokens 0 to 7 and 8 to 15, of two chunks.
  uint32_t matrix_row[kSliceChunks / 2];
#pragma unroll
  for (int i = 0; i < kSliceChunks / 2; ++i) {
    matrix_row[i] = shared_address(shared.tokens) + token_offset(lane % 16, 2 * i + lane / 16);
  }
  float sums[kCentreTiles][kSliceChunks][4] = {};
  __half2 id[kCentreTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kCentreTiles; ++i) {
    const int c = (own.tile + i / 2 * kWarps) * 16 + i % 2 * 8 + row;
    id[i / 2][i % 2] = as_half2((kIdBits + c) * 0x10001u);
  }
  cp_async_wait<0>();
  __syncthreads();
  const int end = own.tile < own.tiles ? p.multiplied_tokens() : 0;
#pragma unroll 4
  for (int k = 16 * own.split; k < end; k += 16 * own.splits) {
    const auto* ids = reinterpret_cast<const uint32_t*>(shared.ids + k);
    const __half2 low = as_half2(ids[part]), high = as_half2(ids[4 + part]);
    uint32_t b[kSliceChunks / 2][4];
#pragma unroll
    for (int i = 0; i < kSliceChunks / 2; ++i) {
      load_matrices_trans(b[i], matrix_row[i] + 2 * kSlice * k);
    }
#pragma unroll
    for (int tile = 0; tile < kCentreTiles; ++tile) {
      if (own.tile + tile * kWarps >= own.tiles) break;
      const uint32_t a[4] = {as_u32(__heq2(low, id[tile][0])), as_u32(__heq2(low, id[tile][1])),
                             as_u32(__heq2(high, id[tile][0])), as_u32(__heq2(high, id[tile][1]))};
#pragma unroll
      for (int i = 0; i < kSliceChunks; ++i) {
        const uint32_t* eight = b[i / 2] + i % 2 * 2;
        mma_m16n8k16(sums[tile][i], a[0], a[1], a[2], a[3], eight[0], eight[1]);
      }
    }
  }
  __syncthreads();
  auto* out = reinterpret_cast<float*>(shared.tokens);
#pragma unroll
  for (int tile = 0; tile < kCentreTiles; ++tile) {
    const int at = own.tile + tile * kWarps;
    if (at >= own.tiles) break;
#pragma unroll
    for (int i = 0; i < 2 * kSliceChunks; ++i) {
      const float* pair = sums[tile][i / 2] + i % 2 * 2;
      const int c = (own.split * own.tiles + at) * 16 + i % 2 * 8 + row;
      *reinterpret_cast<float2*>(out + c * kSlice + i / 2 * 8 + 2 * part) = {pair[0], pair[1]};
    }
  }
  __syncthreads();
}

// Dims 2 * pair and the next, of the slice, of centre c.
__device__ __forceinline__ float2 moved_centre(const MoveShared& shared, const MiningParams& p,
                                               const Problem& problem, const Split& own, int slice,
                                               int c, int pair) {
  const int count = shared.count[c];
  if (count == 0) {
    const __half* token = problem.rows + int64_t{p.sinks + shared.moved[c]} * HEAD_DIM;
    const auto* pairs = reinterpret_cast<const uint32_t*>(token + slice * kSlice);
    return __half22float2(as_half2(load_coherent(pairs + pair)));
  }
  float2 sum = {0.0f, 0.0f};
  for (int split = 0; split < own.splits; ++split) {
    const int row = split * own.tiles * 16 + c;
    const auto* sums = reinterpret_cast<const float2*>(shared.tokens) + row * (kSlice / 2);
    sum.x = __fadd_rn(sum.x, sums[pair].x), sum.y = __fadd_rn(sum.y, sums[pair].y);
  }
  const float of_count = static_cast<float>(count);
  return {__fdiv_rn(sum.x, of_count), __fdiv_rn(sum.y, of_count)};
}

__device__ __forceinline__ void move_step(MoveShared& shared, const MiningParams& p,
                                          const Problem& problem, const Channels& channels,
                                          const Step& step) {
  constexpr int kSlicePairs = kSlice / 2;
  const int m = step.centres;
  if (problem.rank >= HEAD_DIM / kSlice) return;
  // On their way while members are counted.
  copy_tokens(shared, p, problem, problem.rank);
  count_members(shared, p, problem, m);
  const Split own(m);
  auto* patterns = reinterpret_cast<__half2*>(p.patterns[problem.side]) +
                   int64_t{problem.head} * p.num_patterns * (HEAD_DIM / 2);
  for (int slice = problem.rank; slice < HEAD_DIM / kSlice; slice += kRanks) {
    if (slice != problem.rank) {
      __syncthreads();
      copy_tokens(shared, p, problem, slice);
    }
    sum_members(shared, p, own);
    for (int i = threadIdx.x; i < m * kSlicePairs; i += kThreads) {
      const int c = i / kSlicePairs, pair = i % kSlicePairs;
      const float2 x = moved_centre(shared, p, problem, own, slice, c, pair);
      const float* unit = channels.unit + slice * kSlice + 2 * pair;
      auto* centre = reinterpret_cast<__half2*>(problem.centres + int64_t{c} * HEAD_DIM);
      centre[slice * kSlicePairs + pair] = __floats2half2_rn(x.x * unit[0], x.y * unit[1]);
    }
    if (!step.last) continue;
    // Sinks, centres, and the first of them again up to the end.
    for (int i = threadIdx.x; i < p.num_patterns * kSlicePairs; i += kThreads) {
      const int id = i / kSlicePairs < p.used() ? i / kSlicePairs : 0, pair = i % kSlicePairs;
      __half2 x;
      if (id < p.sinks) {
        const auto* sink = reinterpret_cast<const uint32_t*>(problem.rows + int64_t{id} * HEAD_DIM);
        x = as_half2(load_coherent(sink + slice * kSlicePairs + pair));
      } else {
        const float2 mean = moved_centre(shared, p, problem, own, slice, id - p.sinks, pair);
        x = __floats2half2_rn(mean.x, mean.y);
      }
      patterns[int64_t{i / kSlicePairs} * (HEAD_DIM / 2) + slice * kSlicePairs + pair] = x;
    }
  }
}

// Where there are no more tokens than centres: rows are patterns, the first one up to the end.
__device__ __forceinline__ void copy_step(const MiningParams& p, const Problem& problem) {
  auto* patterns = reinterpret_cast<uint4*>(p.patterns[problem.side]) +
                   int64_t{problem.head} * p.num_patterns * kChunks;
  const auto* rows = reinterpret_cast<const uint4*>(problem.rows);
  for (int i = problem.rank * kThreads + threadIdx.x; i < p.num_patterns * kChunks;
       i += kRanks * kThreads) {
    const int row = i / kChunks < p.used() ? i / kChunks : 0;
    patterns[i] = load_coherent(rows + row * kChunks + i % kChunks);
  }
}

}  // namespace patternkv::mining
