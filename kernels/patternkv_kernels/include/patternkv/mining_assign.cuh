// Tokens to their nearest centres: the largest x . c - |c|^2 / 2 of weighted fp16 vectors, on
// tensor cores. Warps hold tokens as operand A and walk over the centres, which pass through shared
// memory in tiles.
#pragma once

#include "patternkv/mining_params.cuh"
#include "patternkv/ptx.cuh"

namespace patternkv::mining {

constexpr int kTileCentres = HEAD_DIM <= 128 ? 128 : 64;
// Reads of 16 bytes by four lanes of each of eight rows meet all banks alike.
constexpr int kCentreBytes = 2 * HEAD_DIM + (HEAD_DIM % 64 == 0 ? 64 : 0);
constexpr int kNormThreads = kThreads / kTileCentres;  // of a centre
constexpr int kPairs = HEAD_DIM / 8;                   // half2 of a lane per vector
constexpr int kTokenTiles = kRankTokens / (kWarps * 16);  // of a warp, 16 tokens each
constexpr int kCandidates = kRanks * kMaxOutliers;
constexpr int kMaxKeys = kRankTokens > kCandidates ? kRankTokens : kCandidates;
constexpr uint64_t kNoCandidate = ~uint64_t{0};

struct alignas(16) AssignShared {
  uint8_t centres[kTileCentres * kCentreBytes];
  float bias[kTileCentres];
  uint64_t keys[kMaxKeys];
  int outliers[kMaxOutliers];
};
static_assert(kTokenTiles * kWarps * 16 == kRankTokens, "whole MMA tiles of tokens in every warp");
static_assert(kThreads % kTileCentres == 0 && kNormThreads <= 32, "threads of a centre in a warp");

// Best centre of a token so far; of equal ones the lowest id wins.
struct Nearest {
  float nearness;
  int id;

  __device__ void offer(float other, int other_id) {
    if (other > nearness || (other == nearness && other_id < id)) nearness = other, id = other_id;
  }
};

// 16 tokens, loaded and then weighed. Lane l has dims 32 i + 8 (l % 4) and the next seven, for
// every i, of tokens l / 4 and l / 4 + 8: an MMA operand whose k index is permuted, as the centres'
// is.
struct TokenTile {
  uint4 chunks[2][kPairs / 4];  // of either token
  float norm[2];                // half the squared norm of both tokens

  __device__ __forceinline__ void load(const __half* rows) {
    const int row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    const uint4* own = reinterpret_cast<const uint4*>(rows) + row * kChunks + part;
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) chunks[k][i] = load_coherent(own + 8 * k * kChunks + 4 * i);
    }
  }

  // What was loaded in the units of the centres.
  __device__ __forceinline__ void weigh(const float* unit) {
    const int part = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      norm[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < kPairs / 4; ++i) {
        chunks[k][i] = weighted(chunks[k][i], unit + 32 * i + 8 * part);
        const Eight x(chunks[k][i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) norm[k] = fmaf(x.x[j], x.x[j], norm[k]);
      }
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        norm[k] += __shfl_xor_sync(0xffffffff, norm[k], lanes);
      }
      norm[k] *= 0.5f;
    }
  }
};

// Which vectors a step assigns to: `num_tokens` tokens, then centres.
struct CentreList {
  int count, num_tokens;
  int first_row, spacing;  // tokens are at rows first_row + c * spacing / num_tokens,
  const int* rows;         // or, unless this is null, at first_row + rows[c]
  int first_id;            // of the first one
  bool add;                // to what tokens were assigned to before, instead of replacing it

  // Whether it is a token, and still to be weighted.
  __device__ bool is_token(int c) const { return c < num_tokens; }
  __device__ const __half* vector(const Problem& problem, int c) const {
    if (!is_token(c)) return problem.centres + int64_t{c - num_tokens} * HEAD_DIM;
    const int row = rows != nullptr ? rows[c] : c * spacing / num_tokens;
    return problem.rows + int64_t{first_row + row} * HEAD_DIM;
  }
};

