// The code rows of a tile of tokens: how they are laid out in shared memory and get there, and
// words and metadata on their way to registers.
//
// Tensor-core operands: codes are A (tokens on M for q.k, head dims on M for p.v), queries and
// probabilities are B. Lane l of a warp has g = l / 4 and t = l % 4.
//   K  lane t of token g holds the contiguous dims [t * D/4, (t+1) * D/4).
//   V  lane group g holds contiguous dims of the tokens 2t, 2t+1, 2t+8, 2t+9.
#pragma once

#include <type_traits>

#include "patternkv/codes.cuh"
#include "patternkv/decode_params.cuh"

namespace patternkv {

using KCodes = Codes<K_BITS>;
using VCodes = Codes<V_BITS>;

// Head dim inside the kernels: 96 runs as 128 whose last dims have zero queries and no output.
constexpr int D = HEAD_DIM == 96 ? 128 : HEAD_DIM;
// Code rows in shared memory. The padding of V's spreads the four tokens that a warp reads at once
// over all banks.
constexpr int kKStride = D * K_BITS / 8;
constexpr int kVRowBytes = D * V_BITS / 8;
constexpr int kVStride = kVRowBytes > 16 ? kVRowBytes + 16 : kVRowBytes;

// One head of the pool. Code rows go by offsets in units of 8 bytes, which fit 32 bits.
struct HeadPool {
  const uint8_t* codes;     // of slot 0
  const uint8_t* metadata;  // of slot 0

  __device__ HeadPool(const SlotPool& pool, int head)
      : codes(pool.k_row({pool.base, 0}, head)),
        metadata(reinterpret_cast<const uint8_t*>(pool.metadata({pool.base, 0}, head))) {}

  __device__ __forceinline__ uint32_t row_units(const SlotPool& pool, int slot) const {
    const uint32_t page = pool.page_of(slot);
    return page * (pool.page_bytes / 8) + (slot - page * pool.page_size) * (CODE_BYTES / 8);
  }
  __device__ __forceinline__ const uint16_t* metadata_words(const SlotPool& pool, int slot) const {
    const uint32_t page = pool.page_of(slot);
    return reinterpret_cast<const uint16_t*>(metadata + uint64_t{page} * pool.page_bytes +
                                             (slot - page * pool.page_size) * METADATA_BYTES);
  }
};

// Copies the code rows of kTokens tokens to shared memory, K's and then V's, kThreadsUsed threads
// together; `units_of(token)` gives a row's offset and must be called by whole warps. With kWhole
// neighbouring threads copy a token's two rows, which lie side by side, as one: fewer requests of
// the L2 cache for more instructions.
template <int kTokens, int kThreadsUsed, int kKeyStride, int kValueStride, int kBytes, bool kWhole,
          typename UnitsOf>
__device__ __forceinline__ void copy_rows_by(uint32_t shared, const uint8_t* codes, int thread,
                                             UnitsOf units_of) {
  const auto copy = [&](auto parts_constant, auto&& each) {
    constexpr int kParts = decltype(parts_constant)::value, kTotal = kTokens * kParts;
    constexpr int kCopies = (kTotal + kThreadsUsed - 1) / kThreadsUsed;
    struct Copy {
      int token, part;
      bool inside;
      uint64_t units;
    };
    const auto look_up = [&](int first) {
      int token, part;
      if constexpr (kThreadsUsed % kParts == 0) {
        token = first / kParts + thread / kParts, part = thread % kParts;
      } else {
        token = (first + thread) / kParts, part = (first + thread) % kParts;
      }
      const bool inside = kTotal % kThreadsUsed == 0 || first + thread < kTotal;
      return Copy{token, part, inside, units_of(inside ? token : 0)};
    };
    const auto start = [&](const Copy& copy) {
      const int byte = copy.part * kBytes;
      if (copy.inside) each(copy.token, byte, codes + copy.units * 8 + byte);
    };
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) start(look_up(i * kThreadsUsed));
    } else {
      // All look-ups ahead of all copies: the compiler does not move them there.
      Copy copies[kCopies];
#pragma unroll
      for (int i = 0; i < kCopies; ++i) copies[i] = look_up(i * kThreadsUsed);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) start(copies[i]);
    }
  };
  const auto copy_k = [&](int token, int byte, const uint8_t* row) {
    cp_async<kBytes>(shared + token * kKeyStride + byte, row);
  };
  const auto copy_v = [&](int token, int byte, const uint8_t* row) {
    cp_async<kBytes>(shared + kTokens * kKeyStride + token * kValueStride + byte,
                     row + K_ROW_BYTES);
  };
  using KParts = std::integral_constant<int, K_ROW_BYTES / kBytes>;
  using VParts = std::integral_constant<int, V_ROW_BYTES / kBytes>;
  using AllParts = std::integral_constant<int, KParts::value + VParts::value>;
  if constexpr (kWhole && kThreadsUsed % AllParts::value == 0) {
    // A thread has the same part of all its tokens.
    const int part = thread % AllParts::value;
    const bool is_key = part < KParts::value;
    const uint32_t to = shared + part * kBytes + (is_key ? 0 : kTokens * kKeyStride - K_ROW_BYTES);
    const int stride = is_key ? kKeyStride : kValueStride;
    copy(AllParts{},
         [&](int token, int, const uint8_t* row) { cp_async<kBytes>(to + token * stride, row); });
  } else if constexpr (K_ROW_BYTES == V_ROW_BYTES) {
    copy(KParts{}, [&](int token, int byte, const uint8_t* row) {
      copy_k(token, byte, row);
      copy_v(token, byte, row);
    });
  } else {
    copy(KParts{}, copy_k);
    copy(VParts{}, copy_v);
  }
}

