// Runs CUDA kernel sources on a CPU, so that they can be tested without a GPU. The threads of a
// block are coroutines that take turns at barriers and warp-wide operations; blocks run one after
// the other. It checks what kernels compute, and whether they race only as far as warps that lag
// behind each other change it: between two barriers a thread runs alone.
//
// Stands in for what nvcc provides on the device, as far as the kernels use it; patternkv/ptx.cuh
// beside it stands in for the file of that name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#undef __device__
#undef __global__
#undef __host__
#undef __forceinline__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // of the block that runs
#define __launch_bounds__(...)
#define __grid_constant__

namespace simt {

constexpr int kLanes = 32;
constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr size_t kStackBytes = 512 << 10;
constexpr uint8_t kPoison = 0xcd;  // what shared memory holds at first

struct Thread {
  ucontext_t start;
  jmp_buf context;  // once it has started
  bool started = false, done = false;
};

// Where threads wait for each other.
struct Meeting {
  int arrived = 0;
  long generation = 0;
};

struct Warp : Meeting {
  uint64_t in[kLanes], out[kLanes];
};

struct Warpgroup : Meeting {
  const void* in[kGroupThreads];
};

inline std::vector<Thread> threads;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of threads, kept from block to block
inline std::vector<Warp> warps;
inline std::vector<Warpgroup> groups;
inline Meeting block, named[16];
inline int current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<uint8_t> memory;  // dynamic shared memory; addresses are offsets into it
inline uint32_t schedule;            // 0: warps go on alike; others choose which ones lag behind

// Lets the other threads go on. Jumps in place of `swapcontext`, which asks the system for the
// signal mask each time.
[[gnu::noinline]] inline void yield() {
  if (_setjmp(threads[current].context) == 0) _longjmp(scheduler, 1);
}

// Runs the current thread until it yields or ends.
[[gnu::noinline]] inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  Thread& thread = threads[current];
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  setcontext(&thread.start);
}

// The last of `count` threads to arrive does `work` and lets the others go.
template <typename Work>
void meet(Meeting& meeting, int count, Work work) {
  const long generation = meeting.generation;
  if (++meeting.arrived < count) {
    while (meeting.generation == generation) yield();
    return;
  }
  work();
  meeting.arrived = 0;
  ++meeting.generation;
}

// A warp-wide operation: `work(in, out)` on the values of all lanes.
template <typename Work>
uint64_t exchange(uint64_t value, Work work) {
  Warp& warp = warps[current / kLanes];
  const int lane = current % kLanes;
  warp.in[lane] = value;
  meet(warp, kLanes, [&] { work(warp.in, warp.out); });
  value = warp.out[lane];
  meet(warp, kLanes, [] {});  // results stay until everybody has read them
  return value;
}

// An operation of a warpgroup: `work(in)` on what all of its threads bring.
template <typename Work>
void group_exchange(const void* own, Work work) {
  Warpgroup& group = groups[current / kGroupThreads];
  group.in[current % kGroupThreads] = own;
  meet(group, kGroupThreads, [&] { work(group.in); });
}

template <typename To, typename From>
To bit_cast(From from) {
  To to = {};
  std::memcpy(&to, &from, std::min(sizeof(To), sizeof(From)));
  return to;
}

// Whether a warp sits out a round of turns: with a schedule at random, every other warp mostly.
class Laggards {
 public:
  explicit Laggards(int num_warps) : sits_out_(num_warps) {}

  void next_round() {
    if (schedule == 0) return;
    for (size_t warp = 0; warp < sits_out_.size(); ++warp) {
      const uint32_t of_16 = schedule >> warp % 32 & 1 ? 15 : 4;
      random_ = random_ * 1664525 + 1013904223;
      sits_out_[warp] = (random_ >> 16) % 16 < of_16;
    }
  }
  bool sits_out(int warp) const { return sits_out_[warp]; }

 private:
  std::vector<char> sits_out_;
  uint32_t random_ = schedule;
};

inline void run_block(int num_threads, std::function<void()> kernel) {
  body = std::move(kernel);
  threads.assign(num_threads, Thread());
  warps.assign(num_threads / kLanes, Warp());
  groups.assign(num_threads / kGroupThreads, Warpgroup());
  block = Meeting();
  std::fill(std::begin(named), std::end(named), Meeting());
  while (stacks.size() < threads.size()) stacks.emplace_back(new char[kStackBytes]);
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks[i].get();
    thread.start.uc_stack.ss_size = kStackBytes;
    void (*entry)() = [] {
      body();
      threads[current].done = true;
      _longjmp(scheduler, 1);
    };
    makecontext(&thread.start, entry, 0);
  }
  Laggards laggards(num_threads / kLanes);
  for (bool running = true; running;) {
    running = false;
    laggards.next_round();
    for (current = 0; current < num_threads; ++current) {
      if (threads[current].done) continue;
      running = true;
      if (!laggards.sits_out(current / kLanes)) resume();
    }
  }
}

}  // namespace simt

