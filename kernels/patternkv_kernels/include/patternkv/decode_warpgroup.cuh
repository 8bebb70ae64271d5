// Attention of up to 128 query rows over a chunk of tokens, with the asynchronous matrix products
// of compute capability 9.0: K and V are dequantized to fp16 operands in shared memory, once for
// all rows. A block is four warpgroups. A consumer has 64 rows, as many as a product; the others are
// producers, which dequantize a tile each in turn. So up to 64 rows have one consumer and three
// producers, up to 128 rows two of each.
#pragma once

#include "patternkv/warpgroup_tiles.cuh"

namespace patternkv {
namespace warpgroup {

// References rise for logits (log2) this far above them: until then probabilities have the precision
// of fp16 and are far from its end.
constexpr float kLead = 10.0f;

// The running softmax of a thread's two rows, 16 w + g and 8 further.
struct Softmax {
  float reference[2] = {-INFINITY, -INFINITY};
  float mass[2] = {};  // of the thread's columns

  // Logits (products, to be multiplied by `factor` > 0) to probabilities, as operands of the next
  // product. Rescales `out` where a reference rises.
  template <int kCount, int kOut>
  __device__ __forceinline__ void apply(const float (&x)[kCount], float (&factor)[2],
                                        float (&out)[kOut], uint32_t (&weights)[kCount / 8][4]) {
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kCount; ++i) peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], x[i]);
    const auto ahead = [&](int h) { return peak[h] * factor[h] > reference[h] + kLead; };
    if (__any_sync(~0u, ahead(0) || ahead(1))) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 1));
        peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 2));
        const float raised = ahead(h) ? peak[h] * factor[h] : reference[h];
        const float scale = exp2_approx(reference[h] - raised);
        reference[h] = raised;
        mass[h] *= scale;
#pragma unroll
        for (int i = 0; i < kOut / 4; ++i) {
          out[4 * i + 2 * h] *= scale;
          out[4 * i + 2 * h + 1] *= scale;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int h = i % 2;
      const float p0 = exp2_approx(fmaf(x[2 * i], factor[h], -reference[h]));
      const float p1 = exp2_approx(fmaf(x[2 * i + 1], factor[h], -reference[h]));
      mass[h] += p0 + p1;
      weights[i / 4][i % 4] = as_u32(__floats2half2_rn(p0, p1));
    }
  }
};

// x[j] of thread t of four becomes x[t] of thread j.
__device__ __forceinline__ void transpose_quad(float (&x)[4], int t) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = t & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      // Of the elements i and i + distance, the lower threads give the second, the upper the first.
      float &low = x[i], &high = x[i + distance];
      const float got = __shfl_xor_sync(~0u, upper ? low : high, distance);
      (upper ? low : high) = got;
    }
  }
}

// 64 query rows and their running attention: the share of a thread.
struct Rows {
  uint32_t queries;  // shared address
  float query_scale[2];
  bool busy;  // else all rows of the warp are empty
  Softmax softmax;
  float out[D / 2] = {};

