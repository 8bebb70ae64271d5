// The warpgroup products of the file of this name in kernels/, on a CPU (see simt.h). They finish
// at once: a missing wait does not show.
#pragma once

#include "patternkv/ptx.cuh"
#include "simt.h"

namespace patternkv {

constexpr int kSwizzledRow = 128;

inline uint32_t swizzled(int row, int piece) {
  return row * kSwizzledRow + ((piece ^ row % 8) * 16);
}

inline uint32_t operand(uint32_t address, uint32_t next_tile = 16) {
  return address / 16 | next_tile / 16 << 16;
}

template <int kCount>
void raise_registers() {}
template <int kCount>
void lower_registers() {}
inline void publish_operands() {}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int kPending = 0>
void wgmma_wait() {}

template <int kCount>
void settle(float (&)[kCount]) {}

template <int kCount, int kWords>
void settle(uint32_t (&)[kCount][kWords]) {}

// Element `column` of row `row` of an operand that starts at an address inside a tile: the hardware
// permutes pieces by the bits of their address that count rows.
inline float operand_element(uint32_t operand, int row, int column) {
  const uint32_t next_tile = (operand >> 16) * 16;
  uint32_t address =
      (operand & 0xffff) * 16 + column / 64 * next_tile + row * kSwizzledRow + column % 64 * 2;
  address ^= address / kSwizzledRow % 8 * 16;
  return __half2float(*reinterpret_cast<const __half*>(simt::memory.data() + address));
}

// What a thread brings to a product: its left operand in registers or, where these are null, in
// shared memory.
struct Product {
  float* c;
  const uint32_t* registers;
  uint32_t a, b;
  bool add;
};

// `b(operand, k, column)` of a product of 64 rows and 2 * kCount columns.
template <int kCount, typename B>
void multiply(const Product& own, B b) {
  simt::group_exchange(&own, [&](const void* const* products) {
    const auto product = [&](int thread) { return static_cast<const Product*>(products[thread]); };
    float left[64][16], right[16][2 * kCount];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 64; ++row) {
        if (own.registers == nullptr) {
          left[row][k] = operand_element(product(0)->a, row, k);
          continue;
        }
        const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
        const float2 pair =
            __half22float2(as_half2(product(thread)->registers[k / 8 * 2 + row / 8 % 2]));
        left[row][k] = k % 2 ? pair.y : pair.x;
      }
      for (int column = 0; column < 2 * kCount; ++column) {
        right[k][column] = b(product(0)->b, k, column);
      }
    }
    for (int thread = 0; thread < simt::kGroupThreads; ++thread) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (int i = 0; i < kCount; ++i) {
        float& c = product(thread)->c[i];
        double sum = product(thread)->add ? c : 0.0f;
        for (int k = 0; k < 16; ++k) {
          sum += double{left[row + i / 2 % 2 * 8][k]} * right[k][i / 4 * 8 + 2 * t + i % 2];
        }
        c = static_cast<float>(sum);
      }
    }
  });
}

template <int kCount>
void wgmma_by_rows(float (&c)[kCount], const uint32_t (&a)[4], uint32_t b, bool add = true) {
  multiply<kCount>({c, a, 0, b, add}, [](uint32_t operand, int k, int column) {
    return operand_element(operand, column, k);
  });
}

template <int kCount>
void wgmma_by_columns(float (&c)[kCount], const uint32_t (&a)[4], uint32_t b) {
  multiply<kCount>({c, a, 0, b, true}, [](uint32_t operand, int k, int column) {
    return operand_element(operand, k, column);
  });
}

template <int kCount>
void wgmma_shared_by_rows(float (&c)[kCount], uint32_t a, uint32_t b) {
  multiply<kCount>({c, nullptr, a, b, true}, [](uint32_t operand, int k, int column) {
    return operand_element(operand, column, k);
  });
}

inline void block_barrier_wait(int barrier, int threads) {
  simt::meet(simt::named[barrier], threads, [] {});
}

struct PhaseBarrierAddress {
  uint32_t address;

  void arrive(int times = 1) const;
  bool test(int phase) const;
  void wait(int phase) const {
    while (!test(phase)) simt::yield();
  }
};

struct PhaseBarrier {
  int16_t arrivals, missing;
  int phases;  // that have ended

  void init(int count) { arrivals = missing = count, phases = 0; }
  PhaseBarrierAddress at() const { return {shared_address(this)}; }
  static PhaseBarrier& of(uint32_t address) {
    return *reinterpret_cast<PhaseBarrier*>(simt::memory.data() + address);
  }
};

inline void PhaseBarrierAddress::arrive(int times) const {
  PhaseBarrier& barrier = PhaseBarrier::of(address);
  if ((barrier.missing -= times) == 0) {
    barrier.missing = barrier.arrivals;
    ++barrier.phases;
  }
  simt::yield();  // others may go on first
}
inline bool PhaseBarrierAddress::test(int phase) const {
  return PhaseBarrier::of(address).phases % 2 != phase % 2;
}

inline void group_barrier(int) {
  simt::group_exchange(nullptr, [](const void* const*) {});
}

}  // namespace patternkv
