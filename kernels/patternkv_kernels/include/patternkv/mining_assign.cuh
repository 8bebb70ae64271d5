// Tokens to their nearest centres: the largest x . c - |c|^2 / 2 of weighted fp16 vectors, on
// tensor cores. Warps hold 16 or 32 tokens as operand A and walk over the centres, which pass
// through shared memory in tiles.
#pragma once

#include "patternkv/mining_params.cuh"
#include "patternkv/ptx.cuh"

namespace patternkv::mining {

constexpr int kTileCentres = HEAD_DIM <= 128 ? 128 : 64;
// Reads of 16 bytes by four lanes of each of eight rows meet all banks alike.
constexpr int kCentreBytes = 2 * HEAD_DIM + (HEAD_DIM % 64 == 0 ? 64 : 0);
constexpr int kNormThreads = kThreads / kTileCentres;  // of a centre
constexpr int kPairs = HEAD_DIM / 8;                   // half2 of a lane per vector
constexpr uint64_t kNoCandidate = ~uint64_t{0};

struct alignas(16) AssignShared {
  uint8_t centres[kTileCentres * kCentreBytes];
  float bias[kTileCentres];
  uint64_t keys[kRankTokens];
  int outliers[kMaxOutliers];
};
static_assert(kRankTokens == kThreads && kRanks * kMaxOutliers == kThreads, "a key per thread");

// Best centre of a token so far; of equal ones the lowest id wins.
struct Nearest {
  float nearness;
  int id;

  __device__ void offer(float other, int other_id) {
    if (other > nearness || (other == nearness && other_id < id)) nearness = other, id = other_id;
  }
};

// 16 tokens. Lane l has dims 32 i + 8 (l % 4) and the next seven, for every i, of tokens l / 4 and
// l / 4 + 8: an MMA operand whose k index is permuted, as the centres' is.
struct TokenTile {
  uint32_t upper[kPairs], lower[kPairs];
  float norm[2];  // half the squared norm of both tokens

