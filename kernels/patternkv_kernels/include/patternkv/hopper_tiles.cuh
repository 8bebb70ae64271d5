// What the kernel of decode_hopper.cuh keeps in shared memory, and how it gets there: code rows and
// metadata of tokens, queries, and the table of query-pattern products.
#pragma once

#include "patternkv/decode_queries.cuh"
#include "patternkv/decode_units.cuh"
#include "patternkv/wgmma.cuh"

namespace patternkv {
namespace hopper {

constexpr bool kExists = PKV_WGMMA && (HEAD_DIM == 64 || HEAD_DIM == 128);

constexpr int kGroupPatterns = 64;    // whose probabilities a product sums
constexpr int kMostPatterns = 128;    // of a table
constexpr int kTile = 64;             // tokens
constexpr int kStages = 3;            // tiles on their way or at work
constexpr int kDimTiles = D / 64;     // products that the output takes
constexpr int kAlign = 1024;          // of an operand tile
constexpr int kLeastAlign = 256;      // of dynamic shared memory
constexpr int kTileBytes = kTile * (kKStride + kVStride);
constexpr float kMostScale = 16.0f;   // of a token's V, once scaled

// A lane has 2 kDimTiles dims of V. The 16 bits of a row that a transposed load hands to a lane
// hold those of one warp or of several, which then take their share of the bits.
constexpr int kDimsPerHalf = 16 / V_BITS;
constexpr int kWarpsPerChunk = kDimsPerHalf / (2 * kDimTiles) > 0 ? kDimsPerHalf / (2 * kDimTiles) : 1;

__device__ __forceinline__ int first_dim(int warp, int g) {
  return (warp / kWarpsPerChunk * 8 + g) * kDimsPerHalf + warp % kWarpsPerChunk * (2 * kDimTiles);
}

// The same for all lanes, which the compiler cannot know of what was loaded: it then keeps it in
// registers that all lanes share.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// A token's metadata as its readers need it.
struct alignas(16) Token {
  float k_scale;          // products of codes to logits
  uint32_t table_offset;  // bytes to the pattern's row of the table
  uint32_t v_scale;       // half2, scaled into fp16's range
  uint32_t unused;
};

template <int kRows, int kPatterns>
struct alignas(kAlign) Memory {
  static constexpr int kQueryRows = kRows;
  static constexpr int kGroups = kPatterns / kGroupPatterns;  // of patterns
  static_assert(kGroups == 1 || kGroups == 2, "their sums leave through the buffers of weights");
  // Up to 32 columns of weights leave room in their rows for the same weights without V scales.
  static_assert(kRows <= 32);
  static constexpr int kPlainPiece = 4, kPlainOffset = kPlainPiece * 16;

  uint8_t weights[2][kTile * kSwizzledRow];  // queries before the first tile
  uint8_t queries[kDimTiles][kRows * kSwizzledRow];
  uint8_t codes[kStages][kTileBytes];
  float table[kPatterns * kRows];
  Token tokens[kStages][kTile];
  __half patterns[kStages][kTile];  // ids of V patterns, as numbers
  uint32_t units[2][kTile];         // offsets of code rows
  float2 totals[kWarps][kRows];
  float bias[kRows];  // of the codes' products
  float reference[kRows];
  float shift[kRows];
  int peak[kRows];
  int states[kRows];  // where rows leave their state, counted in query heads
  float largest[kWarps][2];

  // Where a lane addresses store_matrices to put its warp's weights of the first 8 rows and their
  // tokens, with V scales and without; those of n-tile j are at this, exclusive or 16 j.
  __device__ __forceinline__ uint32_t weights_place(int buffer, int warp, int lane) const {
    const int token = warp * 16 + lane % 16;
    return shared_address(weights[buffer]) +
           swizzled(token, lane < 16 ? 0 : kPlainPiece);
  }
};

template <int kRows, int kPatterns>
__host__ __device__ constexpr int shared_bytes() {
  return kAlign - kLeastAlign + sizeof(Memory<kRows, kPatterns>);
}

// The table of query-pattern products. A pattern's row holds, for each pair of n-tiles i and each
// lane t, the query rows 16 i + 2 t, + 1, + 8 and + 9. Odd patterns swap neighbouring pairs, which
// spreads patterns over the banks.
template <int kRows>
struct Table {
  static constexpr int kSwap = kRows == 32 ? 64 : 0;  // bytes of a pair

