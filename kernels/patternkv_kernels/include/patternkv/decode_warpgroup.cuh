// Attention of up to 128 query rows over a chunk of tokens, with the asynchronous matrix products of
// compute capability 9.0: K and V are dequantized to fp16 operands in shared memory, once for all
// rows. A block is three warpgroups, and a product has 64 rows.
//
//   up to 64 rows   every group takes every third tile, from codes to output; while products run it
//                   dequantizes what the next ones need. The three results are added at the end.
//   up to 128 rows  two groups have 64 rows each, the third dequantizes for both.
#pragma once

#include "patternkv/decode_tile.cuh"
#include "patternkv/wgmma.cuh"

namespace patternkv {
namespace warpgroup {

// Whether the kernel exists: the accumulators of 256 dims do not fit the registers.
constexpr bool kExists = PKV_WGMMA && HEAD_DIM <= 128;

constexpr int kGroupRows = 64;
constexpr int kMostRows = 2 * kGroupRows;
constexpr int kGroups = 3;
constexpr int kGroupThreads = 128;
constexpr int kBlockThreads = kGroups * kGroupThreads;
constexpr int kTiles = D / 64;  // operand tiles side by side
constexpr int kPieces = 8;      // 16-byte pieces of a tile's row

// Named barriers. Those of the groups come first (group_barrier).
constexpr int kFullBarrier = 1 + kGroups, kEmptyBarrier = kFullBarrier + kGroups;

// Metadata of a token's K or V as its readers need it.
struct Source {
  uint32_t pattern;  // bytes to the pattern in its table
  uint32_t scale;    // half2, scaled like those of the tokens around it
};

struct Shared {
  // Where groups share rows, their results take the place of the second 64 queries.
  uint8_t queries[kMostRows / kGroupRows][kTiles][kGroupRows * kSwizzledRow];
  float query_scale[kMostRows];  // of products to logits
  __half channels[2][D];         // channel scales
};

// K and V of a tile as operands.
template <int kTile>
struct alignas(1024) Operands {
  uint8_t keys[kTiles][kTile * kSwizzledRow];
  uint8_t values[kTiles][kTile * kSwizzledRow];
};

// The tiles on their way to one group.
template <int kTile>
struct alignas(128) Incoming {
  uint8_t codes[2][kTile * CODE_BYTES];  // K's rows, then V's
  Source sources[2][2][kTile];           // K's and V's
  uint32_t steps[2][2][kTile / 32];      // half2: scales of 32 tokens count in these
  uint32_t units[2][kTile];              // offsets of code rows
};

// [Shared][Operands of each group][Incoming of each group][K patterns][V patterns], from an address
// aligned to kAlign. Once the tiles are done, two groups leave their output behind Shared.
template <int kTile>
struct Memory {
  Shared shared;
  Operands<kTile> operands[kGroups];
  Incoming<kTile> incoming[kGroups];
};
constexpr int kAlign = 1024, kLeastAlign = 256;  // of a tile; what the launch gives anyway
constexpr int kOutputBytes = kGroupRows * D * 4;

template <int kTile>
constexpr int kPatternStart = offsetof(Memory<kTile>, incoming) + kGroups * sizeof(Incoming<kTile>);

template <int kTile>
__host__ __device__ __forceinline__ int shared_bytes(int num_patterns) {
  const int tiles = kPatternStart<kTile> + 2 * num_patterns * HEAD_DIM * 2;
  const int outputs = offsetof(Memory<kTile>, operands) + (kGroups - 1) * kOutputBytes;
  return kAlign - kLeastAlign + (tiles > outputs ? tiles : outputs);
}

// Inside a group of 8 dims everything here has the order 0, 4, 1, 5, 2, 6, 3, 7, in which codes come
// out of their words without being moved one by one.
__device__ __forceinline__ int place_of(int dim) {
  return dim / 8 * 8 + dim % 4 * 2 + dim / 4 % 2;
}

// Codes of 8 dims as pairs of fp16 numbers, the subnormals code * 2^-24 (pairs [0]) and
// code * 2^-20 (pairs [1]): no conversion, and no bias to take off.
template <int kBits>
__device__ __forceinline__ void expand_pairs(const uint8_t* codes, uint32_t (&pairs)[2][2]) {
  constexpr uint32_t mask = ((1u << kBits) - 1) * 0x00010001u;
  if constexpr (kBits == 4) {  // pair j is the codes j and j + 4; [j % 2][j / 2]
    const uint32_t word = *reinterpret_cast<const uint32_t*>(codes);
    pairs[0][0] = word & mask, pairs[1][0] = word & mask << 4;
    pairs[0][1] = word >> 8 & mask, pairs[1][1] = word >> 8 & mask << 4;
  } else {  // [j / 2][j % 2]
    const uint32_t half = *reinterpret_cast<const uint16_t*>(codes), word = half | half << 8;
    pairs[0][0] = word & mask, pairs[1][0] = word & mask << 4;
    pairs[0][1] = word >> 2 & mask, pairs[1][1] = word >> 2 & mask << 4;
  }
}

// Writes one side of a tile: pattern + scale * channel_scale * (code - centre). The threads of the
// group write a token's 16-byte pieces side by side.
template <int kBits, int kTile>
__device__ __forceinline__ void dequantize(uint8_t (&tiles)[kTiles][kTile * kSwizzledRow],
                                           const __half* channels, const uint8_t* codes,
                                           int code_stride, const uint8_t* patterns,
                                           const Source (&sources)[kTile],
                                           const uint32_t (&steps_of)[kTile / 32]) {
  const int thread = threadIdx.x % kGroupThreads, piece = thread % kPieces;
  const __half2 centre = __float2half2_rn(-Codes<kBits>::kCentre / (1 << 20));
#pragma unroll
  for (int first = 0; first < kTile; first += 32) {
    // From shared memory each time: registers are what is scarce.
    uint32_t scales[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      load_words(scales[i], reinterpret_cast<const uint8_t*>(channels + i * 64 + piece * 8));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __half2 scale = __hmul2(as_half2(scales[i][j]), as_half2(steps_of[first / 32]));
        scales[i][j] = as_u32(__hmin2(scale, __float2half2_rn(65504.0f)));
      }
    }
#pragma unroll
    for (int n = 0; n < 32 / (kGroupThreads / kPieces); ++n) {
      const int token = first + n * (kGroupThreads / kPieces) + thread / kPieces;
      const Source own = sources[token];
      const __half2 scale[2] = {__hmul2(as_half2(own.scale), __float2half2_rn(16.0f)),
                                as_half2(own.scale)};
      const __half2 offset = __hmul2(as_half2(own.scale), centre);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int dim = i * 64 + piece * 8;
        if (dim >= HEAD_DIM) continue;
        uint32_t pairs[2][2], x[4];
        expand_pairs<kBits>(codes + token * code_stride + dim * kBits / 8, pairs);
        load_words(x, patterns + own.pattern + dim * 2);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int high = kBits == 4 ? j % 2 : j / 2, which = kBits == 4 ? j / 2 : j % 2;
          const __half2 steps = __hfma2(as_half2(pairs[high][which]), scale[high], offset);
          x[j] = as_u32(__hfma2(steps, as_half2(scales[i][j]), as_half2(x[j])));
        }
        store_words(tiles[i] + swizzled(token, piece), x);
      }
    }
  }
}

