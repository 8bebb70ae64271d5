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
  int consumers, producers;

  __device__ __forceinline__ Shares(const DecodeParams& p, const WorkItem& item)
      : consumers(item.num_branches * p.group <= kGroupRows ? 1 : kMostConsumers),
        producers(kGroups - consumers) {}
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
    if (place.phase > 0) shared.values[place.stage].read.at().wait(place.phase - 1);
    // Only now, when stores to shared memory have had time to end.
    shared.keys[place.stage].have_written();
    dequantize<V_BITS>(operands.values, values, pieces, [](Pieces&) {});
    feed.receive(n);
    shared.values[place.stage].have_written();
    group_barrier(producer);
  }
}

template <int kTile>
__device__ __forceinline__ void consume(const DecodeParams& p, const WorkItem& item, int head,
                                        uint8_t* bytes, const Shares& shares, int consumer,
                                        int first_tile, bool careful) {
  auto& memory = *reinterpret_cast<Memory<kTile>*>(bytes);
  auto& shared = memory.shared;
  load_queries(p, item, head, shares.consumers * kGroupRows, shared);
  __syncthreads();

  Rows rows(shared, consumer, p.cap_log2 > 0);
  const int tokens = item.end - item.start, tiles = num_tiles<kTile>(item);
  const int plain_tiles = p.cap_log2 > 0 ? 0 : tokens / kTile;
  TileAddress<kTile> now(shared, memory.operands, first_tile);
  float x[kTile / 2];
  uint32_t weights[kTile / 16][4];
  const auto weigh = [&](int tile, bool peaks) {
    if (__builtin_expect(tile >= plain_tiles, false)) {
      rows.prepare<kTile>(x, tokens - tile * kTile, p.cap_log2, shared.query_scale);
    }
    rows.weigh(x, peaks, shared.lost);
  };
  const auto begin = [&](int tile) {
    now.keys_written().wait(now.phase);
    rows.multiply_keys<kTile>(x, now.keys);
    rows.finish();
    settle(x);
    now.have_read_keys(shares.consumers);
    weigh(tile, true);
    rows.pack(weights, x);
  };
  const auto end = [&] {
    now.values_written().wait(now.phase);
    rows.multiply_values(weights, now.values());
    rows.finish();
    now.have_read_values(shares.consumers);
  };
  begin(0);
  int tile = 1;
  if (careful) {
    for (; tile < tiles; ++tile) {
      end();
      now = now.next();
      begin(tile);
    }
  }
  // The next keys are multiplied ahead of a tile's values, whose products then run beside the
  // softmax of these keys. Without branches among products: they would wait for each other.
  bool values_there = false, keys_there = false;
  for (; tile < tiles; ++tile) {
    const TileAddress<kTile> next = now.next();
    if (!keys_there) next.keys_written().wait(next.phase);
    rows.multiply_keys<kTile>(x, next.keys);
    if (!values_there) now.values_written().wait(now.phase);
    rows.multiply_values(weights, now.values());
    wgmma_wait<1>();
    settle(x);
    next.have_read_keys(shares.consumers);
    // Asked before the softmax, the answers cost no time.
    const TileAddress<kTile> later = next.next();
    values_there = next.values_written().test(next.phase);
    keys_there = tile + 1 < tiles && later.keys_written().test(later.phase);
    weigh(tile, false);
    rows.finish();
    now.have_read_values(shares.consumers);
    rows.pack(weights, x);
    now = next;
  }
  end();
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
  if (threadIdx.x == 0) next_unit = blockIdx.x;
  __syncthreads();
  int tiles = 0;  // of the items before
  const auto for_each = [&](auto work) {
    bool careful = false;
    const auto attend = [&](const WorkItem& item, int head) {
      // The work begins with a barrier.
      if (threadIdx.x == 0) shared.lost = false;
      work(item, head, Shares(p, item), careful);
      tiles += num_tiles<kTile>(item);
    };
    // Never but where a logit is 2^7 above the largest before.
    const auto again = [&] { return careful = shared.lost && !careful; };
    for_each_unit(p.work.many(), p.pool.h_kv, next_unit, attend, again);
  };
  if (group < kMostConsumers) {
    raise_registers<kConsumerRegisters>();
    for_each([&](const WorkItem& item, int head, const Shares& shares, bool careful) {
      if (group < shares.consumers) {
        consume<kTile>(p, item, head, aligned, shares, group, tiles, careful);
      } else {
        produce<kTile>(p, item, head, aligned, shares, group - shares.consumers, tiles);
      }
    });
  } else {
    lower_registers<kProducerRegisters>();
    for_each([&](const WorkItem& item, int head, const Shares& shares, bool) {
      produce<kTile>(p, item, head, aligned, shares, group - shares.consumers, tiles);
    });
  }
  end_after_previous_kernel();
}

}  // namespace warpgroup
}  // namespace patternkv
