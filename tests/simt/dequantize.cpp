// Dequantize on the CPU (see simt.h).
#include "patternkv/dequantize.cuh"
#include "simt.h"

namespace patternkv {

// As tests/test_dequantize_simt.py passes it; see dequantize() for what is what.
struct Arguments {
  void* buffer;
  const void* slots;
  const int* table_ids;
  const __half* patterns;
  const __half* channel_scale;
  void *k, *v;
  int64_t n, h_kv, page_size, num_patterns, slots_are_int64, blocks;
};

template <typename T>
void dequantize_all(const Arguments& a) {
  dequantize::DequantizeParams p = {};
  p.pool = SlotPool::make(a.buffer, a.page_size, a.h_kv);
  p.slots = a.slots;
  p.slots_are_int64 = a.slots_are_int64;
  p.table_ids = a.table_ids;
  p.patterns = a.patterns;
  p.channel_scale = a.channel_scale;
  p.x[0] = a.k, p.x[1] = a.v;
  p.n = a.n;
  p.num_patterns = a.num_patterns;
  const SimtIndex grid = {static_cast<unsigned>(a.h_kv), static_cast<unsigned>(a.blocks), 1};
  simt::launch(grid, dequantize::kThreads, 0, [&] { dequantize::dequantize_kernel<T>(p); });
}

extern "C" void dequantize_bf16(const Arguments* a) { dequantize_all<__nv_bfloat16>(*a); }
extern "C" void dequantize_fp16(const Arguments* a) { dequantize_all<__half>(*a); }
extern "C" void dequantize_fp32(const Arguments* a) { dequantize_all<float>(*a); }

}  // namespace patternkv
