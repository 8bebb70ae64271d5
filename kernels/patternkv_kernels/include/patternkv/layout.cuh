// Where the bytes of a slot are: SlotFormat of format.py, on the device.
//
// A module is compiled for one format: PKV_K_BITS, PKV_V_BITS and PKV_HEAD_DIM come from jit.py.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace patternkv {

constexpr int K_BITS = PKV_K_BITS;
constexpr int V_BITS = PKV_V_BITS;
constexpr int HEAD_DIM = PKV_HEAD_DIM;
static_assert((K_BITS == 2 || K_BITS == 4) && (V_BITS == 2 || V_BITS == 4),
              "codes have 2 or 4 bits");
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256, "head dims are 64, 96, 128 and 256");

constexpr int K_ROW_BYTES = HEAD_DIM * K_BITS / 8;
constexpr int V_ROW_BYTES = HEAD_DIM * V_BITS / 8;
constexpr int CODE_BYTES = K_ROW_BYTES + V_ROW_BYTES;
constexpr int METADATA_BYTES = 6;

// The 6-byte record of a slot and head, 2-byte aligned.
struct Metadata {
  uint16_t pattern_ids;  // K in the low byte, V in the high byte
  __half k_scale, v_scale;

  __host__ __device__ int k_pattern_id() const { return pattern_ids & 0xff; }
  __host__ __device__ int v_pattern_id() const { return pattern_ids >> 8; }
};
static_assert(sizeof(Metadata) == METADATA_BYTES && alignof(Metadata) == 2);

// The page of a slot and its place there.
struct SlotPlace {
  uint8_t* page;
  int offset;
};

// The packed pool of one layer, uint8 [num_pages, page_bytes].
struct SlotPool {
  uint8_t* base;
  uint32_t page_multiplier;  // slot / page_size = umulhi(2 * slot, page_multiplier) >> page_shift
  int page_shift;
  int page_size;
  int h_kv;
  uint32_t page_bytes;

  // With 2^s >= page_size, ceil(2^(31+s) / page_size) fits 32 bits and the product with a slot
  // below 2^31 exceeds slot * 2^(31+s) / page_size by less than 2^(31+s) / page_size: the floor is
  // exact.
  static SlotPool make(void* base, int page_size, int h_kv) {
    int shift = 0;
    while ((int64_t{1} << shift) < page_size) ++shift;
    uint64_t multiplier = ((uint64_t{1} << (31 + shift)) + page_size - 1) / page_size;
    return {static_cast<uint8_t*>(base),
            static_cast<uint32_t>(multiplier),
            shift,
            page_size,
            h_kv,
            static_cast<uint32_t>(bytes_of_page(page_size, h_kv))};
  }

  static int64_t bytes_of_page(int64_t page_size, int64_t h_kv) {
    int64_t bytes = h_kv * page_size * (CODE_BYTES + METADATA_BYTES);
    return (bytes + 7) / 8 * 8;
  }

  __device__ uint32_t page_of(int slot) const {
    return __umulhi(2u * slot, page_multiplier) >> page_shift;
  }
  __device__ SlotPlace locate(int slot) const {
    uint32_t page = page_of(slot);
    return {base + uint64_t{page} * page_bytes, static_cast<int>(slot - page * page_size)};
  }

  // Code rows, 8-byte aligned; 16-byte where K_ROW_BYTES and V_ROW_BYTES are multiples of 16 and
  // page_bytes is. V's row follows K's.
  __device__ uint8_t* k_row(SlotPlace place, int head) const {
    return place.page + (head * page_size + place.offset) * CODE_BYTES;
  }
  __device__ uint8_t* v_row(SlotPlace place, int head) const {
    return k_row(place, head) + K_ROW_BYTES;
  }
  __device__ Metadata* metadata(SlotPlace place, int head) const {
    uint8_t* records = place.page + h_kv * page_size * CODE_BYTES;
    return reinterpret_cast<Metadata*>(records) + head * page_size + place.offset;
  }
};

}  // namespace patternkv