// Brings centres `first` to `first + count - 1` and their biases to shared memory.
__device__ __forceinline__ void stage_centres(AssignShared& shared, const Problem& problem,
                                              const Channels& channels, const CentreList& list,
                                              int first, int count) {
  const int rows = (count + 15) / 16 * 16;
  __syncthreads();
#pragma unroll 1  // few registers, and no copy waits for another
  for (int at = threadIdx.x; at < rows * kChunks; at += kThreads) {
    const int row = at / kChunks, chunk = at % kChunks, c = first + min(row, count - 1);
    cp_async<16>(shared_address(shared.centres + row * kCentreBytes + 16 * chunk),
                 reinterpret_cast<const uint4*>(list.vector(problem, c)) + chunk);
  }
  cp_async_commit();
  cp_async_wait<0>();
  // What a thread copied itself, so before others see it.
#pragma unroll 1
  for (int at = threadIdx.x; at < rows * kChunks; at += kThreads) {
    const int row = at / kChunks, chunk = at % kChunks;
    if (!list.is_token(first + min(row, count - 1))) break;
    auto* x = reinterpret_cast<uint4*>(shared.centres + row * kCentreBytes + 16 * chunk);
    *x = weighted(*x, channels.unit + 8 * chunk);
  }
  __syncthreads();
  const int row = threadIdx.x / kNormThreads, part = threadIdx.x % kNormThreads;
  float norm = 0.0f;
  if (row < rows) {
    for (int chunk = part; chunk < kChunks; chunk += kNormThreads) {
      const uint8_t* at = shared.centres + row * kCentreBytes + 16 * chunk;
      const Eight x(*reinterpret_cast<const uint4*>(at));
#pragma unroll
      for (int j = 0; j < 8; ++j) norm = fmaf(x.x[j], x.x[j], norm);
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kNormThreads; lanes *= 2) {
    norm += __shfl_xor_sync(0xffffffff, norm, lanes);
  }
  // Rows that fill up the last MMA never win.
  if (part == 0) shared.bias[row] = row < count ? -0.5f * norm : -INFINITY;
  __syncthreads();
}

// Offers the staged centres, whose ids start at `first`, to the tokens.
__device__ __forceinline__ void score_centres(const AssignShared& shared, int first, int count,
                                              const TokenTile (&tokens)[kTokenTiles],
                                              Nearest (&best)[kTokenTiles][2]) {
  const int row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  for (int at = 0; at < count; at += 16) {
    float sums[kTokenTiles][2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float2 bias = *reinterpret_cast<const float2*>(&shared.bias[at + 8 * side + 2 * part]);
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        sums[tile][side][0] = sums[tile][side][2] = bias.x;
        sums[tile][side][1] = sums[tile][side][3] = bias.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const uint4 c = *reinterpret_cast<const uint4*>(
            shared.centres + (at + 8 * side + row) * kCentreBytes + 64 * i + 16 * part);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          const uint4 upper = tokens[tile].chunks[0][i], lower = tokens[tile].chunks[1][i];
          mma_m16n8k16(sums[tile][side], upper.x, lower.x, upper.y, lower.y, c.x, c.y);
          mma_m16n8k16(sums[tile][side], upper.z, lower.z, upper.w, lower.w, c.z, c.w);
        }
      }
    }
    // Ids of a lane ascend, so the first of equals is the lowest.
#pragma unroll
    for (int token = 0; token < 2 * kTokenTiles; ++token) {
      Nearest& nearest = best[token / 2][token % 2];
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const float score = sums[token / 2][column / 2][2 * (token % 2) + column % 2];
        const int id = first + at + column / 2 * 8 + 2 * part + column % 2;
        if (score > nearest.nearness) nearest = {score, id};
      }
    }
  }
}

// Ascends with `nearness`, and with the token where this is equal.
__device__ __forceinline__ uint64_t candidate_key(float nearness, int token) {
  const uint32_t bits = __float_as_uint(nearness);
  const uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return uint64_t{ordered} << 32 | static_cast<uint32_t>(token);
}

// The nearest centre of each of the rank's tokens, to global memory, and their keys.
__device__ __forceinline__ void assign_tokens(AssignShared& shared, const MiningParams& p,
                                              const Problem& problem, const Channels& channels,
                                              const CentreList& list) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  // Of a warp's tiles, so that few tokens are spread over all warps.
  constexpr int kStride = kWarps * 16;
  const int first = problem.first + warp * 16;
  TokenTile tokens[kTokenTiles] = {};
  Nearest best[kTokenTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    if (first + tile * kStride < problem.last) {
      tokens[tile].load(problem.rows + int64_t{p.sinks + first + tile * kStride} * HEAD_DIM);
    }
    best[tile][0] = best[tile][1] = {-INFINITY, 0};
  }
  for (int at = 0; at < list.count; at += kTileCentres) {
    const int count = min(list.count - at, kTileCentres);
    stage_centres(shared, problem, channels, list, at, count);
    // Not before, so that the loads of tokens and of centres run side by side.
    if (at == 0) {
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) tokens[tile].weigh(channels.unit);
    }
    if (first < problem.last) score_centres(shared, at, count, tokens, best);
  }
