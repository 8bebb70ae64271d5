// Attention of up to 128 query rows over a chunk of tokens, with the asynchronous matrix products
// of compute capability 9.0: K and V are dequantized to fp16 operands in shared memory, once for
// all rows. A block is four warpgroups. A consumer has 64 rows, as many as a product; the others
// are producers, which dequantize a tile each in turn. So up to 64 rows have one consumer and three
// producers, up to 128 rows two of each.
#pragma once

#include "patternkv/warpgroup_tiles.cuh"

namespace patternkv {
namespace warpgroup {

// A reference rises where a thread's probabilities of a row and tile have a larger sum than this:
// until then each of them is far from fp16's end, with its precision.
constexpr float kMostSum = 1 << 14;

// The running softmax of a thread's two rows, 16 w + g and 8 further.
struct Softmax {
  float reference[2] = {-INFINITY, -INFINITY};
  float mass[2] = {};  // of the thread's columns

  // Logits (products, to be multiplied by `factor` > 0) to probabilities, as operands of the next
  // product. Rescales `out` where a reference rises, which is seen of the sums alone: no peak is
  // looked for until then.
  template <int kCount, int kOut>
  __device__ __forceinline__ void apply(const float (&x)[kCount], const float (&factor)[2],
                                        float (&out)[kOut], uint32_t (&weights)[kCount / 8][4]) {
    float sums[2];
    weigh(x, factor, weights, sums);
    if (__any_sync(~0u, !(sums[0] <= kMostSum && sums[1] <= kMostSum))) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float peak = x[2 * h];
#pragma unroll
        for (int i = 1; i < kCount / 2; ++i) peak = fmaxf(peak, x[i / 2 * 4 + 2 * h + i % 2]);
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
        const float raised = fmaxf(reference[h], peak * factor[h]);
        const float scale = exp2_approx(reference[h] - raised);
        reference[h] = raised;
        mass[h] *= scale;
#pragma unroll
        for (int i = 0; i < kOut / 4; ++i) {
          out[4 * i + 2 * h] *= scale;
          out[4 * i + 2 * h + 1] *= scale;
        }
      }
      weigh(x, factor, weights, sums);
    }
    mass[0] += sums[0], mass[1] += sums[1];
  }

