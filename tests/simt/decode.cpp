// One decode layer on the CPU: planner, windows, attention kernels and merge (see simt.h).
#include "patternkv/decode_hopper.cuh"
#include "patternkv/decode_merge.cuh"
#include "patternkv/decode_narrow.cuh"
#include "patternkv/decode_plan.cuh"
#include "patternkv/decode_warpgroup.cuh"
#include "patternkv/decode_wide.cuh"
#include "simt.h"

namespace patternkv {
namespace {

// A GPU of few blocks, so that small cases have several rounds of chunks too.
constexpr int kBlocks = 6, kNarrowBlocks = 12;
constexpr int kMaxItems = 8192, kMaxStates = 8192;

// As tests/simt_decode.py passes it; see DecodePlan, Window and tree_decode for what is what.
struct Arguments {
  const void* q;
  uint8_t* buffer;
  const int* req_to_token;
  const __half* patterns;
  const __half* channel_scale;
  const int4* segments;
  const int* row_indptr;
  const int* rows;
  const int64_t* sources;  // null: nothing to list, as in plan::SlotList
  const int* source_req_to_token;
  void* window_k;
  void* window_v;
  const int64_t* ring;
  const int64_t* window_start;
  const int64_t* window_end;
  const void* new_k;
  const void* new_v;
  void* out;
  float* lse;
  int64_t req_stride, b, h_q, h_kv, page_size, num_patterns, num_segments, nnz, num_listed, window,
      bf16,
      hopper,       // the kernels of compute capability 9.0
      schedule,     // of warps, see simt::schedule
      fewest_rows,  // from which shared segments there are for the kernels of more than 32 rows
      num_narrow,   // answered: work items of private segments with a kernel of their own
      num_wide,     // answered: the other work items for kernels of up to 32 rows
      num_many;     // answered: those for the kernel of the most rows
  double sm_scale, logit_cap;
};

template <typename T>
merge::MergeParams<T> merge_params(const Arguments& a, const DecodeParams& params) {
  merge::MergeParams<T> p = {};
  p.q = static_cast<const T*>(a.q);
  p.q_stride = params.q_stride;
  p.work = params.work;
  p.state_out = params.state_out;
  p.state_sum = params.state_sum;
  p.first_window_state = kMaxStates;
  p.out = static_cast<T*>(a.out);
  p.lse = a.lse;
  p.window = {static_cast<T*>(a.window_k),
              static_cast<T*>(a.window_v),
              a.ring,
              a.window_start,
              a.window_end,
              static_cast<const T*>(a.new_k),
              static_cast<const T*>(a.new_v),
              a.h_kv * HEAD_DIM,
              a.h_kv * HEAD_DIM,
              static_cast<int>(a.window)};
  p.h_kv = a.h_kv;
  p.group = params.group;
  p.scale_log2 = params.scale_log2;
  p.cap_log2 = params.cap_log2;
  return p;
}

// Windows, those of batches with `many` rows ahead of the rest, which `attend` is, and the merge.
template <typename T, typename Attend>
void decode_layer(const Arguments& a, const DecodeParams& params, bool many, Attend attend) {
  const auto p = merge_params<T>(a, params);
  const auto launch = [&](auto kernel, dim3 grid, int threads) {
    simt::launch({grid.x, grid.y, 1}, threads, 0, [&] { kernel(p); });
  };
  const auto place = merge::place_of_windows(a.window, many);
  if (place == merge::WindowPlace::kAhead) {
    window::choose_kernel<T>(a.b, a.h_kv, p.group, kBlocks, launch);
  }
  attend();
  merge::choose_merge<T>(a.b, a.h_kv, p.group, place, kBlocks, launch);
}

}  // namespace

extern "C" void decode(Arguments* arguments) {
  Arguments& a = *arguments;
  simt::schedule = a.schedule;
  const int group = a.h_q / a.h_kv;
  const int64_t rows = a.b * group;
  const bool hopper = a.hopper && hopper::kExists && a.num_patterns <= hopper::kMostPatterns;
  const int narrow_rows = group > 4 ? 8 : 4;
  WorkHeader header;
  std::vector<WorkItem> narrow_items(kMaxItems), wide_items(kMaxItems);
  std::vector<StateRun> runs(a.nnz);
  std::vector<int> run_indptr(a.b + 1), places(a.nnz);
  const int64_t num_states = kMaxStates + a.b;  // those of windows behind the planner's
  std::vector<float> state_out(num_states * a.h_q * HEAD_DIM, NAN);
  std::vector<float2> state_sum(num_states * a.h_q, float2{NAN, NAN});

  plan::PlanParams p = {};
  p.segments = a.segments;
  p.row_indptr = a.row_indptr;
  p.rows = a.rows;
  p.num_segments = a.num_segments;
  p.b = a.b;
  p.group = group;
  p.h_kv = a.h_kv;
  p.narrow_rows = narrow_rows;
  const int wide_rows = !hopper ? wide::kMostRows : rows <= 16 ? 16 : 32;
  const bool many = a.hopper && warpgroup::kExists && rows > 32;
  if (many) {
    p.many_branches = warpgroup::kMostRows / group;
    p.many_blocks = kBlocks, p.fewest_rows = a.fewest_rows;
  }
  p.wide_branches = wide_rows / group;
  p.narrow_blocks = kNarrowBlocks, p.wide_blocks = kBlocks;
  p.max_narrow = p.max_wide = kMaxItems;
  p.max_states = kMaxStates;
  p.max_runs = a.nnz;
  p.work = {&header, narrow_items.data(), wide_items.data(), run_indptr.data(), runs.data()};
  p.places = places.data();
  SimtIndex plan_grid = {1, 1, 1};
  if (a.sources != nullptr) {
    p.list = {a.source_req_to_token, a.sources, const_cast<int*>(a.req_to_token),
              static_cast<int>(a.num_listed)};
    plan_grid.x += 2;
  }
  simt::launch(plan_grid, plan::kPlanThreads, 0, [&] { plan::plan_kernel(p); });
  a.num_narrow = header.num_narrow, a.num_wide = header.num_wide, a.num_many = header.num_many;

  DecodeParams d = {};
  d.q = a.q;
  d.q_stride = a.h_q * HEAD_DIM;
  d.q_is_bf16 = a.bf16;
  d.pool = SlotPool::make(a.buffer, a.page_size, a.h_kv);
  d.copy16 = d.pool.page_bytes % 16 == 0 && K_ROW_BYTES % 16 == 0 && V_ROW_BYTES % 16 == 0;
  d.req_to_token = a.req_to_token;
  d.req_stride = a.req_stride;
  d.patterns = a.patterns;
  d.channel_scale = a.channel_scale;
  d.num_patterns = a.num_patterns;
  d.rows = a.rows;
  d.work = p.work;
  d.state_out = state_out.data();
  d.state_sum = state_sum.data();
  d.scale_log2 = static_cast<float>(a.sm_scale * M_LOG2E);
  d.cap_log2 = static_cast<float>(a.logit_cap * M_LOG2E);
  d.h_q = a.h_q;
  d.group = group;
  d.group_inverse = (65536 + group - 1) / group;
  const auto attend = [&] {
    const SimtIndex grid = {kBlocks, 1, 1};
    const SimtIndex narrow_grid = {kNarrowBlocks, 1, 1};
    simt::launch(narrow_grid, kThreads, narrow::shared_bytes(a.num_patterns, narrow_rows), [&] {
      narrow_rows == 4 ? narrow::attend_kernel<4>(d) : narrow::attend_kernel<8>(d);
    });
    if (!hopper) {
      simt::launch(grid, kThreads, wide::shared_bytes(a.num_patterns),
                   [&] { wide::attend_kernel(d); });
    } else if constexpr (hopper::kExists) {
      const auto launch = [&](auto rows, auto patterns) {
        constexpr int kRows = decltype(rows)::value, kPatterns = decltype(patterns)::value;
        simt::launch(grid, kThreads, hopper::shared_bytes<kRows, kPatterns>(),
                     [&] { hopper::attend_kernel<kRows, kPatterns>(d); });
      };
      const auto launch_up_to = [&](auto patterns) {
        if (wide_rows == 16) {
          launch(std::integral_constant<int, 16>(), patterns);
        } else {
          launch(std::integral_constant<int, 32>(), patterns);
        }
      };
      if (a.num_patterns <= hopper::kGroupPatterns) {
        launch_up_to(std::integral_constant<int, hopper::kGroupPatterns>());
      } else {
        launch_up_to(std::integral_constant<int, hopper::kMostPatterns>());
      }
    }
    if constexpr (warpgroup::kExists) {
      const auto launch = [&](auto tile) {
        constexpr int kTile = decltype(tile)::value;
        simt::launch(grid, warpgroup::kBlockThreads, warpgroup::shared_bytes<kTile>(a.num_patterns),
                     [&] { warpgroup::attend_kernel<kTile>(d); });
      };
      if (many) {
        if (a.num_patterns <= 128) {
          launch(std::integral_constant<int, 64>());
        } else {
          launch(std::integral_constant<int, 32>());
        }
      }
    }
  };
  if (a.bf16) {
    decode_layer<__nv_bfloat16>(a, d, many, attend);
  } else {
    decode_layer<__half>(a, d, many, attend);
  }
}

}  // namespace patternkv
