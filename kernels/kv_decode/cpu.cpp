// SPDX-License-Identifier: Apache-2.0
// `attend` on the CPU. reference.py is the specification.
//
//     attend    task = a range of the context, for up to 32 query rows that share a kv head; its softmax alone
//     merge     task = the parts of those rows' context, where they are several
//
// How a context is split depends on the number of threads, so results may differ in their last bits between machines,
// never between runs.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

#include "attend_unit.h"
#include "dispatch.h"
#include "lanes.h"

namespace vllm_ext {
namespace {

// Tasks per thread that a step should have: they differ in length, and threads in speed.
constexpr int64_t kTasksPerLane = 8;
// Tiles below which a part of a context does not repay its merging.
constexpr int64_t kLeastTiles = 8;

struct Task {
  int32_t unit;
  int32_t part;
  int64_t first, end;  // tiles
};

struct AttendWorkspace : Workspace {
  PageLayout layout;
  std::vector<Unit> units;
  std::vector<Task> tasks;
  std::vector<int32_t> split;  // units of several parts
};

WorkspacePool<AttendWorkspace>& pool() {
  static WorkspacePool<AttendWorkspace> workspaces;
  return workspaces;
}

// [rows, heads, D] with D contiguous: a slice of a fused projection is read as it lies.
at::Tensor make_rows(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

TokenRows find_rows(const at::Tensor& x) {
  const int64_t bytes = x.element_size();
  return {static_cast<const uint8_t*>(x.const_data_ptr()), find_element(x.scalar_type()), x.stride(0) * bytes,
          x.stride(1) * bytes};
}

at::Tensor make_ints(const at::Tensor& x) { return x.to(at::kInt).contiguous(); }

// Calibration in the order: order, smooth, shift. Keeps what it converts alive.
struct CoordinateTensors {
  at::Tensor order, smooth, shift;

  CoordinateTensors(const std::optional<at::Tensor>& order_given, const std::optional<at::Tensor>& smooth_given,
                    const std::optional<at::Tensor>& shift_given, int64_t kv_heads, int64_t D) {
    const auto take = [&](const std::optional<at::Tensor>& given, at::ScalarType type, const char* name) {
      if (!given) return at::Tensor();
      TORCH_CHECK_VALUE(given->dim() == 2 && given->size(0) == kv_heads && given->size(1) == D, name, " must be [",
                        kv_heads, ", ", D, "], got ", given->sizes());
      return given->to(type).contiguous();
    };
    order = take(order_given, at::kLong, "order");
    smooth = take(smooth_given, at::kFloat, "smooth");
    shift = take(shift_given, at::kFloat, "shift");
    if (!order.defined()) return;
    const int64_t* channel = order.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < order.numel(); ++i) {
      TORCH_CHECK_VALUE(channel[i] >= 0 && channel[i] < D, "order holds ", channel[i], ", but head_dim=", D);
    }
  }

  Coordinates find() const {
    return {order.defined() ? order.const_data_ptr<int64_t>() : nullptr,
            smooth.defined() ? smooth.const_data_ptr<float>() : nullptr,
            shift.defined() ? shift.const_data_ptr<float>() : nullptr};
  }
};

// Raises ValueError for what a query needs and no page holds.
void check_request(const Problem& problem, int64_t request, int64_t num_blocks) {
  const int64_t length = problem.seq_lens[request];
  TORCH_CHECK_VALUE(problem.step_start(request) >= 0, "request ", request, " has more queries than its seq_len of ",
                    length);
  const int64_t columns = divide_up(length, problem.layout.block_size);
  TORCH_CHECK_VALUE(columns <= problem.table_width, "request ", request, " has ", length, " tokens, but block_table has ",
                    problem.table_width, " blocks of ", problem.layout.block_size);
  const int32_t* blocks = problem.block_table + request * problem.table_width;
  for (int64_t i = 0; i < columns; ++i) {
    TORCH_CHECK_VALUE(blocks[i] >= 0 && blocks[i] < num_blocks, "block_table holds ", blocks[i], " for request ",
                      request, ", but there are ", num_blocks, " blocks");
  }
  const int64_t group = problem.group_tokens();
  for (int64_t position = length / group * group; position < length; ++position) {
    TORCH_CHECK_VALUE(problem.is_kept(request, position), "a query needs a key of a group of ", group,
                      " tokens that is not complete, and its full-precision page is gone: keep ", group - 1,
                      " tokens beyond the window");
  }
}

void check_recent_table(const Problem& problem, int64_t requests, int64_t num_pages) {
  for (int64_t i = 0; i < requests * problem.recent_width; ++i) {
    TORCH_CHECK_VALUE(problem.recent_table[i] < num_pages, "recent_table holds ", problem.recent_table[i],
                      ", but there are ", num_pages, " pages");
  }
}

// Units and tasks of a step; returns the floats that parts of units need.
int64_t plan_tasks(const Problem& problem, int64_t requests, int lanes, AttendWorkspace& work) {
  work.units.clear();
  work.tasks.clear();
  work.split.clear();
  const int64_t group = problem.heads / problem.kv_heads;
  const int64_t heads = std::min(group, kMaxQueryRows), queries = std::max<int64_t>(1, kMaxQueryRows / heads);
  const auto count_tiles = [&](const Unit& unit) {
    return divide_up(problem.step_start(unit.request) + unit.first_query + unit.queries, kTileTokens);
  };
  int64_t total = 0;
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t length = problem.query_start_loc[request + 1] - problem.query_start_loc[request];
    for (int64_t first = 0; first < length; first += queries) {
      for (int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
        for (int64_t head = 0; head < group; head += heads) {
          work.units.push_back({request, kv_head, head, std::min(heads, group - head), first,
                                std::min(queries, length - first), 1, nullptr});
          total += count_tiles(work.units.back());
        }
      }
    }
  }
  const int64_t target = std::max(kLeastTiles, divide_up(total, kTasksPerLane * lanes));
  int64_t floats = 0;
  for (size_t i = 0; i < work.units.size(); ++i) {
    Unit& unit = work.units[i];
    const int64_t tiles = count_tiles(unit);
    unit.parts = std::max<int64_t>(1, divide_up(tiles, target));
    for (int64_t part = 0; part < unit.parts; ++part) {
      work.tasks.push_back({static_cast<int32_t>(i), static_cast<int32_t>(part), tiles * part / unit.parts,
                            tiles * (part + 1) / unit.parts});
    }
    if (unit.parts > 1) {
      work.split.push_back(static_cast<int32_t>(i));
      floats += unit.parts * Sums::count(unit.rows(), problem.layout);
    }
  }
  return floats;
}

void run(const Problem& problem, int64_t requests, AttendWorkspace& work) {
  const int lanes = at::get_num_threads();
  work.grow_lanes(lanes);
  const int64_t floats = plan_tasks(problem, requests, lanes, work);
  work.shared.reserve(Scratch::part_bytes<float>(floats));
  float* partial = work.shared.take<float>(floats);
  for (const int32_t i : work.split) {
    Unit& unit = work.units[static_cast<size_t>(i)];
    unit.partial = partial;
    partial += unit.parts * Sums::count(unit.rows(), problem.layout);
  }
  const Stage attend{static_cast<int64_t>(work.tasks.size()), [&](int64_t index, int64_t, int lane) {
    const Task& task = work.tasks[static_cast<size_t>(index)];
    const Unit& unit = work.units[static_cast<size_t>(task.unit)];
    UnitAttention attention(problem, unit, *work.lanes[static_cast<size_t>(lane)]);
    if (unit.parts == 1) {
      attention.attend(task.first, task.end, /*with_near=*/true, attention.own_sums());
      attention.finish(attention.own_floats(), 0, 1);
      return;
    }
    float* part = unit.partial + task.part * Sums::count(unit.rows(), problem.layout);
    attention.attend(task.first, task.end, task.part == 0, Sums::place(part, unit.rows(), problem.layout));
  }};
  const Stage merge{static_cast<int64_t>(work.split.size()), [&](int64_t index, int64_t, int lane) {
    const Unit& unit = work.units[static_cast<size_t>(work.split[static_cast<size_t>(index)])];
    UnitAttention attention(problem, unit, *work.lanes[static_cast<size_t>(lane)]);
    attention.finish(unit.partial, Sums::count(unit.rows(), problem.layout), unit.parts);
  }};
  run_stages(problem.kernels, lanes, attend, merge);
}

at::Tensor kv_attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& cache,
                     const at::Tensor& block_table, const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                     const at::Tensor& recent, const at::Tensor& recent_table, at::IntArrayRef layout,
                     const std::optional<at::Tensor>& key_order, const std::optional<at::Tensor>& key_smooth,
                     const std::optional<at::Tensor>& key_shift, const std::optional<at::Tensor>& value_order,
                     const std::optional<at::Tensor>& value_smooth, const std::optional<at::Tensor>& value_shift,
                     double scale, int64_t window, int64_t sinks) {
  TORCH_CHECK_VALUE(layout.size() == kNumLayoutFields, "layout must have ", kNumLayoutFields, " fields, got ",
                    layout.size());
  auto workspace = pool().acquire();
  workspace->layout.read(layout.data());
  const PageLayout& pages = workspace->layout;
  const int64_t D = pages.head_dim;
  TORCH_CHECK_VALUE(cache.dim() == 4 && cache.scalar_type() == at::kByte && cache.size(2) == pages.block_size &&
                        cache.size(3) == pages.cell_bytes && cache.stride(3) == 1 &&
                        cache.stride(2) == pages.cell_bytes,
                    "cache must be uint8 [blocks, kv heads, ", pages.block_size, ", ", pages.cell_bytes,
                    "] whose planes are contiguous, got ", cache.scalar_type(), " ", cache.sizes(), " with strides ",
                    cache.strides());
  const int64_t kv_heads = cache.size(1);
  TORCH_CHECK_VALUE(query.dim() == 3 && query.size(2) == D && kv_heads > 0 && query.size(1) % kv_heads == 0 &&
                        query.size(1) > 0,
                    "query ", query.sizes(), " does not fit ", kv_heads, " kv heads of head_dim=", D);
  for (const at::Tensor* side : {&key, &value}) {
    TORCH_CHECK_VALUE(side->dim() == 3 && side->size(0) == query.size(0) && side->size(1) == kv_heads &&
                          side->size(2) == D,
                      side == &key ? "key" : "value", " must be float [", query.size(0), ", ", kv_heads, ", ", D,
                      "], got ", side->scalar_type(), " ", side->sizes());
  }
  const int64_t requests = seq_lens.numel();
  TORCH_CHECK_VALUE(query_start_loc.numel() == requests + 1, "query_start_loc must be int [", requests + 1, "], got ",
                    query_start_loc.sizes());
  TORCH_CHECK_VALUE(block_table.dim() == 2 && block_table.size(0) >= requests, "block_table must be int [", requests,
                    " requests, blocks], got ", block_table.sizes());
  TORCH_CHECK_VALUE(recent_table.dim() == 2 && recent_table.size(0) >= requests, "recent_table must be int [",
                    requests, " requests, pages], got ", recent_table.sizes());
  TORCH_CHECK_VALUE(recent.dim() == 4 && recent.size(1) == kv_heads && recent.size(3) == 2 * D && recent.stride(3) == 1 &&
                        recent.size(2) > 0,
                    "recent must be float [pages, ", kv_heads, ", at least 1 token, ", 2 * D, "], got ",
                    recent.sizes());
  TORCH_CHECK_VALUE(window >= 0 && sinks >= 0, "window and sinks must not be negative, got ", window, " and ", sinks);

  const at::Tensor queries = make_rows(query), keys = make_rows(key), values = make_rows(value);
  const at::Tensor table = make_ints(block_table), starts = make_ints(query_start_loc), lens = make_ints(seq_lens);
  const at::Tensor recents = make_ints(recent_table);
  const CoordinateTensors of_keys(key_order, key_smooth, key_shift, kv_heads, D);
  const CoordinateTensors of_values(value_order, value_smooth, value_shift, kv_heads, D);
  at::Tensor out = at::empty(query.sizes(), query.options());
  const int64_t width = recent.element_size();
  const Problem problem{
      .kernels = current_kernels(),
      .layout = pages,
      .heads = query.size(1),
      .kv_heads = kv_heads,
      .query = find_rows(queries),
      .key = find_rows(keys),
      .value = find_rows(values),
      .out = static_cast<uint8_t*>(out.data_ptr()),
      .cache = static_cast<const uint8_t*>(cache.const_data_ptr()),
      .block_stride = cache.stride(0),
      .plane_stride = cache.stride(1),
      .block_table = table.const_data_ptr<int32_t>(),
      .table_width = table.size(1),
      .query_start_loc = starts.const_data_ptr<int32_t>(),
      .seq_lens = lens.const_data_ptr<int32_t>(),
      .recent = {static_cast<const uint8_t*>(recent.const_data_ptr()), find_element(recent.scalar_type()),
                 recent.stride(0) * width, recent.stride(1) * width, recent.stride(2) * width, D * width,
                 recent.size(2)},
      .recent_table = recents.const_data_ptr<int32_t>(),
      .recent_width = recents.size(1),
      .key_coordinates = of_keys.find(),
      .value_coordinates = of_values.find(),
      .scale = static_cast<float>(scale),
      .window = window,
      .sinks = sinks,
  };
  TORCH_CHECK_VALUE(problem.query_start_loc[0] == 0, "query_start_loc begins at ", problem.query_start_loc[0],
                    ", but the first request's first token is 0");
  check_recent_table(problem, requests, recent.size(0));
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t first = problem.query_start_loc[request], last = problem.query_start_loc[request + 1];
    TORCH_CHECK_VALUE(0 <= first && first <= last && last <= query.size(0), "query_start_loc has request ", request,
                      " at ", first, " to ", last, " of ", query.size(0), " tokens");
    if (first < last) check_request(problem, request, cache.size(0));
  }
  // Rows past the last request pad a batch.
  const int64_t used = requests ? problem.query_start_loc[requests] : 0;
  const int64_t row_bytes = query.size(1) * D * query.element_size();
  std::memset(problem.out + used * row_bytes, 0, static_cast<size_t>((query.size(0) - used) * row_bytes));
  run(problem, requests, *workspace);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_ext_cpu, library) {
  library.def(
      "kv_attend(Tensor query, Tensor key, Tensor value, Tensor cache, Tensor block_table, Tensor query_start_loc, "
      "Tensor seq_lens, Tensor recent, Tensor recent_table, int[] layout, Tensor? key_order, Tensor? key_smooth, "
      "Tensor? key_shift, Tensor? value_order, Tensor? value_smooth, Tensor? value_shift, float scale, int window, "
      "int sinks) -> Tensor");
}

TORCH_LIBRARY_IMPL(vllm_ext_cpu, CPU, library) { library.impl("kv_attend", &kv_attend); }

}  // namespace vllm_ext
