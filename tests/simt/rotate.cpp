// Rotation on the CPU (see simt.h).
#include "patternkv/rotate.cuh"
#include "simt.h"

namespace patternkv {

// As tests/test_rotate.py passes it; see rotate() for what is what.
struct Arguments {
  const void *q, *k, *factors;
  void* out;
  int64_t n, h_q, h_kv, q_token, q_head, k_token, k_head;
};

template <typename T>
void rotate_all(const Arguments& a) {
  rotate::RotateParams p = {};
  p.q = {a.q, a.q_token, a.q_head, static_cast<int>(a.h_q)};
  p.k = {a.k, a.k_token, a.k_head, static_cast<int>(a.h_kv)};
  p.factors = a.factors;
  p.out = a.out;
  p.n = a.n;
  const int64_t count = a.n * (a.h_q + a.h_kv) * rotate::kHeadThreads;
  const int64_t blocks = (count + rotate::kThreads - 1) / rotate::kThreads;
  simt::launch({static_cast<unsigned>(blocks), 1, 1}, rotate::kThreads, 0,
               [&] { rotate::rotate_kernel<T>(p); });
}

extern "C" void rotate_bf16(const Arguments* a) { rotate_all<__nv_bfloat16>(*a); }
extern "C" void rotate_fp16(const Arguments* a) { rotate_all<__half>(*a); }

}  // namespace patternkv