struct SimtIndex {
  unsigned x, y, z;
};
inline SimtIndex blockIdx, gridDim;

struct SimtThreadIndex {
  struct {
    operator int() const { return simt::current; }
  } x;
};
inline SimtThreadIndex threadIdx;

namespace simt {

// Every block of a grid, one after the other.
template <typename Kernel>
void launch(SimtIndex grid, int num_threads, int shared_bytes, Kernel kernel) {
  gridDim = grid;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    memory.assign(shared_bytes, kPoison);
    run_block(num_threads, kernel);
  }
}

}  // namespace simt

inline int __syncthreads_or(int predicate) {
  static int any, result;
  any |= predicate != 0;
  simt::meet(simt::block, simt::threads.size(), [] { result = std::exchange(any, 0); });
  return result;
}

inline void __syncthreads() { __syncthreads_or(0); }

inline void __syncwarp() {
  simt::meet(simt::warps[simt::current / simt::kLanes], simt::kLanes, [] {});
}

template <typename T>
T __shfl_sync(unsigned, T x, int source) {
  static_assert(sizeof(T) == 4);
  const uint64_t own = uint64_t{simt::bit_cast<uint32_t>(x)} | uint64_t(source) << 32;
  const uint64_t taken = simt::exchange(own, [](const uint64_t* in, uint64_t* out) {
    for (int lane = 0; lane < simt::kLanes; ++lane) out[lane] = in[in[lane] >> 32];
  });
  return simt::bit_cast<T>(static_cast<uint32_t>(taken));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  return __shfl_sync(mask, x, simt::current % simt::kLanes ^ distance);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T x, int distance) {
  const int lane = simt::current % simt::kLanes;
  return __shfl_sync(mask, x, lane < distance ? lane : lane - distance);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T x, int distance) {
  const int lane = simt::current % simt::kLanes;
  return __shfl_sync(mask, x, lane + distance < simt::kLanes ? lane + distance : lane);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  return simt::exchange(predicate != 0, [](const uint64_t* in, uint64_t* out) {
    uint64_t votes = 0;
    for (int lane = 0; lane < simt::kLanes; ++lane) votes |= in[lane] << lane;
    std::fill(out, out + simt::kLanes, votes);
  });
}

inline unsigned __match_any_sync(unsigned, int x) {
  return simt::exchange(static_cast<uint32_t>(x), [](const uint64_t* in, uint64_t* out) {
    for (int lane = 0; lane < simt::kLanes; ++lane) {
      out[lane] = 0;
      for (int other = 0; other < simt::kLanes; ++other) {
        out[lane] |= uint64_t{in[other] == in[lane]} << other;
      }
    }
  });
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}

inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  return simt::exchange(x, [](const uint64_t* in, uint64_t* out) {
    std::fill(out, out + simt::kLanes, *std::max_element(in, in + simt::kLanes));
  });
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return out;
}

template <typename T>
T atomicAdd(T* at, T x) {
  return std::exchange(*at, *at + x);
}

inline int atomicMax(int* at, int x) { return std::exchange(*at, std::max(*at, x)); }

inline unsigned __umulhi(unsigned x, unsigned y) { return uint64_t{x} * y >> 32; }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __vmaxu2(unsigned x, unsigned y) {
  return std::max(x & 0xffff, y & 0xffff) | std::max(x >> 16, y >> 16) << 16;
}
inline unsigned __vminu2(unsigned x, unsigned y) {
  return std::min(x & 0xffff, y & 0xffff) | std::min(x >> 16, y >> 16) << 16;
}
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

// cuda_fp16.h has it on the device only.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

inline __half2 __hfma2_sat(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(__hfma2(a, b, c));
  const auto saturate = [](float y) { return y > 0.0f ? std::min(y, 1.0f) : 0.0f; };
  return __floats2half2_rn(saturate(x.x), saturate(x.y));
}

template <typename T>
T __ldg(const T* at) {
  return *at;
}

inline void __trap() {
  std::fprintf(stderr, "a kernel called __trap\n");
  std::abort();
}

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
