// Query rows in the warpgroup kernel's consumers: as operands, and their running attention.
#pragma once

#include "patternkv/decode_queries.cuh"
#include "patternkv/decode_units.cuh"
#include "patternkv/warpgroup_memory.cuh"

namespace patternkv {
namespace warpgroup {

// Fills the query operands of `rows` rows, 64 for each consumer, and the scales of their products.
// By the consumers; ends without a barrier.
__device__ __forceinline__ void load_queries(const DecodeParams& p, const WorkItem& item, int head,
                                             int rows, Shared& shared) {
  // All rows at once: what they wait for twice is the memory.
  constexpr int kThreadsPerRow = kGroupThreads / kGroupRows, kDims = HEAD_DIM / kThreadsPerRow;
  const int first = threadIdx.x % kThreadsPerRow * kDims;
  const int row = threadIdx.x / kThreadsPerRow;
  if (row < rows) {
    uint32_t words[kDims / 8][4] = {};
    if (row < item.num_branches * p.group) {
      const int batch_row = p.rows[item.first_entry + p.branch_of(row)];
      const int64_t at =
          batch_row * p.q_stride + (head * p.group + p.member_of(row)) * HEAD_DIM + first;
#pragma unroll
      for (int i = 0; i < kDims / 8; ++i) {
        load_words(words[i], static_cast<const uint8_t*>(p.q) + 2 * (at + 8 * i));
      }
    }
    float q[kDims / 8][8], largest = 0;
#pragma unroll
    for (int i = 0; i < kDims / 8; ++i) {
      if (p.q_is_bf16) {
        to_floats<__nv_bfloat16>(q[i], words[i]);
      } else {
        to_floats<__half>(q[i], words[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(q[i][j]));
    }
#pragma unroll
    for (int distance = 1; distance < kThreadsPerRow; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    // As large as fp16 takes: small components stay normal numbers.
    const float scale = copysignf(power_of_two_scale(largest, 14), p.scale_log2);
    if (first == 0) shared.query_scale[row] = p.scale_log2 / scale;
#pragma unroll
    for (int i = 0; i < kDims / 8; ++i) {
      const int dim = first + 8 * i;
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[j] = as_u32(__floats2half2_rn(q[i][j] * scale, q[i][j + 4] * scale));
      }
      store_words(shared.queries[row / kGroupRows][tile_of(dim / 8)] +
                      swizzled(row % kGroupRows, slot_of(dim / 8)),
                  pairs);
    }
    publish_operands();
  }
}

// A reference rises where a thread's probabilities of a row and tile have a larger sum than this:
// until then each of them is far from fp16's end, with its precision.
constexpr float kMostSum = 1 << 14;

// The running softmax of a thread's two rows, 16 w + g and 8 further.
struct Softmax {
  float reference[2] = {-INFINITY, -INFINITY};
  float mass[2] = {};  // of the thread's columns

  // Turns logits (products, to be multiplied by `factor` > 0) into probabilities. Rescales `out`
  // where a reference rises. With `peaks` it does so by the logits, else once sums of probabilities
  // are large: as a rule nobody looks for a peak. Sets `lost` where a logit is too far above its
  // reference to be told from others.
  template <int kCount, int kOut>
  __device__ __forceinline__ void apply(float (&x)[kCount], const float (&factor)[2],
                                        float (&out)[kOut], bool peaks, bool& lost) {
    if (peaks) {
      wgmma_wait();
      settle(out);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float raised = fmaxf(reference[h], peak_of(x, h) * factor[h]);
        rescale(h, exp2_approx(reference[h] - raised), out);
        reference[h] = raised;
      }
    }
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int h = i % 2;
      x[2 * i] = exp2_approx(fmaf(x[2 * i], factor[h], -reference[h]));
      x[2 * i + 1] = exp2_approx(fmaf(x[2 * i + 1], factor[h], -reference[h]));
      sums[h] += x[2 * i] + x[2 * i + 1];
    }
    if (!__all_sync(~0u, sums[0] <= kMostSum && sums[1] <= kMostSum)) {
      wgmma_wait();
      settle(out);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float peak = peak_of(x, h);
        if (!(peak < INFINITY)) lost = true;
        const float scale = fminf(power_of_two_scale(peak, 0), 1.0f);
        reference[h] += 127 - (__float_as_int(scale) >> 23);
        rescale(h, scale, out);
        sums[h] *= scale;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) x[i / 2 * 4 + 2 * h + i % 2] *= scale;
      }
    }
    mass[0] += sums[0], mass[1] += sums[1];
  }

 private:
  // The largest element of row h, in all lanes that have a part of it.
  template <int kCount>
  static __device__ __forceinline__ float peak_of(const float (&x)[kCount], int h) {
    float peak = x[2 * h];
#pragma unroll
    for (int i = 1; i < kCount / 2; ++i) peak = fmaxf(peak, x[i / 2 * 4 + 2 * h + i % 2]);
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
    return fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
  }
  template <int kOut>
  __device__ __forceinline__ void rescale(int h, float scale, float (&out)[kOut]) {
    mass[h] *= scale;
#pragma unroll
    for (int i = 0; i < kOut / 2; ++i) out[i / 2 * 4 + 2 * h + i % 2] *= scale;
  }
};

// 64 query rows and their running attention: the share of a thread.
struct Rows {
  // The queries' operands of the first steps are held in registers, which leaves shared memory to
  // others.
  static constexpr int kSteps = HEAD_DIM / 16, kTileSteps = kSteps / kTiles, kHeld = 3;
  uint32_t held[kHeld][4];
  uint32_t queries;  // operand of all
  int which;
  float factor[2];  // of products, or of capped logits, to logits
  Softmax softmax;
  float out[D / 2] = {};

