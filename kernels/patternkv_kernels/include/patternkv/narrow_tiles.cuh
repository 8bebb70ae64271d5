// A warp's attention to tiles of 32 tokens for up to 8 query rows, in the narrow kernel.
#pragma once

#include "patternkv/decode_units.cuh"
#include "patternkv/narrow_queries.cuh"

namespace patternkv {
namespace narrow {

constexpr int kRows = 8;
constexpr int kTile = 32;
constexpr int kTileBytes = kTile * (kKStride + kVStride);
constexpr int kRingBytes = 2 * kTileBytes;        // of a warp
constexpr int kDims = D / 8;                      // of V and the output, per lane
constexpr int kUnits = kDims / VCodes::kPerHalf;  // 16-bit units of V codes per lane and token

// Brings a lane's V codes of two tokens together: unit u of token a in the low half, of b in the
// high.
struct ValuePair {
  uint32_t units[kUnits + kUnits % 2];

  __device__ __forceinline__ void load(const uint8_t* a, const uint8_t* b) {
    if constexpr (kUnits == 1) {
      units[0] = *reinterpret_cast<const uint16_t*>(a) |
                 static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(b)) << 16;
    } else {
      constexpr int kWords = (kUnits + 1) / 2;
      uint32_t x[kWords], y[kWords];
      load_words(x, a);
      load_words(y, b);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        units[2 * w] = __byte_perm(x[w], y[w], 0x5410);
        units[2 * w + 1] = __byte_perm(x[w], y[w], 0x7632);
      }
    }
  }
};

// One warp's running attention. Lane (g, t) holds the output of columns 2t and 2t + 1 and the
// references of these rows (modulo kLive).
struct State {
  // [pair of dims i][n-tile]: dims 2i, 2i, 2i+1, 2i+1 of the two columns, sums of masked codes.
  float out[kDims / 2][1][4] = {};
  float weights[4] = {};                        // their sums, of the two columns twice
  float reference[2] = {-INFINITY, -INFINITY};  // whole numbers (log2)
};

// What a lane keeps of its item through all tiles.
struct Lane {
  uint32_t q[D / 8];
  float bias[2];
  float code_scale, value_scale;
  FixedPoint fixed;
  const float* table;   // at row 2t
  uint32_t* histogram;  // of the warp
  uint32_t bins;        // its shared address at row 2t
  int words;
};

// Metadata of a lane's own token, in the form in which its group of readers needs it. Made before
// the next tile's is asked for: who waits for a loaded register may wait for later loads too.
struct Token {
  float k_scale;
  uint32_t v_scale;  // half2
  uint32_t pattern_ids;

  __device__ __forceinline__ Token(const RawToken& raw, const Lane& own)
      : k_scale(raw.k_scale_float() * own.code_scale),
        v_scale(as_u32(__float2half2_rn(fminf(raw.v_scale_float() * own.value_scale, 4096.0f)))),
        pattern_ids(raw.pattern_ids) {
    compute_now(k_scale), compute_now(v_scale), compute_now(pattern_ids);
  }
};

// Raises the references of rows whose peaks, over the lane's logits, get too far ahead, and
// rescales.
template <int kLive>
__device__ __forceinline__ void raise_reference(State& state, const Lane& own, float (&peak)[2]) {
  const int lane = threadIdx.x % 32;
  float shift[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int distance = kLive / 2; distance < 32; distance *= 2) {
      peak[i] = fmaxf(peak[i], __shfl_xor_sync(~0u, peak[i], distance));
    }
    const float old = state.reference[i];
    const float raised = peak[i] > old + kSlack ? ceilf(peak[i]) + own.fixed.headroom : old;
    const float scale = exp2_approx(old - raised);
    shift[i] = old == -INFINITY ? 0.0f : raised - old;  // an empty histogram needs no shift
    state.reference[i] = raised;
    state.weights[i] *= scale, state.weights[i + 2] *= scale;
#pragma unroll
    for (int d = 0; d < kDims / 2; ++d) {
      state.out[d][0][i] *= scale;
      state.out[d][0][i + 2] *= scale;
    }
  }
  // Word e of the histogram is of row e % kLive, which is the same for all of a lane's.
  const int row = lane % kLive;
  const float even = __shfl_sync(~0u, shift[0], row / 2), odd = __shfl_sync(~0u, shift[1], row / 2);
  const int bits = static_cast<int>(fminf(row % 2 ? odd : even, 31.0f));
  __syncwarp();
  if (bits > 0) {
    for (int e = lane; e < own.words; e += 32) own.histogram[e] >>= bits;
  }
  __syncwarp();
}