template <int kTokens, int kThreadsUsed, int kKeyStride = kKStride, int kValueStride = kVStride,
          bool kWhole = false, typename UnitsOf>
__device__ __forceinline__ void copy_rows(bool copy16, uint32_t shared, const uint8_t* codes,
                                          int thread, UnitsOf units_of) {
  if constexpr (K_ROW_BYTES % 16 == 0 && V_ROW_BYTES % 16 == 0) {
    if (copy16) {
      copy_rows_by<kTokens, kThreadsUsed, kKeyStride, kValueStride, 16, kWhole>(shared, codes,
                                                                                thread, units_of);
      return;
    }
  }
  copy_rows_by<kTokens, kThreadsUsed, kKeyStride, kValueStride, 8, kWhole>(shared, codes, thread,
                                                                           units_of);
}

// Metadata of a token as loaded: unpacking it at once would wait for the load.
struct RawToken {
  uint32_t pattern_ids, k_scale, v_scale;  // 16 bits each

  __device__ float k_scale_float() const { return half_bits_to_float(k_scale); }
  __device__ float v_scale_float() const { return half_bits_to_float(v_scale); }
};

__device__ __forceinline__ RawToken load_token(const uint16_t* words) {
  return {words[0], words[1], words[2]};
}

// A lane's D / 4 dims of K codes of the tokens g and g + 8.
struct KeyWords {
  static constexpr int kCount = D / 4 * K_BITS / 32;
  uint32_t low[kCount], high[kCount];
};

template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&out)[kWords], const uint8_t* shared) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      reinterpret_cast<uint4&>(out[4 * i]) = reinterpret_cast<const uint4*>(shared)[i];
    }
  } else if constexpr (kWords == 2) {
    reinterpret_cast<uint2&>(out[0]) = *reinterpret_cast<const uint2*>(shared);
  } else {
    static_assert(kWords == 1);
    out[0] = *reinterpret_cast<const uint32_t*>(shared);
  }
}

// The same of global memory; the load stays where it is written, ahead of what waits for its
// values.
template <int kWords, typename T>
__device__ __forceinline__ void load_early(uint32_t (&out)[kWords], const T* global) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      reinterpret_cast<uint4&>(out[4 * i]) = load_early(reinterpret_cast<const uint4*>(global) + i);
    }
  } else if constexpr (kWords == 2) {
    reinterpret_cast<uint2&>(out[0]) = load_early(reinterpret_cast<const uint2*>(global));
  } else {
    static_assert(kWords == 1);
    out[0] = load_early(reinterpret_cast<const uint32_t*>(global));
  }
}

template <int kWords>
__device__ __forceinline__ void store_words(uint8_t* shared, const uint32_t (&x)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4&>(x[4 * i]);
    }
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(shared) = reinterpret_cast<const uint2&>(x[0]);
  } else {
    static_assert(kWords == 1);
    *reinterpret_cast<uint32_t*>(shared) = x[0];
  }
}

__device__ __forceinline__ KeyWords load_keys(const uint8_t* rows, int token, int t) {
  KeyWords words;
  const uint8_t* row = rows + token * kKStride + t * (D / 4 * K_BITS / 8);
  load_words(words.low, row);
  load_words(words.high, row + 8 * kKStride);
  return words;
}

}  // namespace patternkv