  static __device__ __forceinline__ uint32_t pattern_offset(int pattern) {
    return pattern * (kRows * 4) + (pattern & 1) * kSwap;
  }
  // Where, in a pattern's row at `row`, a lane's products of n-tile i, even, and the next are.
  static __device__ __forceinline__ uint32_t place(uint32_t row, int i, int t) {
    return (row + t * 16) ^ (i / 2 * 64);
  }
  // Subtracts a row's `shift` from all of its products.
  template <int kPatterns>
  static __device__ __forceinline__ void lower(float* table, const float* shift, int thread) {
    // A thread meets one row, in patterns of one parity.
    static_assert(kThreads % (2 * kRows) == 0);
    const int at = thread % kRows ^ thread / kRows % 2 * (kSwap / 4);
    const float down = shift[at / 16 * 16 + at % 16 / 4 * 2 + at % 4 / 2 * 8 + at % 2];
#pragma unroll 1
    for (int e = thread; e < kPatterns * kRows; e += kThreads) table[e] -= down;
  }
};

// Asks for the queries of the item's rows, into `weights`. Rows beyond them are zero. Lane l of a
// warp looks up the l-th of the rows that its lanes bring together.
template <typename Memory>
struct AskedQueries {
  static constexpr int kPieces = HEAD_DIM / 8, kCount = Memory::kQueryRows * kPieces;
  static constexpr int kAtOnce = 32 / kPieces;  // rows of a warp
  static constexpr int kSteps = (kCount + kThreads - 1) / kThreads;
  static_assert(kAtOnce * kSteps <= 32);

  int row, batch_row = 0;
  bool live;

  static __device__ __forceinline__ int row_of(int step, int warp, int place) {
    return (step * kWarps + warp) * kAtOnce + place;
  }
  __device__ __forceinline__ AskedQueries(const DecodeParams& p, const WorkItem& item, int thread)
      : row(row_of(thread % 32 / kAtOnce, thread / 32, thread % kAtOnce)),
        live(row < item.num_branches * p.group && thread % 32 < kAtOnce * kSteps) {
    if (live) batch_row = p.rows[item.first_entry + p.branch_of(row)];
  }
  __device__ __forceinline__ void issue(const DecodeParams& p, int head, int thread,
                                        Memory& memory) const {
    const int lane = thread % 32;
    // In units of 16 bytes.
    const int own = batch_row * static_cast<int>(p.q_stride / 8) +
                    (head * p.group + p.member_of(row)) * kPieces;
    const uint32_t alive = __ballot_sync(~0u, live);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int source = step * kAtOnce + lane / kPieces;
      const int at = __shfl_sync(~0u, own, source) + lane % kPieces;
      if ((step + 1) * kThreads > kCount && step * kThreads + thread >= kCount) break;
      uint8_t* to = memory.weights[1] + (step * kThreads + thread) * 16;
      if (alive >> source & 1) {
        cp_async<16>(shared_address(to), static_cast<const uint4*>(p.q) + at);
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      }
    }
    cp_async_commit();
  }
};

// Fills the query operands, and raw ones in `weights` for the table, once the queries are there.
// Ends with a barrier. Loops stay loops: code that runs once per item waits for instructions.
template <typename Memory>
__device__ __forceinline__ QueryScales load_queries(const DecodeParams& p, const WorkItem& item,
                                                    int head, int thread, Memory& memory) {
  constexpr int kRows = Memory::kQueryRows, kPieces = HEAD_DIM / 8, kCount = kRows * kPieces;
  static_assert(kCount % 32 == 0, "warps take part in a step as a whole");
  const int warp = thread / 32, piece = thread % kPieces;
  uint32_t channel_words[4];
  load_early(channel_words, table_channels(p, item.table, 0, head) + piece * 8);
  cp_async_wait<2>();  // two tiles were asked for after the queries
  __syncthreads();
  float channel[8];
  to_floats<__half>(channel, channel_words);
  const auto to_queries = [&](const uint32_t (&words)[4], float (&q)[8]) {
    if (p.q_is_bf16) {
      to_floats<__nv_bfloat16>(q, words);
    } else {
      to_floats<__half>(q, words);
    }
  };
  // Magnitudes of 16-bit floats are ordered like their bits, of which those of NaN and infinity count
  // as the largest number.
  uint32_t magnitudes[4] = {};
#pragma unroll
  for (int at = thread; at < kCount; at += kThreads) {
    uint32_t words[4];
    load_words(words, memory.weights[1] + at * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) magnitudes[j] = __vmaxu2(magnitudes[j], words[j] & 0x7fff7fff);
  }
  float largest[2] = {};
  {
    const uint32_t most = p.q_is_bf16 ? 0x7f7f7f7f : 0x7bff7bff;
    uint32_t words[4];
    float q[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = __vminu2(magnitudes[j], most);
    to_queries(words, q);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      largest[0] = fmaxf(largest[0], q[j]);
      largest[1] = fmaxf(largest[1], fabsf(q[j] * channel[j]));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest[0] = fmaxf(largest[0], __shfl_xor_sync(~0u, largest[0], distance));
    largest[1] = fmaxf(largest[1], __shfl_xor_sync(~0u, largest[1], distance));
  }
  if (thread % 32 == 0) {
    memory.largest[warp][0] = largest[0], memory.largest[warp][1] = largest[1];
  }
  if (thread < kRows) memory.reference[thread] = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    largest[0] = fmaxf(largest[0], memory.largest[w][0]);
    largest[1] = fmaxf(largest[1], memory.largest[w][1]);
  }
  // As large as fp16 takes with room for rounding: small components stay normal numbers.
  const float raw_scale = power_of_two_scale(largest[0], 14);
  const float code_scale = power_of_two_scale(largest[1], 13);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    channel[j] *= code_scale / KCodes::masked_step(j % KCodes::kPerHalf);
  }