  __device__ __forceinline__ Rows(const Shared& shared, int which, bool capped) : which(which) {
    const int row = first_row();
    queries = opaque(operand(shared_address(shared.queries[which])));
#pragma unroll
    for (int i = 0; i < 4 * kHeld; ++i) {
      const int step = i / 4, slot = step % kTileSteps * 2 + i / 2 % 2;
      held[step][i % 4] =
          *reinterpret_cast<const uint32_t*>(shared.queries[which][step / kTileSteps] +
                                             swizzled(row + i % 2 * 8, slot) + threadIdx.x % 4 * 4);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[h] = capped ? 1.0f : shared.query_scale[which * kGroupRows + row + 8 * h];
    }
  }
  // The thread's rows are this and 8 further.
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
  }

  template <int kTile>
  __device__ __forceinline__ void multiply_keys(float (&x)[kTile / 2], uint32_t keys) const {
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int tile = step / kTileSteps, piece = step % kTileSteps * 2;
      const uint32_t b = keys + tile * (kTile * kSwizzledRow / 16) + piece;
      if (step < kHeld) {
        wgmma_by_rows(x, held[step], b, step > 0);
      } else {
        wgmma_shared_by_rows(x, queries + tile * (kGroupRows * kSwizzledRow / 16) + piece, b);
      }
    }
    wgmma_commit();
  }

  // Of products: soft caps, and nothing of tokens beyond `valid`.
  template <int kTile>
  __device__ __forceinline__ void prepare(float (&x)[kTile / 2], int valid, float cap_log2,
                                          const float (&query_scale)[kMostRows]) const {
    if (cap_log2 > 0) {
      const float* scale = query_scale + which * kGroupRows + first_row();
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) x[i] = soft_cap(x[i] * scale[i / 2 % 2 * 8], cap_log2);
    }
    if (valid < kTile) {
      const int t = threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) {
        if (i / 4 * 8 + 2 * t + i % 2 >= valid) x[i] = -INFINITY;
      }
    }
  }

  // Products to probabilities. Rows that are empty have queries of zero.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&x)[kCount], bool peaks, bool& lost) {
    softmax.apply(x, factor, out, peaks, lost);
  }
  // Probabilities as operands of the next product.
  template <int kCount>
  static __device__ __forceinline__ void pack(uint32_t (&weights)[kCount / 8][4],
                                              const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      weights[i / 4][i % 4] = as_u32(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
    }
  }

  template <int kSteps>
  __device__ __forceinline__ void multiply_values(const uint32_t (&weights)[kSteps][4],
                                                  uint32_t values) {
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma_by_columns(out, weights[step], values + step * (16 * kSwizzledRow / 16));
    }
    wgmma_commit();
  }

  // Waits for all products.
  __device__ __forceinline__ void finish() {
    wgmma_wait();
    settle(out);
  }
  // Softmax mass of the rows, complete in every lane that has a part of them.
  __device__ __forceinline__ void add_mass() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      softmax.mass[h] += __shfl_xor_sync(~0u, softmax.mass[h], 1);
      softmax.mass[h] += __shfl_xor_sync(~0u, softmax.mass[h], 2);
    }
  }
  // Leaves the rows' states. They pass through the shared memory of the queries, whose products are
  // over, so that a warp stores whole rows.
  __device__ __forceinline__ void store(const DecodeParams& p, const WorkItem& item, int head,
                                        int which, Shared& shared) const {
    constexpr int kQuads = HEAD_DIM / 4;  // of a row, one for each lane
    const int warp = threadIdx.x % kGroupThreads / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    float* staged = reinterpret_cast<float*>(&shared.queries[which]) + warp * 8 * HEAD_DIM;
    // Of 8 quads side by side, those of row r are permuted by exclusive or with r.
    const auto quad = [&](int row, int i) {
      return staged + (row * kQuads + i / 8 * 8 + (i % 8 ^ row)) * 4;
    };
    block_barrier_wait(kEnds + which, kGroupThreads);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // The columns 2t and 2t + 1 of a piece are its dims t and t + 4.
#pragma unroll
      for (int piece = 0; piece < HEAD_DIM / 8; ++piece) {
        const int i = tile_of(piece) * kPieces + slot_of(piece);
        quad(g, 2 * piece)[t] = out[4 * i + 2 * h];
        quad(g, 2 * piece + 1)[t] = out[4 * i + 2 * h + 1];
      }
      const int first = which * kGroupRows + warp * 16 + h * 8;
      const int end = item.num_branches * p.group - first;  // of the rows there are
      const int64_t own = state_index(p, item, head, first + g);
      if (t == 0 && g < end) {
        p.state_sum[own] = make_float2(softmax.reference[h], softmax.mass[h]);
      }
      const auto own_quads = static_cast<uint32_t>(own * kQuads);  // 2^32 of them are 64 GiB
      __syncwarp();
#pragma unroll
      for (int row = 0; row < 8; ++row) {
        const uint32_t quads = __shfl_sync(~0u, own_quads, row * 4);
        const float4 x = *reinterpret_cast<const float4*>(quad(row, min(lane, kQuads - 1)));
        if (row < end && lane < kQuads) reinterpret_cast<float4*>(p.state_out)[quads + lane] = x;
      }
      __syncwarp();
    }
  }
};

}  // namespace warpgroup
}  // namespace patternkv