// Brings the patterns of one side to shared memory.
__device__ __forceinline__ void load_patterns(const __half* from, int num_patterns, uint8_t* to) {
  constexpr int kBatch = 4;
  const int end = num_patterns * (HEAD_DIM / 8);
  for (int first = threadIdx.x; first < end; first += kBatch * kBlockThreads) {
    uint32_t words[kBatch][4];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = min(first + i * kBlockThreads, end - 1);
      load_words(words[i], reinterpret_cast<const uint8_t*>(from + at * 8));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = min(first + i * kBlockThreads, end - 1);
      const uint32_t(&in)[4] = words[i];
      const uint32_t out[4] = {__byte_perm(in[0], in[2], 0x5410), __byte_perm(in[0], in[2], 0x7632),
                               __byte_perm(in[1], in[3], 0x5410), __byte_perm(in[1], in[3], 0x7632)};
      store_words(to + at * 16, out);
    }
  }
}

// Fills the query operands of `rows` rows, a multiple of 64, and the scales of their products. Ends
// without a barrier.
__device__ __forceinline__ void load_queries(const DecodeParams& p, const WorkItem& item, int head,
                                             int rows, Shared& shared) {
  constexpr int kThreadsPerRow = 4, kDims = HEAD_DIM / kThreadsPerRow;
  const int first = threadIdx.x % kThreadsPerRow * kDims;
  for (int row = threadIdx.x / kThreadsPerRow; row < rows; row += kBlockThreads / kThreadsPerRow) {
    uint32_t words[kDims / 8][4] = {};
    if (row < item.num_branches * p.group) {
      const int batch_row = p.rows[item.first_entry + p.branch_of(row)];
      const int64_t at =
          batch_row * p.q_stride + (head * p.group + p.member_of(row)) * HEAD_DIM + first;
#pragma unroll
      for (int i = 0; i < kDims / 8; ++i) {
        load_words(words[i], static_cast<const uint8_t*>(p.q) + 2 * (at + 8 * i));
      }
    }
    float q[kDims / 8][8], largest = 0;
#pragma unroll
    for (int i = 0; i < kDims / 8; ++i) {
      if (p.q_is_bf16) {
        to_floats<__nv_bfloat16>(q[i], words[i]);
      } else {
        to_floats<__half>(q[i], words[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(q[i][j]));
    }
#pragma unroll
    for (int distance = 1; distance < kThreadsPerRow; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    // As large as fp16 takes: small components stay normal numbers.
    const float scale = copysignf(power_of_two_scale(largest, 14), p.scale_log2);
    if (first == 0) shared.query_scale[row] = p.scale_log2 / scale;
#pragma unroll
    for (int i = 0; i < kDims / 8; ++i) {
      const int dim = first + 8 * i;
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[j] = as_u32(__floats2half2_rn(q[i][j] * scale, q[i][j + 4] * scale));
      }
      store_words(shared.queries[row / kGroupRows][dim / 64] +
                      swizzled(row % kGroupRows, dim % 64 / 8),
                  pairs);
    }
  }
}

// Brings a group its tiles: tile n starts at position first + n * stride. Threads below kTile own a
// token each; tokens beyond the end repeat the last one, so that no byte outside the segment is read.
template <int kTile>
struct Feed {
  const DecodeParams& p;
  HeadPool pool;
  const int* slots;
  Incoming<kTile>& incoming;
  int first, stride, last;  // positions
  int count;                // of tiles
  int next_slot, later_slot, fresh_slot;
  RawToken raw;
  const int thread = threadIdx.x % kGroupThreads;

  __device__ __forceinline__ Feed(const DecodeParams& p, const WorkItem& item, int head,
                                  Incoming<kTile>& incoming, int index, int feeds)
      : p(p),
        pool(p.pool, head),
        slots(p.req_to_token + item.req * p.req_stride),
        incoming(incoming),
        first(item.start + index * kTile),
        stride(feeds * kTile),
        last(item.end - 1),
        count(((item.end - item.start + kTile - 1) / kTile - index + feeds - 1) / feeds) {}

  __device__ __forceinline__ int load_slot(int n) const {
    return slots[min(first + n * stride + thread, last)];
  }
  __device__ __forceinline__ void put_units(int n, int slot) {
    if (thread < kTile) incoming.units[n % 2][thread] = pool.row_units(p.pool, slot);
  }
  __device__ __forceinline__ void put_sources(int n) {
    if (thread >= kTile) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t bits = side == 0 ? raw.k_scale : raw.v_scale;
      const uint32_t pattern = side == 0 ? raw.pattern_ids & 0xff : raw.pattern_ids >> 8;
      // The largest of a warp's scales gets to 2^10: 16 of it fit fp16, and what is far below it
      // keeps its precision.
      const float largest = half_bits_to_float(__reduce_max_sync(~0u, bits & 0x7fff));
      const float up = fmaxf(power_of_two_scale(largest, 10), 32.0f);
      const float scale = fminf(half_bits_to_float(bits) * up, 4094.0f);
      incoming.sources[n % 2][side][thread] = {pattern * (HEAD_DIM * 2),
                                               as_u32(__float2half2_rn(scale))};
      if (thread % 32 == 0) {
        incoming.steps[n % 2][side][thread / 32] = as_u32(__float2half2_rn((1 << 20) / up));
      }
    }
  }
  __device__ __forceinline__ void issue(int n) {
    copy_rows<kTile, kGroupThreads, K_ROW_BYTES, V_ROW_BYTES>(
        p.copy16, shared_address(incoming.codes[n % 2]), pool.codes, thread,
        [&](int token) { return incoming.units[n % 2][token]; });
    cp_async_commit();
  }

  // The first tile, but for a wait for copies and a barrier.
  __device__ __forceinline__ void start(int group) {
    const int slot = load_slot(0);
    next_slot = load_slot(1), later_slot = load_slot(2);
    raw = load_token(pool.metadata_words(p.pool, slot));
    put_units(0, slot);
    put_units(1, next_slot);
    group_barrier(group);
    issue(0);
    put_sources(0);
  }
  // Before work on tile n: asks for the next.
  __device__ __forceinline__ void ask(int n) {
    if (n + 1 >= count) return;
    issue(n + 1);
    raw = load_token(pool.metadata_words(p.pool, next_slot));
    fresh_slot = load_slot(n + 3);
  }
  // After work on tile n: the next is there, once a barrier follows.
  __device__ __forceinline__ void receive(int n) {
    if (n + 1 < count) {
      put_sources(n + 1);
      put_units(n + 2, later_slot);
      next_slot = later_slot;
      later_slot = fresh_slot;
    }
    cp_async_wait<0>();
  }

  __device__ __forceinline__ void dequantize_keys(int n, Operands<kTile>& to, const Shared& shared,
                                                  const uint8_t* patterns) const {
    dequantize<K_BITS, kTile>(to.keys, shared.channels[0], incoming.codes[n % 2], K_ROW_BYTES,
                              patterns, incoming.sources[n % 2][0], incoming.steps[n % 2][0]);
  }
  __device__ __forceinline__ void dequantize_values(int n, Operands<kTile>& to,
                                                    const Shared& shared,
                                                    const uint8_t* patterns) const {
    dequantize<V_BITS, kTile>(to.values, shared.channels[1],
                              incoming.codes[n % 2] + kTile * K_ROW_BYTES, V_ROW_BYTES, patterns,
                              incoming.sources[n % 2][1], incoming.steps[n % 2][1]);
  }
};

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
    const auto ahead = [&](int h) { return peak[h] * factor[h] > reference[h] + kSlack; };
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
      wgmma_rows(x, operand(queries + tile * (kGroupRows * kSwizzledRow) + byte, 16),
                 operand(keys + tile * (kTile * kSwizzledRow) + byte, 16), step > 0);
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
      wgmma_columns(out, weights[step],
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
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = which * kGroupRows + first_row() + 8 * h;
      if (row >= item.num_branches * p.group) continue;
      const int64_t at = state_index(p, item, head, row);
      if (t == 0) p.state_sum[at] = make_float2(softmax.reference[h], softmax.mass[h]);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        // The columns 2t and 2t + 1 are the dims t and t + 4.
        float* dims = p.state_out + at * HEAD_DIM + 8 * i + t;
        dims[0] = out[4 * i + 2 * h], dims[4] = out[4 * i + 2 * h + 1];
      }
    }
  }
};

