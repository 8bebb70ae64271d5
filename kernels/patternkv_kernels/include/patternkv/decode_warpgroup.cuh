// Attention of up to 128 query rows over a chunk of tokens, with the asynchronous matrix products
// of compute capability 9.0: K and V are dequantized to fp16 operands in shared memory, once for
// all rows. A block is four warpgroups. A consumer has 64 rows, as many as a product; the others
// are producers, which dequantize a tile each in turn. So up to 64 rows have one consumer and three
// producers, up to 128 rows two of each.
#pragma once

#include "patternkv/decode_units.cuh"
#include "patternkv/warpgroup_rows.cuh"
#include "patternkv/warpgroup_tiles.cuh"

namespace patternkv {
namespace warpgroup {

// How the warpgroups of a block share an item.
struct Shares {
  int num_rows;
  int consumers, producers;

  __device__ __forceinline__ Shares(const DecodeParams& p, const WorkItem& item)
      : num_rows(item.num_branches * p.group),
        consumers(num_rows <= kGroupRows ? 1 : kMostConsumers),
        producers(kGroups - consumers) {}
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
  __device__ __forceinline__ void take() const { block_barrier_wait(kTurns + consumer, kThreads); }
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
  const __half* channels[2] = {table_channels(p, item.table, 0, head),
                               table_channels(p, item.table, 1, head)};
  feed.start(channels, producer);
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
    if (place.phase > 0) shared.keys[place.stage].read.at().wait(place.phase - 1);
    dequantize<K_BITS>(operands.keys, keys, pieces,
                       [&](Pieces& next) { next.load<V_BITS>(values, 0); });
    shared.keys[place.stage].have_written();
    if (place.phase > 0) shared.values[place.stage].read.at().wait(place.phase - 1);
    dequantize<V_BITS>(operands.values, values, pieces, [](Pieces&) {});
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

  Rows rows(shared, consumer, p.cap_log2 > 0);
  const int tokens = item.end - item.start, tiles = num_tiles<kTile>(item);
  const int plain_tiles = p.cap_log2 > 0 ? 0 : tokens / kTile;
  Turns turns(consumer, shares.consumers, tiles - 1);
  TileAddress<kTile> now(shared, memory.operands, first_tile), before = now;
  bool keys_there = false;
  for (int tile = 0; tile < tiles; ++tile) {
    const TileAddress<kTile> next = now.next();
    if (!keys_there) now.keys_written().wait(now.phase);
    float x[kTile / 2];
    rows.multiply_keys<kTile>(x, now.keys);
    if (tile > 0) turns.pass();
    rows.finish();  // the values of the tile before too
    settle(x);
    now.have_read_keys(shares.consumers);
    if (tile > 0) before.have_read_values(shares.consumers);
    // Asked before the softmax, the answers cost no time.
    const bool values_there = now.values_written().test(now.phase), more = tile + 1 < tiles;
    keys_there = more && next.keys_written().test(next.phase);
    if (__builtin_expect(tile >= plain_tiles, false)) {
      rows.prepare<kTile>(x, tokens - tile * kTile, p.cap_log2, shared.query_scale);
    }
    uint32_t weights[kTile / 16][4];
    rows.weigh(x, weights, tile == 0);
    if (!values_there) now.values_written().wait(now.phase);
    if (more && shares.consumers > 1) {
      // A turn is for these values and the next keys: for what is there.
      if (!keys_there) next.keys_written().wait(next.phase);
      keys_there = true;
      turns.take();
    }
    rows.multiply_values(weights, now.values());
    before = now, now = next;
  }
  rows.finish();
  before.have_read_values(shares.consumers);
  rows.add_mass();
  rows.store(p, item, head, consumer, shared);
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