  // As codes leave their words: lane t has a quarter of the dims, pairs of codes kPerHalf apart.
  const int t = piece / (kPieces / 4), own = piece % (kPieces / 4);
  const int first = own / (KCodes::kPerHalf / 4) * KCodes::kPerHalf;
  // As lane t takes 16 bytes of a pattern, two steps of products.
  const int raw = piece / 4 * 4;
#pragma unroll 1
  for (int at = thread; at < kCount; at += kThreads) {
    const int row = at / kPieces;
    uint32_t words[4];
    float q[8], centres = 0;
    load_words(words, memory.weights[1] + at * 16);
    to_queries(words, q);
    __half x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] = __float2half_rn(q[j] * channel[j]);
      centres += __half2float(x[j]) * KCodes::masked_step(j % KCodes::kPerHalf);
    }
#pragma unroll
    for (int r = 0; r < KCodes::kPerHalf; ++r) {
      uint8_t* to = memory.queries[first / 8] + swizzled(row, (first + r) % 8) + t * 4;
      if constexpr (K_BITS == 4) {
        *reinterpret_cast<__half2*>(to) = __halves2half2(x[r], x[r + 4]);
      } else {
        reinterpret_cast<__half*>(to)[own % 2] = x[r];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<uint32_t*>(memory.weights[0] + raw / 8 * (kRows * kSwizzledRow) +
                                   swizzled(row, raw % 8 + j) + piece % 4 * 4) =
          as_u32(__floats2half2_rn(q[2 * j] * raw_scale, q[2 * j + 1] * raw_scale));
    }
#pragma unroll
    for (int distance = 1; distance < kPieces; distance *= 2) {
      centres += __shfl_xor_sync(~0u, centres, distance);
    }
    if (piece == 0) memory.bias[row] = centres * (KCodes::kCentre / kMaskedUnit);
  }
  publish_operands();
  __syncthreads();
  return {p.scale_log2 / raw_scale, p.scale_log2 / code_scale * kMaskedUnit};
}

// Products of 64 rows in registers with all query rows of an operand, on top of `x`; committed.
template <int kRows>
__device__ __forceinline__ void multiply_queries(float (&x)[kRows / 2],
                                                 uint32_t (&a)[HEAD_DIM / 16][4],
                                                 const uint8_t* queries) {
  const uint32_t b = operand(shared_address(queries));
  settle(a);
  settle(x);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    wgmma_by_rows(x, a[step], b + step / 4 * (kRows * kSwizzledRow / 16) + step % 4 * 2);
  }
  wgmma_commit();
}

// A thread's dims of the K patterns of a group that it multiplies for the table. The first group is
// asked for ahead of the queries; and where V's patterns are not in the L2 cache, which the end of an
// item reads them from, they go there meanwhile.
struct KeyPatterns {
  uint32_t rows[2][HEAD_DIM / 32][4];

  __device__ __forceinline__ KeyPatterns(const DecodeParams& p, const WorkItem& item, int head,
                                         int group, int thread) {
    const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    const __half* patterns = table_rows(p, item.table, 0, head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pattern =
          min(group * kGroupPatterns + 16 * warp + 8 * h + g, p.num_patterns - 1);
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 32; ++k) {
        load_early(rows[h][k], patterns + pattern * HEAD_DIM + t * 8 + k * 32);
      }
    }
    constexpr int kLine = 64;  // elements
    const int line = group * (kGroupPatterns * HEAD_DIM / kLine) + thread;
    if (line * kLine < p.num_patterns * HEAD_DIM) {
      prefetch(table_rows(p, item.table, 1, head) + line * kLine);
    }
  }
};
static_assert(!kExists || kGroupPatterns * HEAD_DIM / 64 <= kThreads, "a thread has a line of V");

// Fills the table's group of patterns with their logits. Ends without a barrier.
template <typename Memory>
__device__ __forceinline__ void fill_table(const KeyPatterns& patterns, int group, int thread,
                                           Memory& memory, float scale) {
  constexpr int kRows = Memory::kQueryRows;
  using Table = hopper::Table<kRows>;
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  float x[kRows / 2] = {};
  uint32_t a[HEAD_DIM / 16][4];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 4; ++i) {
    const int step = i / 4;
    a[step][i % 4] = patterns.rows[i % 2][step / 2][step % 2 * 2 + i % 4 / 2];
  }
  multiply_queries<kRows>(x, a, memory.weights[0]);
  wgmma_wait();
  settle(x);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t row =
        Table::pattern_offset(group * kGroupPatterns + 16 * warp + 8 * h + g);
#pragma unroll
    for (int i = 0; i < kRows / 8; i += 2) {
      const float* from = x + 4 * i + 2 * h;
      *reinterpret_cast<float4*>(reinterpret_cast<uint8_t*>(memory.table) +
                                 Table::place(row, i, t)) =
          make_float4(from[0] * scale, from[1] * scale, from[4] * scale, from[5] * scale);
    }
  }
}

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
