// Packed codes to fp16 pairs without conversions: a code is or-ed into the mantissa of 1024, so
// that the half reads 1024 + code * 2^shift, exactly. Rows of codes become MMA fragments without
// shuffles, since the order of an MMA's k index is free as long as both operands agree on it.
#pragma once

#include "patternkv/ptx.cuh"

namespace patternkv {

constexpr uint32_t kMagic = 0x64006400;  // half2(1024, 1024)
constexpr int kMaskedUnit = 1 << 24;     // a code is this many times the masked one

template <int kBits>
struct Codes {
  static_assert(kBits == 2 || kBits == 4);
  static constexpr int kPerWord = 32 / kBits;
  static constexpr int kPerHalf = 16 / kBits;
  static constexpr float kCentre = ((1 << kBits) - 1) / 2.0f;

  // Place value of expanded pair r: codes sit as high in the mantissa as two shifts allow, which
  // keeps the ratio of the bias 1024 to a code's step small where the bias stays in.
  static constexpr __host__ __device__ int step(int r) {
    return 4 << (kBits * (r % (kPerHalf / 2)));
  }

  // Codes r and r + kPerHalf of the word's kPerWord: out[r] = half2(1024 + step(r) * code).
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[kPerHalf]) {
    const uint32_t low = word << 2, high = word >> (8 - 2);
    constexpr uint32_t mask = ((1u << kBits) - 1) * 0x00040004u;
#pragma unroll
    for (int r = 0; r < kPerHalf / 2; ++r) {
      out[r] = and_or(low, mask << (kBits * r), kMagic);
      out[r + kPerHalf / 2] = and_or(high, mask << (kBits * r), kMagic);
    }
  }

  // What expand's bias adds to step(r) * (code - centre), per unit of the other operand.
  static constexpr __host__ __device__ float bias(int r) { return 1024.0f + kCentre * step(r); }

  // Place value of masked pair r.
  static constexpr __host__ __device__ int masked_step(int r) {
    return 1 << (kBits * (r % (kPerHalf / 2)));
  }

  // Pair r of a word as fp16 subnormals, masked_step(r) * code / kMaskedUnit: no bias to take off,
  // and a product multiplies them exactly.
  static __device__ __forceinline__ uint32_t mask_pair(uint32_t word, int r) {
    constexpr uint32_t mask = ((1u << kBits) - 1) * 0x00010001u;
    return word >> r / (kPerHalf / 2) * 8 & mask << (kBits * (r % (kPerHalf / 2)));
  }

  // Place value of centred pair r.
  static constexpr __host__ __device__ int centred_step(int r) {
    return 2 << (kBits * (r % (kPerHalf / 2)));
  }

  // `pair` holds kPerHalf codes of one token in its low half and of another in its high half:
  // out[r] = half2(centred_step(r) * (code r - centre)), exactly: one bit below the code makes
  // room for the half in the centre.
  static __device__ __forceinline__ void expand_centred(uint32_t pair, uint32_t (&out)[kPerHalf]) {
    const uint32_t low = pair << 1, high = pair >> (8 - 1);
    constexpr uint32_t mask = ((1u << kBits) - 1) * 0x00020002u;
#pragma unroll
    for (int r = 0; r < kPerHalf / 2; ++r) {
      const float offset = 1024.0f + kCentre * centred_step(r);
      const __half2 centre = __float2half2_rn(offset);
      out[r] = as_u32(__hsub2(as_half2(and_or(low, mask << (kBits * r), kMagic)), centre));
      out[r + kPerHalf / 2] =
          as_u32(__hsub2(as_half2(and_or(high, mask << (kBits * r), kMagic)), centre));
    }
  }
};

}  // namespace patternkv