  __device__ __forceinline__ Rows(const Shared& shared, int which, int num_rows) {
    const int row = first_row();
    queries = shared_address(shared.queries[which]);
    busy = row / 16 * 16 < num_rows - which * kGroupRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      query_scale[h] = shared.query_scale[which * kGroupRows + row + 8 * h];
    }
  }
  // The thread's rows are this and 8 further.
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
  }

  template <int kTile>
  __device__ __forceinline__ void multiply_keys(float (&x)[kTile / 2],
                                                const Operands<kTile>& operands) const {
    const uint32_t keys = shared_address(operands.keys);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      const int tile = step / 4, byte = step % 4 * 32;
      wgmma_shared_by_rows(x, operand(queries + tile * (kGroupRows * kSwizzledRow) + byte),
                           operand(keys + tile * (kTile * kSwizzledRow) + byte), step > 0);
    }
    wgmma_commit();
  }

  // Products of `valid` tokens to probabilities.
  template <int kTile>
  __device__ __forceinline__ void weigh(float (&x)[kTile / 2], uint32_t (&weights)[kTile / 16][4],
                                        int valid, float cap_log2) {
    if (!busy) {
      set_zero(weights);
      return;
    }
    float factor[2] = {query_scale[0], query_scale[1]};
    if (cap_log2 > 0) {
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) x[i] = soft_cap(x[i] * factor[i / 2 % 2], cap_log2);
      factor[0] = factor[1] = 1;
    }
    if (valid < kTile) {
      const int t = threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) {
        if (i / 4 * 8 + 2 * t + i % 2 >= valid) x[i] = -INFINITY;
      }
    }
    softmax.apply(x, factor, out, weights);
  }

  template <int kTile>
  __device__ __forceinline__ void multiply_values(const uint32_t (&weights)[kTile / 16][4],
                                                  const Operands<kTile>& operands) {
    const uint32_t values = shared_address(operands.values);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      wgmma_by_columns(out, weights[step],
                       operand(values + step * (16 * kSwizzledRow), kTile * kSwizzledRow));
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
  __device__ __forceinline__ void store(const DecodeParams& p, const WorkItem& item, int head,
                                        int which) const {
    const int t = threadIdx.x % 4, rows = item.num_branches * p.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = which * kGroupRows + first_row() + 8 * h;
      const int64_t at = state_index(p, item, head, min(row, rows - 1));
      if (t == 0 && row < rows) p.state_sum[at] = make_float2(softmax.reference[h], softmax.mass[h]);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        // The columns 2t and 2t + 1 of 8 are the dims t and t + 4. Of 16 dims, the four threads of a
        // row have four in turn.
        float x[4] = {out[8 * i + 2 * h], out[8 * i + 2 * h + 1], out[8 * i + 4 + 2 * h],
                      out[8 * i + 4 + 2 * h + 1]};
        transpose_quad(x, t);
        if (row < rows) {
          *reinterpret_cast<float4*>(p.state_out + at * HEAD_DIM + 16 * i + 4 * t) =
              make_float4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }
};

// How the warpgroups of a block share an item.
struct Shares {
  int num_rows;
  int consumers, producers;
  // Threads at the barrier of a tile: its producer's, and of those who use it.
  int tile_threads;

  __device__ __forceinline__ Shares(const DecodeParams& p, const WorkItem& item)
      : num_rows(item.num_branches * p.group),
        consumers(num_rows <= kGroupRows ? 1 : kMostConsumers),
        producers(kGroups - consumers),
        tile_threads(kGroupThreads * (1 + consumers)) {}
};

template <int kTile>
__device__ __forceinline__ void produce(const DecodeParams& p, const WorkItem& item, int head,
                                        uint8_t* bytes, const Shares& shares, int producer) {
  auto& memory = *reinterpret_cast<Memory<kTile>*>(bytes);
  auto& shared = memory.shared;
  uint8_t* k_patterns = bytes + sizeof(Memory<kTile>);
  uint8_t* v_patterns = k_patterns + p.num_patterns * HEAD_DIM * 2;
  const int thread = threadIdx.x - shares.consumers * kGroupThreads;

  // The first patterns travel while the first tile is looked up.
  const __half* from[2] = {table_rows(p, item.table, 0, head), table_rows(p, item.table, 1, head)};
  const int threads = shares.producers * kGroupThreads, end = p.num_patterns * (HEAD_DIM / 8);
  PatternBatch first_k{thread, threads, end}, first_v{thread, threads, end};
  first_k.load(from[0], 0);
  first_v.load(from[1], 0);
  Feed<kTile> feed(p, item, head, memory, producer, shares.producers);
  feed.start(producer);
  if (thread < 2 * HEAD_DIM) {
    const int side = thread / HEAD_DIM, dim = thread % HEAD_DIM;
    shared.channels[side][place_of(dim)] = table_channels(p, item.table, side, head)[dim];
  }
  first_k.store(k_patterns, 0);
  first_v.store(v_patterns, 0);
  const int batch = PatternBatch::kBatch * threads;
  for (int first = batch; first < end; first += batch) {
    first_k.load(from[0], first);
    first_v.load(from[1], first);
    first_k.store(k_patterns, first);
    first_v.store(v_patterns, first);
  }
  cp_async_wait<0>();
  __syncthreads();

  for (int n = 0; n < feed.count; ++n) {
    const int tile = n * shares.producers + producer, stage = tile % kStages;
    auto& operands = memory.operands[stage];
    const auto keys = feed.keys(n, k_patterns), values = feed.values(n, v_patterns);
    feed.ask(n);
    Pieces pieces;
    pieces.load<K_BITS>(keys, 0);
    if (tile >= kStages) block_barrier_wait(kKeysEmpty + stage, shares.tile_threads);
    dequantize<K_BITS>(operands.keys, shared.channels[0], keys, pieces,
                       [&](Pieces& next) { next.load<V_BITS>(values, 0); });
    publish_operands();
    block_barrier_arrive(kKeysFull + stage, shares.tile_threads);
    if (tile >= kStages) block_barrier_wait(kValuesEmpty + stage, shares.tile_threads);
    dequantize<V_BITS>(operands.values, shared.channels[1], values, pieces, [](Pieces&) {});
    feed.receive(n);
    publish_operands();
    block_barrier_arrive(kValuesFull + stage, shares.tile_threads);
    group_barrier(producer);
  }
}

template <int kTile>
__device__ __forceinline__ void consume(const DecodeParams& p, const WorkItem& item, int head,
                                        uint8_t* bytes, const Shares& shares, int consumer) {
  auto& memory = *reinterpret_cast<Memory<kTile>*>(bytes);
  auto& shared = memory.shared;
  load_queries(p, item, head, shares.consumers * kGroupRows, shared);
  __syncthreads();

  Rows rows(shared, consumer, shares.num_rows);
  const int tiles = (item.end - item.start + kTile - 1) / kTile;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages;
    const auto& operands = memory.operands[stage];
    block_barrier_wait(kKeysFull + stage, shares.tile_threads);
    float x[kTile / 2];
    rows.multiply_keys<kTile>(x, operands);
    rows.finish();  // the values of the tile before too
    settle(x);
    // The last stages have nobody who waits for them.
    if (tile + kStages < tiles) block_barrier_arrive(kKeysEmpty + stage, shares.tile_threads);
    if (tile > 0 && tile - 1 + kStages < tiles) {
      block_barrier_arrive(kValuesEmpty + (tile - 1) % kStages, shares.tile_threads);
    }
    uint32_t weights[kTile / 16][4];
    rows.weigh<kTile>(x, weights, item.end - item.start - tile * kTile, p.cap_log2);
    block_barrier_wait(kValuesFull + stage, shares.tile_threads);
    rows.multiply_values<kTile>(weights, operands);
  }
  rows.finish();
  rows.add_mass();
  rows.store(p, item, head, consumer);
}

// kTile is 64, or 32 where large tables leave no room.
template <int kTile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  __shared__ int next_unit;
  launch_dependents();
  uint8_t* aligned = memory + (kAlign - shared_address(memory) % kAlign) % kAlign;
  // The same for all lanes, which the compiler cannot know of threadIdx.x.
  const int group = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  const auto for_each = [&](auto work) {
    for_each_unit(p.work.many(), p.pool.h_kv, next_unit, work);
  };
  if (group < kMostConsumers) {
    raise_registers<kConsumerRegisters>();
    for_each([&](const WorkItem& item, int head) {
      const Shares shares(p, item);
      if (group < shares.consumers) {
        consume<kTile>(p, item, head, aligned, shares, group);
      } else {
        produce<kTile>(p, item, head, aligned, shares, group - shares.consumers);
      }
    });
  } else {
    lower_registers<kProducerRegisters>();
    for_each([&](const WorkItem& item, int head) {
      const Shares shares(p, item);
      produce<kTile>(p, item, head, aligned, shares, group - shares.consumers);
    });
  }
  end_after_previous_kernel();
}

}  // namespace warpgroup
}  // namespace patternkv
