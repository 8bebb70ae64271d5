// Store on the CPU (see simt.h).
#include "patternkv/store.cuh"

#include "simt.h"

namespace patternkv {

// As tests/test_store_simt.py passes it; see store_kv() for what is what.
struct Arguments {
  void* buffer;
  const void *slots, *k, *v;
  const __half *patterns, *channel_scale, *channel_weight;
  const int* table_ids;
  void *window_k, *window_v;
  const void* window_rows;
  int64_t n, h_kv, page_size, num_patterns,
      tokens_per_block,  // of store_many; or, negative, the warps of a block of store_few
      in_windows;        // as store_windows does it: token i is number window_rows[i] of k and v
};

template <typename T>
void store_all(const Arguments& a) {
  const int stride = a.h_kv * HEAD_DIM;
  StoreParams p = {};
  p.pool = SlotPool::make(a.buffer, a.page_size, a.h_kv);
  p.k = {a.k, stride, HEAD_DIM};
  p.v = {a.v, stride, HEAD_DIM};
  p.slots = {a.slots, true};
  p.window_k = a.window_k;
  p.window_v = a.window_v;
  p.window_rows = {a.window_rows, true};
  p.table_ids = a.table_ids;
  p.patterns = a.patterns;
  p.channel_scale = a.channel_scale;
  p.channel_weight = a.channel_weight;
  p.n = a.n;
  p.num_patterns = a.num_patterns;
  const auto blocks = [&](int tokens) {
    return static_cast<unsigned>((a.n + tokens - 1) / tokens);
  };
  const unsigned sides = 2 * a.h_kv;
  const auto store_few = [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    simt::launch({blocks(kTileTokens), sides, 1}, 32 * kWarps, 0,
                 [&] { store::store_few<T, kWarps>(p); });
  };
  if (a.tokens_per_block == -store::kFewWarps) {
    store_few(std::integral_constant<int, store::kFewWarps>());
  } else if (a.tokens_per_block < 0) {
    store_few(std::integral_constant<int, store::kFewerWarps>());
  } else if (a.in_windows) {
    // Of two layers the first is elsewhere.
    std::vector<uint8_t> other(2 * SlotPool::bytes_of_page(a.page_size, a.h_kv) * a.n);
    StoreLayer layers[] = {{other.data(), a.patterns, a.channel_scale, a.channel_weight, a.k, a.v},
                           {p.pool.base, a.patterns, a.channel_scale, a.channel_weight, a.k, a.v}};
    p.vectors = p.window_rows;
    p.pool.base = nullptr, p.window_k = p.window_v = nullptr;
    p.k.data = p.v.data = p.patterns = p.channel_scale = p.channel_weight = nullptr;
    const int tokens = a.tokens_per_block;
    simt::launch({blocks(tokens), sides, 2}, 32 * store::kManyWarps, 0,
                 [&] { store::store_windows<T>(p, layers, tokens); });
  } else {
    const int tokens = a.tokens_per_block;
    simt::launch({blocks(tokens), sides, 1}, 32 * store::kManyWarps, 0,
                 [&] { store::store_many<T>(p, tokens); });
  }
}

extern "C" void store_bf16(const Arguments* a) { store_all<__nv_bfloat16>(*a); }
extern "C" void store_fp16(const Arguments* a) { store_all<__half>(*a); }

}  // namespace patternkv