// Adds up the groups' attention to the same rows in the first group. A group without tokens has
// reference -inf, hence weight 0.
__device__ __forceinline__ void merge_groups(Rows& rows, int group, Shared& shared,
                                             float4* outputs) {
  const int thread = threadIdx.x % kGroupThreads, t = thread % 4, row = Rows::first_row();
  constexpr int kQuads = D / 8;
  auto& states = reinterpret_cast<float2(&)[kGroups][kGroupRows]>(shared.queries[1]);
  rows.add_mass();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (t == 0) {
      states[group][row + 8 * h] =
          make_float2(rows.softmax.reference[h], rows.softmax.mass[h]);
    }
  }
  __syncthreads();  // nobody reads operands any more either
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = -INFINITY, mass = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) top = fmaxf(top, states[i][row + 8 * h].x);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float2 state = states[i][row + 8 * h];
      mass += state.y * exp2_approx(state.x - top);
    }
    const float weight = exp2_approx(rows.softmax.reference[h] - top);
    rows.softmax.reference[h] = top;
    rows.softmax.mass[h] = mass;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      rows.out[4 * i + 2 * h] *= weight;
      rows.out[4 * i + 2 * h + 1] *= weight;
    }
  }
  if (group > 0 && rows.busy) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      outputs[((group - 1) * kQuads + i) * kGroupThreads + thread] =
          *reinterpret_cast<const float4*>(&rows.out[4 * i]);
    }
  }
  __syncthreads();
  if (group > 0 || !rows.busy) return;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups - 1; ++j) {
      const float4 other = outputs[(j * kQuads + i) * kGroupThreads + thread];
      rows.out[4 * i] += other.x, rows.out[4 * i + 1] += other.y;
      rows.out[4 * i + 2] += other.z, rows.out[4 * i + 3] += other.w;
    }
  }
}

