// The queries of an item of the hopper kernel, as operands, and their products with K's patterns.
#pragma once

#include "patternkv/hopper_memory.cuh"

namespace patternkv {
namespace hopper {

// Asks for the queries of the item's rows, into `weights`, and for the channel scales that they
// meet. Rows beyond them are zero. Lane l of a warp looks up the l-th of the rows that its lanes
// bring together.
template <typename Memory>
struct AskedQueries {
  static constexpr int kPieces = HEAD_DIM / 8, kCount = Memory::kQueryRows * kPieces;
  static constexpr int kAtOnce = 32 / kPieces;  // rows of a warp
  static constexpr int kSteps = (kCount + kThreads - 1) / kThreads;
  static_assert(kAtOnce * kSteps <= 32);

  int row, batch_row = 0;
  bool live;
  uint32_t channels[4];  // of the thread's piece of every row

  static __device__ __forceinline__ int row_of(int step, int warp, int place) {
    return (step * kWarps + warp) * kAtOnce + place;
  }
  __device__ __forceinline__ AskedQueries(const DecodeParams& p, const WorkItem& item, int head,
                                          int thread)
      : row(row_of(thread % 32 / kAtOnce, thread / 32, thread % kAtOnce)),
        live(row < item.num_branches * p.group && thread % 32 < kAtOnce * kSteps) {
    if (live) batch_row = p.rows[item.first_entry + p.branch_of(row)];
    load_early(channels, table_channels(p, item.table, 0, head) + thread % kPieces * 8);
  }
  __device__ __forceinline__ void issue(const DecodeParams& p, int head, int thread,
                                        Memory& memory) const {
    const int lane = thread % 32;
    // In units of 16 bytes.
    const int own = batch_row * static_cast<int>(p.q_stride / 8) +
                    (head * p.group + p.member_of(row)) * kPieces;
    const uint32_t alive = __ballot_sync(~0u, live);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int source = step * kAtOnce + lane / kPieces;
      const int at = __shfl_sync(~0u, own, source) + lane % kPieces;
      if ((step + 1) * kThreads > kCount && step * kThreads + thread >= kCount) break;
      uint8_t* to = memory.weights[1] + (step * kThreads + thread) * 16;
      if (alive >> source & 1) {
        cp_async<16>(shared_address(to), static_cast<const uint4*>(p.q) + at);
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      }
    }
    cp_async_commit();
  }
};

// Fills the query operands, and raw ones in `weights` for the table, once the queries are there.
// Ends with a barrier. Loops stay loops: code that runs once per item waits for instructions.
template <typename Memory>
__device__ __forceinline__ QueryScales load_queries(const DecodeParams& p,
                                                    const AskedQueries<Memory>& asked, int thread,
                                                    Memory& memory) {
  constexpr int kRows = Memory::kQueryRows, kPieces = HEAD_DIM / 8, kCount = kRows * kPieces;
  static_assert(kCount % 32 == 0, "warps take part in a step as a whole");
  const int warp = thread / 32, piece = thread % kPieces;
  cp_async_wait<2>();  // two tiles were asked for after the queries
  __syncthreads();
  float channel[8];
  to_floats<__half>(channel, asked.channels);
  const auto to_queries = [&](const uint32_t (&words)[4], float (&q)[8]) {
    if (p.q_is_bf16) {
      to_floats<__nv_bfloat16>(q, words);
    } else {
      to_floats<__half>(q, words);
    }
  };
  // Magnitudes of 16-bit floats are ordered like their bits, of which those of NaN and infinity
  // count as the largest number.
  uint32_t magnitudes[4] = {};
#pragma unroll
  for (int at = thread; at < kCount; at += kThreads) {
    uint32_t words[4];
    load_words(words, memory.weights[1] + at * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) magnitudes[j] = __vmaxu2(magnitudes[j], words[j] & 0x7fff7fff);
  }
  float largest[2] = {};
  {
    const uint32_t most = p.q_is_bf16 ? 0x7f7f7f7f : 0x7bff7bff;
    uint32_t words[4];
    float q[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = __vminu2(magnitudes[j], most);
    to_queries(words, q);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      largest[0] = fmaxf(largest[0], q[j]);
      largest[1] = fmaxf(largest[1], fabsf(q[j] * channel[j]));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest[0] = fmaxf(largest[0], __shfl_xor_sync(~0u, largest[0], distance));
    largest[1] = fmaxf(largest[1], __shfl_xor_sync(~0u, largest[1], distance));
  }
  if (thread % 32 == 0) {
    memory.largest[warp][0] = largest[0], memory.largest[warp][1] = largest[1];
  }
  if (thread < kRows) memory.reference[thread] = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    largest[0] = fmaxf(largest[0], memory.largest[w][0]);
    largest[1] = fmaxf(largest[1], memory.largest[w][1]);
  }
  // As large as fp16 takes with room for rounding: small components stay normal numbers.
  const float raw_scale = power_of_two_scale(largest[0], 14);
  const float code_scale = power_of_two_scale(largest[1], 13);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    channel[j] *= code_scale / KCodes::masked_step(j % KCodes::kPerHalf);
  }

