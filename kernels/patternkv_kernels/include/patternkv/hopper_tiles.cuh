// How the code rows and the metadata of the hopper kernel's tiles come to shared memory.
#pragma once

#include "patternkv/hopper_memory.cuh"

namespace patternkv {
namespace hopper {

// Brings the tiles of a work item. Every token has two threads, one for K's metadata and one for
// V's. Tokens beyond the end repeat the last one, so that no byte outside the segment is read.
template <typename Memory>
struct Feed {
  const DecodeParams& p;
  int thread;
  HeadPool pool;
  const int* slots;  // of the item's first token
  Memory& memory;
  int last;             // token of the item, counted from its first
  int slot;             // of the tile to ask for next
  int slot0, slot1;     // of the first tiles
  uint32_t ids, scale;  // of the tile after the present one, as loaded: unpacking waits for them
  uint32_t first_ids, first_scale;
  float code_scale, value_scale;

  __device__ __forceinline__ Feed(const DecodeParams& p, const WorkItem& item, int head, int thread,
                                  Memory& memory)
      : p(p),
        thread(thread),
        pool(p.pool, head),
        slots(p.req_to_token + uniform(item.req) * p.req_stride + uniform(item.start)),
        memory(memory),
        last(uniform(item.end - 1 - item.start)) {}

  __device__ __forceinline__ int token() const { return thread % kTile; }
  __device__ __forceinline__ int side() const { return thread / kTile; }
  __device__ __forceinline__ int count() const { return last / kTile + 1; }  // of tiles

  __device__ __forceinline__ int load_slot(int n) const {
    return slots[min(n * kTile + token(), last)];
  }
  __device__ __forceinline__ void put_units(int n, int slot) {
    if (side() == 0) memory.units[n % 2][token()] = pool.row_units(p.pool, slot);
  }
  __device__ __forceinline__ void load_metadata(int slot) {
    const uint16_t* words = pool.metadata_words(p.pool, slot);
    ids = words[0], scale = words[1 + side()];
  }
  __device__ __forceinline__ void put_token(int stage, uint32_t ids, uint32_t scale) {
    Token& to = memory.tokens[stage][token()];
    if (side() == 0) {
      to.k_scale = half_bits_to_float(scale) * code_scale;
      to.table_offset = Table<Memory::kQueryRows>::pattern_offset(ids & 0xff);
    } else {
      const float v_scale = fminf(half_bits_to_float(scale) * value_scale, kMostScale);
      to.v_scale = as_u32(__float2half2_rn(v_scale));
      memory.patterns[stage][token()] = __float2half_rn(static_cast<float>(ids >> 8));
    }
  }
  __device__ __forceinline__ void issue(int n) {
    copy_rows<kTile, kThreads>(p.copy16, shared_address(memory.codes[n % kStages]), pool.codes,
                               opaque(thread),
                               [&](int token) { return memory.units[n % 2][token]; });
    cp_async_commit();
  }

  // Looks up the tokens of the first tiles.
  __device__ __forceinline__ void look_up() {
    slot0 = load_slot(0), slot1 = load_slot(1);
    slot = load_slot(2);
  }
  // Asks for the first two tiles.
  __device__ __forceinline__ void start() {
    put_units(0, slot0);
    put_units(1, slot1);
    load_metadata(slot0);
    first_ids = ids, first_scale = scale;
    load_metadata(slot1);
    __syncthreads();
    issue(0);
    issue(1);
  }
  // Waits for the first tile and everything that was stored before. `code_scale` brings products
  // with codes, but for a token's scale, to logits.
  __device__ __forceinline__ void begin(float code_scale) {
    this->code_scale = code_scale;
    float largest = side() == 1 ? half_bits_to_float(first_scale) : 0.0f;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    if (thread % 32 == 0) memory.largest[thread / 32][0] = largest;
    __syncthreads();
    largest = fmaxf(memory.largest[kWarps / 2][0], memory.largest[kWarps / 2 + 1][0]);
    // A power of two that leaves later tokens room for scales far beyond the first tile's.
    value_scale = largest > 0 ? power_of_two_scale(largest, -4) : 1.0f / 16;
    put_token(0, first_ids, first_scale);
    cp_async_wait<1>();
    __syncthreads();
  }
  // At work on tile n, before a barrier: the next is then there.
  __device__ __forceinline__ void receive(int n) {
    put_token((n + 1) % kStages, ids, scale);
    put_units(n + 2, slot);
    cp_async_wait<0>();
  }
  // After that barrier: asks for the tile after the next.
  __device__ __forceinline__ void ask(int n) {
    if (n + 2 >= count()) return;
    issue(n + 2);
    load_metadata(slot);
    slot = load_slot(n + 3);
  }
};

}  // namespace hopper
}  // namespace patternkv