template <int kTile>
__device__ void attend(const DecodeParams& p, const WorkItem item, int head, uint8_t* bytes) {
  // The same for all lanes, which the compiler cannot know of threadIdx.x.
  const int group = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  auto& memory = *reinterpret_cast<Memory<kTile>*>(bytes);
  auto& shared = memory.shared;
  const int pattern_bytes = p.num_patterns * HEAD_DIM * 2;
  uint8_t* k_patterns = bytes + kPatternStart<kTile>;
  uint8_t* v_patterns = k_patterns + pattern_bytes;
  const int num_rows = item.num_branches * p.group;
  const bool shares_tokens = num_rows <= kGroupRows;  // else rows
  const bool feeds = shares_tokens || group == kGroups - 1;

  Feed<kTile> feed(p, item, head, memory.incoming[group], shares_tokens ? group : 0,
                   shares_tokens ? kGroups : 1);
  if (feeds) feed.start(group);
  if (threadIdx.x < 2 * HEAD_DIM) {
    const int side = threadIdx.x / HEAD_DIM, dim = threadIdx.x % HEAD_DIM;
    shared.channels[side][place_of(dim)] = table_channels(p, item.table, side, head)[dim];
  }
  load_patterns(table_rows(p, item.table, 0, head), p.num_patterns, k_patterns);
  load_patterns(table_rows(p, item.table, 1, head), p.num_patterns, v_patterns);
  load_queries(p, item, head, shares_tokens ? kGroupRows : kMostRows, shared);
  cp_async_wait<0>();
  __syncthreads();

  if (shares_tokens) {
    auto& operands = memory.operands[group];
    Rows rows(shared, 0, num_rows);
    for (int n = 0; n < feed.count; ++n) {
      feed.ask(n);
      feed.dequantize_keys(n, operands, shared, k_patterns);
      rows.finish();
      publish_operands();
      group_barrier(group);  // the keys are there, and nobody reads the values before
      float x[kTile / 2];
      rows.multiply_keys<kTile>(x, operands);
      feed.dequantize_values(n, operands, shared, v_patterns);
      wgmma_wait();
      settle(x);
      uint32_t weights[kTile / 16][4];
      rows.weigh<kTile>(x, weights, feed.last + 1 - (feed.first + n * feed.stride), p.cap_log2);
      feed.receive(n);
      publish_operands();
      group_barrier(group);  // the values are there, and the next tile's codes
      rows.multiply_values<kTile>(weights, operands);
    }
    rows.finish();
    merge_groups(rows, group, shared, reinterpret_cast<float4*>(memory.operands));
    if (group == 0) rows.store(p, item, head, 0);
  } else if (group == kGroups - 1) {
    for (int n = 0; n < feed.count; ++n) {
      const int stage = n % kGroups;
      feed.ask(n);
      if (n >= kGroups) block_barrier_wait(kEmptyBarrier + stage, kBlockThreads);
      feed.dequantize_keys(n, memory.operands[stage], shared, k_patterns);
      feed.dequantize_values(n, memory.operands[stage], shared, v_patterns);
      feed.receive(n);
      publish_operands();
      block_barrier_arrive(kFullBarrier + stage, kBlockThreads);
      group_barrier(group);
    }
  } else {
    Rows rows(shared, group, num_rows);
    for (int n = 0; n < feed.count; ++n) {
      const auto& operands = memory.operands[n % kGroups];
      block_barrier_wait(kFullBarrier + n % kGroups, kBlockThreads);
      float x[kTile / 2];
      rows.multiply_keys<kTile>(x, operands);
      rows.finish();
      settle(x);
      // The last rounds find nobody waiting.
      if (n > 0 && n - 1 + kGroups < feed.count) {
        block_barrier_arrive(kEmptyBarrier + (n - 1) % kGroups, kBlockThreads);
      }
      uint32_t weights[kTile / 16][4];
      rows.weigh<kTile>(x, weights, feed.last + 1 - (feed.first + n * feed.stride), p.cap_log2);
      rows.multiply_values<kTile>(weights, operands);
    }
    rows.finish();
    rows.add_mass();
    rows.store(p, item, head, group);
  }
}

// kTile is 64, or 32 where large tables leave no room.
template <int kTile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attend_kernel(const __grid_constant__ DecodeParams p) {
  PATTERNKV_DYNAMIC_SHARED(memory);
  launch_dependents();
  uint8_t* aligned = memory + (kAlign - shared_address(memory) % kAlign) % kAlign;
  for_each_unit(p.work.wide(), p.pool.h_kv,
                [&](const WorkItem& item, int head) { attend<kTile>(p, item, head, aligned); });
  // This grid then ends after the one before it, and the merge, which waits for this one, after
  // both.
  wait_for_previous_kernel();
}

}  // namespace warpgroup
}  // namespace patternkv