  __device__ __forceinline__ void load(const __half* rows, int first, int n, const float* unit) {
    const int row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    const __half* vectors[2] = {rows + int64_t{min(first + row, n - 1)} * HEAD_DIM,
                                rows + int64_t{min(first + row + 8, n - 1)} * HEAD_DIM};
    uint4 loaded[2][kPairs / 4];
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        loaded[k][i] = load_coherent(reinterpret_cast<const uint4*>(vectors[k]) + 4 * i + part);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      norm[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < kPairs / 4; ++i) {
        const uint4 chunk = weighted(loaded[k][i], unit + 32 * i + 8 * part);
        const Eight x(chunk);
#pragma unroll
        for (int j = 0; j < 8; ++j) norm[k] = fmaf(x.x[j], x.x[j], norm[k]);
        uint32_t* out = (k == 0 ? upper : lower) + 4 * i;
        out[0] = chunk.x, out[1] = chunk.y, out[2] = chunk.z, out[3] = chunk.w;
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
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, c = first + min(row, count - 1);
    uint4 x = load_coherent(reinterpret_cast<const uint4*>(list.vector(problem, c)) + chunk);
    if (list.is_token(c)) x = weighted(x, channels.unit + 8 * chunk);
    *reinterpret_cast<uint4*>(shared.centres + row * kCentreBytes + 16 * chunk) = x;
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
template <int kTiles>
__device__ __forceinline__ void score_centres(const AssignShared& shared, int first, int count,
                                              const TokenTile (&tokens)[kTiles],
                                              Nearest (&best)[kTiles][2]) {
  const int row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  for (int at = 0; at < count; at += 16) {
    float sums[kTiles][2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float2 bias =
          *reinterpret_cast<const float2*>(&shared.bias[at + 8 * side + 2 * part]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
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
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t* upper = tokens[tile].upper + 4 * i;
          const uint32_t* lower = tokens[tile].lower + 4 * i;
          mma_m16n8k16(sums[tile][side], upper[0], lower[0], upper[1], lower[1], c.x, c.y);
          mma_m16n8k16(sums[tile][side], upper[2], lower[2], upper[3], lower[3], c.z, c.w);
        }
      }
    }
    // Ids of a lane ascend, so the first of equals is the lowest.
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int token = 0; token < 2; ++token) {
        Nearest& nearest = best[tile][token];
#pragma unroll
        for (int column = 0; column < 4; ++column) {
          const float score = sums[tile][column / 2][2 * token + column % 2];
          const int id = first + at + column / 2 * 8 + 2 * part + column % 2;
          if (score > nearest.nearness) nearest = {score, id};
        }
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
template <int kTiles>
__device__ __forceinline__ void assign_tiles(AssignShared& shared, const MiningParams& p,
                                             const Problem& problem, const Channels& channels,
                                             const CentreList& list) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  const int first = problem.first + warp * kTiles * 16;
  const __half* tokens = problem.rows + int64_t{p.sinks} * HEAD_DIM;
  TokenTile tiles[kTiles];
  Nearest best[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    tiles[i].load(tokens, first + 16 * i, p.n, channels.unit);
    best[i][0] = best[i][1] = {-INFINITY, 0};
  }
  for (int at = 0; at < list.count; at += kTileCentres) {
    const int count = min(list.count - at, kTileCentres);
    stage_centres(shared, problem, channels, list, at, count);
    if (first < problem.last) score_centres<kTiles>(shared, at, count, tiles, best);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Nearest nearest = best[i][k];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other = __shfl_xor_sync(0xffffffff, nearest.nearness, lanes);
        nearest.offer(other, __shfl_xor_sync(0xffffffff, nearest.id, lanes));
      }
      nearest.nearness -= tiles[i].norm[k];
      const int token = first + 16 * i + 8 * k + row;
      if (part != 0 || token >= problem.last) continue;
      if (list.add && nearest.nearness <= load_coherent(problem.nearness + token)) continue;
      problem.nearness[token] = nearest.nearness;
      problem.ids[token] = list.first_id + nearest.id;
      shared.keys[token - problem.first] = candidate_key(nearest.nearness, token);
    }
  }
  __syncthreads();
}

// How many of the block's keys are less than this thread's.
__device__ __forceinline__ int key_rank(const AssignShared& shared) {
  const uint64_t own = shared.keys[threadIdx.x];
  int rank = 0;
#pragma unroll 8
  for (int i = 0; i < kThreads; ++i) rank += shared.keys[i] < own;
  return rank;
}

// The rank's farthest tokens, the farthest first, for the other ranks.
__device__ __forceinline__ void write_candidates(const AssignShared& shared, const MiningParams& p,
                                                 const Problem& problem) {
  const int rank = key_rank(shared);
  if (rank < p.num_outliers() && shared.keys[threadIdx.x] != kNoCandidate) {
    problem.candidates[problem.rank * kMaxOutliers + rank] = shared.keys[threadIdx.x];
  }
}

// The farthest tokens of all.
__device__ __forceinline__ void choose_outliers(AssignShared& shared, const MiningParams& p,
                                                const Problem& problem) {
  const int rank = threadIdx.x / kMaxOutliers, place = threadIdx.x % kMaxOutliers;
  const int tokens_there = min(max(p.n - rank * p.rank_tokens(), 0), p.rank_tokens());
  shared.keys[threadIdx.x] = place < min(p.num_outliers(), tokens_there)
                                 ? load_coherent(problem.candidates + threadIdx.x)
                                 : kNoCandidate;
  __syncthreads();
  const int order = key_rank(shared);
  if (order < p.num_outliers()) {
    shared.outliers[order] = static_cast<int>(shared.keys[threadIdx.x] & 0xffffffff);
  }
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
  shared.keys[threadIdx.x] = kNoCandidate;
  if (p.rank_tokens() > kWarps * 16) {
    assign_tiles<2>(shared, p, problem, channels, list);
  } else {
    assign_tiles<1>(shared, p, problem, channels, list);
  }
  if (step.work == Work::kAssign && step.last) write_candidates(shared, p, problem);
}

}  // namespace patternkv::mining