#pragma unroll
  for (int i = 0; i < 2 * kTokenTiles; ++i) {
    const int tile = i / 2, k = i % 2;
    Nearest nearest = best[tile][k];
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float other = __shfl_xor_sync(0xffffffff, nearest.nearness, lanes);
      nearest.offer(other, __shfl_xor_sync(0xffffffff, nearest.id, lanes));
    }
    nearest.nearness -= tokens[tile].norm[k];
    const int token = first + tile * kStride + 8 * k + row;
    if (part != 0 || token >= problem.last) continue;
    if (list.add && nearest.nearness <= load_coherent(problem.nearness + token)) continue;
    problem.nearness[token] = nearest.nearness;
    problem.ids[token] = list.first_id + nearest.id;
    shared.keys[token - problem.first] = candidate_key(nearest.nearness, token);
  }
  __syncthreads();
}

// A key of `kKeys`, shared by as many threads as there are for each, and how many are less.
struct Ranked {
  uint64_t key;
  int rank;
};
template <int kKeys>
__device__ __forceinline__ Ranked ranked_key(const AssignShared& shared) {
  constexpr int kKeyThreads = kThreads / kKeys;
  static_assert(kKeyThreads * kKeys == kThreads && kKeyThreads <= 32, "threads of a key in a warp");
  const uint64_t own = shared.keys[threadIdx.x / kKeyThreads];
  int rank = 0;
#pragma unroll 8
  for (int i = threadIdx.x % kKeyThreads; i < kKeys; i += kKeyThreads) {
    rank += shared.keys[i] < own;
  }
#pragma unroll
  for (int lanes = 1; lanes < kKeyThreads; lanes *= 2) {
    rank += __shfl_xor_sync(0xffffffff, rank, lanes);
  }
  return {own, rank};
}

// The rank's farthest tokens, the farthest first, for the other ranks.
__device__ __forceinline__ void write_candidates(const AssignShared& shared, const MiningParams& p,
                                                 const Problem& problem) {
  const Ranked own = ranked_key<kRankTokens>(shared);
  if (own.rank < p.num_outliers() && own.key != kNoCandidate) {
    problem.candidates[problem.rank * kMaxOutliers + own.rank] = own.key;
  }
}

// The farthest tokens of all.
__device__ __forceinline__ void choose_outliers(AssignShared& shared, const MiningParams& p,
                                                const Problem& problem) {
  if (threadIdx.x < kCandidates) {
    const int rank = threadIdx.x / kMaxOutliers, place = threadIdx.x % kMaxOutliers;
    const int tokens_there = min(max(p.n - rank * p.rank_tokens(), 0), p.rank_tokens());
    shared.keys[threadIdx.x] = place < min(p.num_outliers(), tokens_there)
                                   ? load_coherent(problem.candidates + threadIdx.x)
                                   : kNoCandidate;
  }
  __syncthreads();
  const Ranked own = ranked_key<kCandidates>(shared);
  if (own.rank < p.num_outliers()) shared.outliers[own.rank] = static_cast<int>(own.key);
  __syncthreads();
}

__device__ __forceinline__ void assign_step(AssignShared& shared, const MiningParams& p,
                                            const Problem& problem, const Channels& channels,
                                            const Step& step) {
  CentreList list = {};
  if (step.work == Work::kAssign) {
    list.count = step.centres;
    if (step.from_tokens) {
      list.num_tokens = step.centres, list.first_row = p.sinks, list.spacing = p.n;
    }
  } else if (step.work == Work::kOutliers) {
    choose_outliers(shared, p, problem);
    list.count = list.num_tokens = p.num_outliers();
    list.first_row = p.sinks, list.rows = shared.outliers;
    list.first_id = step.centres, list.add = true;
  } else {
    list.count = p.used();
    list.num_tokens = list.spacing = p.clusters() ? p.sinks : p.used();
  }
  if (threadIdx.x < kRankTokens) shared.keys[threadIdx.x] = kNoCandidate;
  assign_tokens(shared, p, problem, channels, list);
  if (step.work == Work::kAssign && step.last) write_candidates(shared, p, problem);
}

}  // namespace patternkv::mining