  // Probabilities against the references as they are, and the thread's sums of them.
  template <int kCount>
  __device__ __forceinline__ void weigh(const float (&x)[kCount], const float (&factor)[2],
                                        uint32_t (&weights)[kCount / 8][4],
                                        float (&sums)[2]) const {
    sums[0] = sums[1] = 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int h = i % 2;
      const float p0 = exp2_approx(fmaf(x[2 * i], factor[h], -reference[h]));
      const float p1 = exp2_approx(fmaf(x[2 * i + 1], factor[h], -reference[h]));
      sums[h] += p0 + p1;
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
  // The queries' operands of the first steps are held in registers, which leaves shared memory to
  // others.
  static constexpr int kSteps = HEAD_DIM / 16, kHeld = 3;
  uint32_t held[kHeld][4];
  uint32_t queries;
  float query_scale[2];
  bool busy;  // else all rows of the warp are empty
  Softmax softmax;
  float out[D / 2] = {};

  __device__ __forceinline__ Rows(const Shared& shared, int which, int num_rows) {
    const int row = first_row();
    queries = operand(shared_address(shared.queries[which]));
#pragma unroll
    for (int i = 0; i < 4 * kHeld; ++i) {
      const int place = row + i % 2 * 8, piece = i / 4 * 2 + i / 2 % 2;
      held[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(
          shared.queries[which][piece / 8] + swizzled(place, piece % 8) + threadIdx.x % 4 * 4);
    }
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
    const uint32_t keys = operand(shared_address(operands.keys));
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int tile = step / 4, piece = step % 4 * 2;
      const uint32_t b = keys + tile * (kTile * kSwizzledRow / 16) + piece;
      if (step < kHeld) {
        wgmma_by_rows(x, held[step], b, step > 0);
      } else {
        wgmma_shared_by_rows(x, queries + tile * (kGroupRows * kSwizzledRow / 16) + piece, b);
      }
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
    const uint32_t values = operand(shared_address(operands.values), kTile * kSwizzledRow);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
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
  __device__ __forceinline__ void store(const DecodeParams& p, const WorkItem& item, int head,
                                        int which) const {
    const int t = threadIdx.x % 4, rows = item.num_branches * p.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = which * kGroupRows + first_row() + 8 * h;
      const int64_t at = state_index(p, item, head, min(row, rows - 1));
      if (t == 0 && row < rows)
        p.state_sum[at] = make_float2(softmax.reference[h], softmax.mass[h]);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        // The columns 2t and 2t + 1 of 8 are the dims t and t + 4. Of 16 dims, the four threads of
        // a row have four in turn.
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

  __device__ __forceinline__ Shares(const DecodeParams& p, const WorkItem& item)
      : num_rows(item.num_branches * p.group),
        consumers(num_rows <= kGroupRows ? 1 : kMostConsumers),
        producers(kGroups - consumers) {}
};

// Where a tile's operands lie, and the how-manieth there they are. `n` counts the tiles of a block.
struct Place {
  int stage, phase;

  __device__ __forceinline__ explicit Place(int n) : stage(n % kStages), phase(n / kStages) {}
};

// Two consumers take turns at the tensor cores, so that one multiplies while the other has its
// softmax.
struct Turns {
  int consumer, left;

  // `count` of each, of nobody where there is one consumer.
  __device__ __forceinline__ Turns(int consumer, int consumers, int count)
      : consumer(consumer), left(consumers > 1 ? count : 0) {
    if (consumer > 0 && left > 0) block_barrier_arrive(kTurns, kThreads);
  }
  __device__ __forceinline__ void take() const {
    if (left > 0) block_barrier_wait(kTurns + consumer, kThreads);
  }
  __device__ __forceinline__ void pass() {
    // After the last turn nobody takes one.
    if (left > consumer) block_barrier_arrive(kTurns + 1 - consumer, kThreads);
    --left;
  }

 private:
  static constexpr int kThreads = kMostConsumers * kGroupThreads;
};

template <int kTile>
__device__ __forceinline__ int num_tiles(const WorkItem& item) {
  return (item.end - item.start + kTile - 1) / kTile;
}

template <int kTile>
__device__ __forceinline__ void produce(const DecodeParams& p, const WorkItem& item, int head,
                                        uint8_t* bytes, const Shares& shares, int producer,
                                        int first_tile) {
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
    const Place place(first_tile + n * shares.producers + producer);
    auto& operands = memory.operands[place.stage];
    const auto keys = feed.keys(n, k_patterns), values = feed.values(n, v_patterns);
    feed.ask(n);
    Pieces pieces;
    pieces.load<K_BITS>(keys, 0);
    if (place.phase > 0) shared.keys[place.stage].read.wait(place.phase - 1);
    dequantize<K_BITS>(operands.keys, shared.channels[0], keys, pieces,
                       [&](Pieces& next) { next.load<V_BITS>(values, 0); });
    shared.keys[place.stage].have_written();
    if (place.phase > 0) shared.values[place.stage].read.wait(place.phase - 1);
    dequantize<V_BITS>(operands.values, shared.channels[1], values, pieces, [](Pieces&) {});
    feed.receive(n);
    shared.values[place.stage].have_written();
    group_barrier(producer);
  }
}

template <int kTile>
__device__ __forceinline__ void consume(const DecodeParams& p, const WorkItem& item, int head,
                                        uint8_t* bytes, const Shares& shares, int consumer,
                                        int first_tile) {
  auto& memory = *reinterpret_cast<Memory<kTile>*>(bytes);
  auto& shared = memory.shared;
  load_queries(p, item, head, shares.consumers * kGroupRows, shared);
  __syncthreads();

  Rows rows(shared, consumer, shares.num_rows);
  const int tokens = item.end - item.start, tiles = num_tiles<kTile>(item);
  Turns turns(consumer, shares.consumers, tiles - 1);
  float x[kTile / 2];
  {
    const Place first(first_tile);
    auto& keys = shared.keys[first.stage];
    keys.written.wait(first.phase);
    rows.multiply_keys<kTile>(x, memory.operands[first.stage]);
    rows.finish();
    settle(x);
    keys.have_read(shares.consumers);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    uint32_t weights[kTile / 16][4];
    rows.weigh<kTile>(x, weights, tokens - tile * kTile, p.cap_log2);
    const Place place(first_tile + tile), next(first_tile + tile + 1);
    const bool more = tile + 1 < tiles;
    auto& values = shared.values[place.stage];
    auto& keys = shared.keys[next.stage];
    values.written.wait(place.phase);
    if (more && shares.consumers > 1) {
      // A turn is for what is there.
      keys.written.wait(next.phase);
      turns.take();
    }
    rows.multiply_values<kTile>(weights, memory.operands[place.stage]);
    if (more) {
      keys.written.wait(next.phase);
      rows.multiply_keys<kTile>(x, memory.operands[next.stage]);
      turns.pass();
    }
    rows.finish();
    settle(x);
    values.have_read(shares.consumers);
    if (more) keys.have_read(shares.consumers);
  }
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
  auto& shared = reinterpret_cast<Memory<kTile>*>(aligned)->shared;
  if (threadIdx.x < kStages) shared.keys[threadIdx.x].init(), shared.values[threadIdx.x].init();
  __syncthreads();
  int tiles = 0;  // of the items before
  const auto for_each = [&](auto work) {
    for_each_unit(p.work.many(), p.pool.h_kv, next_unit, [&](const WorkItem& item, int head) {
      work(item, head, Shares(p, item));
      tiles += num_tiles<kTile>(item);
    });
  };
  if (group < kMostConsumers) {
    raise_registers<kConsumerRegisters>();
    for_each([&](const WorkItem& item, int head, const Shares& shares) {
      if (group < shares.consumers) {
        consume<kTile>(p, item, head, aligned, shares, group, tiles);
      } else {
        produce<kTile>(p, item, head, aligned, shares, group - shares.consumers, tiles);
      }
    });
  } else {
    lower_registers<kProducerRegisters>();
    for_each([&](const WorkItem& item, int head, const Shares& shares) {
      produce<kTile>(p, item, head, aligned, shares, group - shares.consumers, tiles);
    });
  }
  end_after_previous_kernel();
}

}  // namespace warpgroup
}  // namespace patternkv