  // As codes leave their words: lane t has a quarter of the dims, pairs of codes kPerHalf apart.
  const int t = piece / (kPieces / 4), own = piece % (kPieces / 4);
  const int first = own / (KCodes::kPerHalf / 4) * KCodes::kPerHalf;
  // As lane t takes 16 bytes of a pattern, two steps of products.
  const int raw = piece / 4 * 4;
#pragma unroll 1
  for (int at = thread; at < kCount; at += kThreads) {
    const int row = at / kPieces;
    uint32_t words[4];
    float q[8], centres = 0;
    load_words(words, memory.weights[1] + at * 16);
    to_queries(words, q);
    __half x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] = __float2half_rn(q[j] * channel[j]);
      centres += __half2float(x[j]) * KCodes::masked_step(j % KCodes::kPerHalf);
    }
#pragma unroll
    for (int r = 0; r < KCodes::kPerHalf; ++r) {
      uint8_t* to = memory.queries[first / 8] + swizzled(row, (first + r) % 8) + t * 4;
      if constexpr (K_BITS == 4) {
        *reinterpret_cast<__half2*>(to) = __halves2half2(x[r], x[r + 4]);
      } else {
        reinterpret_cast<__half*>(to)[own % 2] = x[r];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<uint32_t*>(memory.weights[0] + raw / 8 * (kRows * kSwizzledRow) +
                                   swizzled(row, raw % 8 + j) + piece % 4 * 4) =
          as_u32(__floats2half2_rn(q[2 * j] * raw_scale, q[2 * j + 1] * raw_scale));
    }
#pragma unroll
    for (int distance = 1; distance < kPieces; distance *= 2) {
      centres += __shfl_xor_sync(~0u, centres, distance);
    }
    if (piece == 0) memory.bias[row] = centres * (KCodes::kCentre / kMaskedUnit);
  }
  publish_operands();
  __syncthreads();
  return {p.scale_log2 / raw_scale, p.scale_log2 / code_scale * kMaskedUnit};
}

// Products of 64 rows in registers with all query rows of an operand, on top of `x`; committed.
template <int kRows>
__device__ __forceinline__ void multiply_queries(float (&x)[kRows / 2],
                                                 uint32_t (&a)[HEAD_DIM / 16][4],
                                                 const uint8_t* queries) {
  const uint32_t b = operand(shared_address(queries));
  settle(a);
  settle(x);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    wgmma_by_rows(x, a[step], b + step / 4 * (kRows * kSwizzledRow / 16) + step % 4 * 2);
  }
  wgmma_commit();
}

// A thread's dims of the K patterns of a group that it multiplies for the table. The first group is
// asked for ahead of the queries; and where V's patterns are not in the L2 cache, which the end of
// an item reads them from, they go there meanwhile.
struct KeyPatterns {
  uint32_t rows[2][HEAD_DIM / 32][4];

  __device__ __forceinline__ KeyPatterns(const DecodeParams& p, const WorkItem& item, int head,
                                         int group, int thread) {
    const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    const __half* patterns = table_rows(p, item.table, 0, head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pattern = min(group * kGroupPatterns + 16 * warp + 8 * h + g, p.num_patterns - 1);
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 32; ++k) {
        load_early(rows[h][k], patterns + pattern * HEAD_DIM + t * 8 + k * 32);
      }
    }
    constexpr int kLine = 64;  // elements
    const int line = group * (kGroupPatterns * HEAD_DIM / kLine) + thread;
    if (line * kLine < p.num_patterns * HEAD_DIM) {
      prefetch(table_rows(p, item.table, 1, head) + line * kLine);
    }
  }
};
static_assert(!kExists || kGroupPatterns * HEAD_DIM / 64 <= kThreads, "a thread has a line of V");

// Fills the table's group of patterns with their logits. Ends without a barrier.
template <typename Memory>
__device__ __forceinline__ void fill_table(const KeyPatterns& patterns, int group, int thread,
                                           Memory& memory, float scale) {
  constexpr int kRows = Memory::kQueryRows;
  using Table = hopper::Table<kRows>;
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  float x[kRows / 2] = {};
  // Zero, which the assembler cannot know before the queries are there: loaded patterns that became
  // operands earlier would be waited for earlier.
  const uint32_t nothing = __float_as_uint(memory.reference[0]);
  uint32_t a[HEAD_DIM / 16][4];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 4; ++i) {
    const int step = i / 4;
    a[step][i % 4] = patterns.rows[i % 2][step / 2][step % 2 * 2 + i % 4 / 2] ^ nothing;
  }
  multiply_queries<kRows>(x, a, memory.weights[0]);
  wgmma_wait();
  settle(x);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = Table::pattern_offset(group * kGroupPatterns + 16 * warp + 8 * h + g);
#pragma unroll
    for (int i = 0; i < kRows / 8; i += 2) {
      const float* from = x + 4 * i + 2 * h;
      *reinterpret_cast<float4*>(reinterpret_cast<uint8_t*>(memory.table) +
                                 Table::place(row, i, t)) =
          make_float4(from[0] * scale, from[1] * scale, from[4] * scale, from[5] * scale);
    }
  }
}

}  // namespace hopper
}  // namespace patternkv