template <int kLive>
__device__ __forceinline__ void attend_tile(const DecodeParams& p, State& state, const Lane& own,
                                            const uint8_t* tile, const Token& token, int valid) {
  constexpr int kOwn = kLive == 4 ? 1 : 2;  // slices of 16 tokens whose softmax a lane works out
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const KeyWords keys[2] = {load_keys(tile, g, t), load_keys(tile, 16 + g, t)};
  float x[2][4];  // [slice]: columns 2t and 2t + 1 of token g, then of token g + 8
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    x[s][0] = x[s][2] = -own.bias[0];
    x[s][1] = x[s][3] = -own.bias[1];
#pragma unroll
    for (int w = 0; w < KeyWords::kCount; ++w) {
      uint32_t low[KCodes::kPerHalf], high[KCodes::kPerHalf];
      KCodes::expand(keys[s].low[w], low);
      KCodes::expand(keys[s].high[w], high);
#pragma unroll
      for (int r = 0; r < KCodes::kPerHalf; r += 2) {
        const int slot = w * KCodes::kPerHalf + r;
        mma_m16n8k16(x[s], low[r], high[r], low[r + 1], high[r + 1], own.q[slot], own.q[slot + 1]);
      }
    }
  }
  if constexpr (kOwn == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float moved = __shfl_up_sync(~0u, x[1][i], 2);
      x[0][i] = t < 2 ? x[0][i] : moved;
    }
  }

  // V's codes come from shared memory while the softmax is worked out.
  const uint8_t* value_rows = tile + kTile * kKStride + 2 * t * kVStride + g * (kDims * V_BITS / 8);
  ValuePair first[2], second[2];  // V codes of the tokens 2t, 2t+1 and 2t+8, 2t+9 of each slice
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint8_t* row = value_rows + s * 16 * kVStride;
    first[s].load(row, row + kVStride);
    second[s].load(row + 8 * kVStride, row + 9 * kVStride);
  }

  uint32_t v_scale[kOwn][2], bins[kOwn][2];
  const int first_token = (kOwn == 1 ? t / 2 * 16 : 0) + g;
#pragma unroll
  for (int s = 0; s < kOwn; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int source = first_token + s * 16 + h * 8;
      const float scale = __shfl_sync(~0u, token.k_scale, source);
      const uint32_t pattern_ids = __shfl_sync(~0u, token.pattern_ids, source);
      v_scale[s][h] = __shfl_sync(~0u, token.v_scale, source);
      bins[s][h] = own.bins + (pattern_ids >> 8) * (kLive * 4);
      const float2 product =
          *reinterpret_cast<const float2*>(own.table + (pattern_ids & 0xff) * kLive);
      x[s][2 * h] = fmaf(x[s][2 * h], scale, product.x);
      x[s][2 * h + 1] = fmaf(x[s][2 * h + 1], scale, product.y);
    }
  }
  if (p.cap_log2 > 0) {
#pragma unroll
    for (int i = 0; i < 4 * kOwn; ++i) x[i / 4][i % 4] = soft_cap(x[i / 4][i % 4], p.cap_log2);
  }
  if (valid < kTile) {
#pragma unroll
    for (int i = 0; i < 4 * kOwn; ++i) {
      if (first_token + i / 4 * 16 + i % 4 / 2 * 8 >= valid) x[i / 4][i % 4] = -INFINITY;
    }
  }
  float peak[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    peak[i] = fmaxf(x[0][i], x[0][i + 2]);
    if constexpr (kOwn == 2) peak[i] = fmaxf(peak[i], fmaxf(x[1][i], x[1][i + 2]));
  }
  if (__any_sync(~0u,
                 peak[0] > state.reference[0] + kSlack || peak[1] > state.reference[1] + kSlack)) {
    raise_reference<kLive>(state, own, peak);
  }

  uint32_t weights[2][2];  // B operands: [slice], tokens 2t, 2t+1 and 2t+8, 2t+9 of row g
#pragma unroll
  for (int s = 0; s < kOwn; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float p0 = exp2_approx(x[s][2 * h] - state.reference[0]);
      const float p1 = exp2_approx(x[s][2 * h + 1] - state.reference[1]);
      add_shared(bins[s][h], own.fixed.encode(p0));
      add_shared(bins[s][h] + 4, own.fixed.encode(p1));
      weights[s][h] =
          movmatrix_trans(as_u32(__hmul2(__floats2half2_rn(p0, p1), as_half2(v_scale[s][h]))));
      // The second slice is in columns 4 to 7. What is in those of its own operand does not matter.
      if constexpr (kOwn == 1) weights[1][h] = __shfl_down_sync(~0u, weights[0][h], 16);
    }
  }
  const uint32_t one = as_u32(__float2half2_rn(1.0f));
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    mma_m16n8k16(state.weights, one, one, one, one, weights[s][0], weights[s][1]);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint32_t low = first[s].units[u], high = second[s].units[u];
#pragma unroll
      for (int r = 0; r < VCodes::kPerHalf; r += 2) {
        mma_m16n8k16(state.out[(u * VCodes::kPerHalf + r) / 2][0], VCodes::mask_pair(low, r),
                     VCodes::mask_pair(low, r + 1), VCodes::mask_pair(high, r),
                     VCodes::mask_pair(high, r + 1), weights[s][0], weights[s][1]);
      }
    }
  }
}

}  // namespace narrow
}  // namespace patternkv
