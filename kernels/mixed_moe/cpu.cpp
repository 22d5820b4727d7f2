// SPDX-License-Identifier: Apache-2.0
// `mixed_moe` on the CPU. reference.py is the specification.
//
//     sort      (token, expert) pairs by expert
//     round     each pair's x to what its expert's gate_up block wants, packed for the kernels
//     gate_up   task = 128 intermediate columns of one expert: gate and up, SwiGLU, rounding for the down block
//     down      task = a range of output columns: all experts in the order of the table, summed in float32
//
// No task writes what another writes, and no sum depends on the number of threads or on which of them was faster.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "dispatch.h"
#include "experts.h"

namespace vllm_ext {
namespace {

// Tokens per pass: bounds the scratch memory of long prompts.
constexpr int64_t kPassTokens = 1024;

WorkspacePool<MoeWorkspace>& pool() {
  static WorkspacePool<MoeWorkspace> workspaces;
  return workspaces;
}

struct Call {
  const Kernels& kernels;
  int lanes;
  int64_t hidden_size;
  Element element;
  bool weight_on_input;
  MoeWorkspace& work;

  Scratch& lane(int index) { return *work.lanes[static_cast<size_t>(index)]; }

  auto plan_round_inputs(const uint8_t* x, int64_t pairs) {
    const int64_t padded = divide_up(hidden_size, kDepth) * kDepth;
    const int64_t grain = std::max<int64_t>(1, 4096 / padded);
    return Stage{divide_up(pairs, grain), [this, x, pairs, padded, grain](int64_t task, int index) {
      Scratch& scratch = lane(index);
      scratch.reserve(Scratch::part_bytes<float>(padded));
      auto* row = scratch.take<float>(padded);
      std::fill(row + hidden_size, row + padded, 0.0f);
      for (int64_t pair = task * grain; pair < std::min(pairs, (task + 1) * grain); ++pair) {
        const auto place = static_cast<size_t>(pair);
        Expert& expert = work.experts[static_cast<size_t>(work.pair_experts[place])];
        kernels.load_row(x + work.tokens[place] * hidden_size * element_bytes(element), element, hidden_size,
                         weight_on_input ? work.weights[place] : 1.0f, row);
        expert.input.set_row(kernels, pair - expert.first, row);
      }
    }};
  }

  // The first weights of a task.
  const uint8_t* find_task(int64_t index) const {
    const GateUpTask& task = work.tasks[static_cast<size_t>(index)];
    return work.experts[static_cast<size_t>(task.expert)].gate_up.find_pair(task.chunk * kChunkPairs);
  }

  auto plan_gate_up() {
    sort_gate_up(work, lanes);
    const auto multiply = [this](int64_t index, int64_t next_index, int lane_index) {
      const GateUpTask& task = work.tasks[static_cast<size_t>(index)];
      Expert& expert = work.experts[static_cast<size_t>(task.expert)];
      Scratch& scratch = lane(lane_index);
      scratch.reserve(Scratch::part_bytes<float>(task.count * 2 * kRows) +
                      Scratch::part_bytes<float>(task.count * kDepth));
      auto* sums = scratch.take<float>(task.count * 2 * kRows);
      auto* columns = scratch.take<float>(task.count * kDepth);
      // A last chunk of fewer columns: the kernels of the down block read zeros there.
      const int64_t first_pair = task.chunk * kChunkPairs;
      const int64_t pairs = std::min(kChunkPairs, expert.gate_up.pairs() - first_pair);
      if (pairs < kChunkPairs) std::fill(columns, columns + task.count * kDepth, 0.0f);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint8_t* next = pair + 1 < pairs ? expert.gate_up.find_pair(first_pair + pair + 1) : find_task(next_index);
        expert.input.multiply(kernels, expert.gate_up, first_pair + pair, task.begin, task.count, next, sums);
        kernels.apply_swiglu(sums, static_cast<int>(task.count), columns + pair * kRows, kDepth);
      }
      for (int64_t i = 0; i < task.count; ++i) {
        const int64_t token = task.begin + i;
        if (expert.late_hidden) {
          std::memcpy(expert.late_hidden + token * BlockInput::stride_of(expert.down) + task.chunk * kDepth,
                      columns + i * kDepth, kDepth * sizeof(float));
        } else {
          expert.hidden.set_chunk(kernels, token, task.chunk, columns + i * kDepth, nullptr);
        }
      }
    };
    return Stage{static_cast<int64_t>(work.tasks.size()), multiply, work.slice_ends.data()};
  }

  // Scales that span more than a chunk need all of a token's hidden columns first.
  auto plan_late_hidden(int64_t pairs) {
    const bool is_needed =
        std::any_of(work.experts.begin(), work.experts.end(), [](const Expert& expert) { return expert.late_hidden; });
    return Stage{is_needed ? pairs : 0, [this](int64_t pair, int) {
      Expert& expert = work.experts[static_cast<size_t>(work.pair_experts[static_cast<size_t>(pair)])];
      if (!expert.late_hidden) return;
      const int64_t token = pair - expert.first;
      expert.hidden.set_row(kernels, token, expert.late_hidden + token * BlockInput::stride_of(expert.down));
    }};
  }

  auto plan_down(uint8_t* out, int64_t num_tokens) {
    // Wide ranges are long streams of weights; the sums of all tokens must stay in the L2 cache; and there must be
    // some ranges for each thread.
    const int64_t widest = num_tokens <= 64 ? 512 : 256;
    const int64_t fair = divide_up(hidden_size, 4 * lanes);
    const int64_t width = std::clamp<int64_t>(divide_up(fair, 2 * kRows) * 2 * kRows, 2 * kRows, widest);
    int64_t panel = 0;
    for (const Expert& expert : work.experts) {
      panel = std::max(panel, std::min(expert.count, panel_tokens(expert.down)));
    }
    return Stage{divide_up(hidden_size, width), [=, this](int64_t task, int64_t next_task, int index) {
      Scratch& scratch = lane(index);
      scratch.reserve(Scratch::part_bytes<float>(panel * 2 * kRows) + Scratch::part_bytes<float>(num_tokens * width));
      auto* products = scratch.take<float>(panel * 2 * kRows);
      auto* sums = scratch.take<float>(num_tokens * width);
      std::fill(sums, sums + num_tokens * width, 0.0f);
      const int64_t first = task * width, columns = std::min(width, hidden_size - first);
      const int64_t first_pair = first / (2 * kRows), last_pair = first_pair + divide_up(columns, 2 * kRows) - 1;
      for (size_t i = 0; i < work.experts.size(); ++i) {
        const Expert& expert = work.experts[i];
        const bool is_last = i + 1 == work.experts.size();
        // After the range of one expert comes that of the next one; after the last, the next range of the first.
        const uint8_t* following = is_last ? work.experts[0].down.find_pair(next_task * width / (2 * kRows))
                                           : work.experts[i + 1].down.find_pair(first_pair);
        const int64_t step = panel_tokens(expert.down);
        for (int64_t begin = 0; begin < expert.count; begin += step) {
          const int64_t count = std::min(step, expert.count - begin);
          const auto place = static_cast<size_t>(expert.first + begin);
          for (int64_t pair = first_pair; pair <= last_pair; ++pair) {
            const uint8_t* next = pair < last_pair ? expert.down.find_pair(pair + 1) : following;
            expert.hidden.multiply(kernels, expert.down, pair, begin, count, next, products);
            kernels.add_weighted(products, &work.sum_weights[place], &work.tokens[place], static_cast<int>(count),
                                 sums + (pair - first_pair) * 2 * kRows, width);
          }
        }
      }
      for (int64_t token = 0; token < num_tokens; ++token) {
        kernels.store_row(sums + token * width, columns, element,
                          out + (token * hidden_size + first) * element_bytes(element));
      }
    }};
  }
};

std::tuple<std::optional<at::Tensor>, int64_t> mixed_moe(const at::Tensor& x, const at::Tensor& topk_ids,
                                                         const at::Tensor& topk_weights, const at::Tensor& arena,
                                                         const at::Tensor& table,
                                                         const std::optional<at::Tensor>& expert_map,
                                                         int64_t intermediate_size, bool weight_on_input) {
  if (!is_for_kernels(x, table, kNumFields)) return {std::nullopt, 0};
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be [tokens, hidden], got ", x.sizes());
  const Element element = find_element(x.scalar_type());
  const auto is_integer = [](const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong;
  };
  TORCH_CHECK_VALUE(topk_ids.dim() == 2 && topk_ids.size(0) == x.size(0) && is_integer(topk_ids),
                    "topk_ids must be int [", x.size(0), ", top k], got ", topk_ids.scalar_type(), " ",
                    topk_ids.sizes());
  TORCH_CHECK_VALUE(topk_weights.sizes() == topk_ids.sizes(), "topk_weights must have the shape of topk_ids ",
                    topk_ids.sizes(), ", got ", topk_weights.sizes());
  TORCH_CHECK_VALUE(arena.dim() == 1 && arena.scalar_type() == at::kByte && arena.is_contiguous(),
                    "arena must be contiguous uint8 [bytes], got ", arena.scalar_type(), " ", arena.sizes());
  TORCH_CHECK_VALUE(table.dim() == 3 && table.size(1) == kNumBlocks && table.size(2) == kNumFields &&
                        table.scalar_type() == at::kLong,
                    "table must be int64 [local experts, ", static_cast<int>(kNumBlocks), ", ",
                    static_cast<int>(kNumFields), "], got ", table.scalar_type(), " ", table.sizes());
  TORCH_CHECK_VALUE(!expert_map || (expert_map->dim() == 1 && is_integer(*expert_map)),
                    "expert_map must be int [global experts]");
  check_size("hidden size", x.size(1));
  // A gate_up weight has twice as many rows.
  check_size("intermediate_size", intermediate_size, kSizeLimit / 2);

  const int64_t num_tokens = x.size(0), hidden_size = x.size(1), top_k = topk_ids.size(1);
  const int64_t num_experts = table.size(0);
  const at::Tensor inputs = x.contiguous(), ids = topk_ids.contiguous();
  const at::Tensor routing = topk_weights.to(at::kFloat).contiguous(), fields = table.contiguous();
  const at::Tensor map = expert_map ? expert_map->contiguous() : at::Tensor();
  const int64_t limit = expert_map ? map.numel() : num_experts;

  auto workspace = pool().acquire();
  const auto map_from = [&](const auto* values) {
    const auto map_by = [&](const auto* local) {
      map_ids(values, ids.numel(), local, limit, num_experts, workspace->local_ids);
    };
    if (!expert_map) return map_by(static_cast<const int32_t*>(nullptr));
    return map.scalar_type() == at::kInt ? map_by(map.const_data_ptr<int32_t>()) : map_by(map.const_data_ptr<int64_t>());
  };
  if (ids.scalar_type() == at::kInt) {
    map_from(ids.const_data_ptr<int32_t>());
  } else {
    map_from(ids.const_data_ptr<int64_t>());
  }
  const int lanes = at::get_num_threads();
  workspace->grow_lanes(lanes);
  const MoeLayer layer{arena, fields.const_data_ptr<int64_t>(), num_experts, hidden_size, intermediate_size};
  Call call{current_kernels(), lanes, hidden_size, element, weight_on_input, *workspace};

  at::Tensor out = at::empty({num_tokens, hidden_size}, x.options());
  const auto* in = static_cast<const uint8_t*>(inputs.const_data_ptr());
  auto* result = static_cast<uint8_t*>(out.data_ptr());
  const int64_t row_bytes = hidden_size * element_bytes(element);
  int64_t total = 0;
  for (int64_t first = 0; first < num_tokens; first += kPassTokens) {
    const int64_t tokens = std::min(kPassTokens, num_tokens - first);
    const int64_t pairs = sort_pairs(layer, workspace->local_ids.data() + first * top_k,
                                     routing.const_data_ptr<float>() + first * top_k, tokens, top_k, weight_on_input,
                                     *workspace);
    total += pairs;
    if (pairs == 0) {
      std::memset(result + first * row_bytes, 0, static_cast<size_t>(tokens * row_bytes));
      continue;
    }
    place_inputs(*workspace);
    run_stages(call.kernels, lanes, call.plan_round_inputs(in + first * row_bytes, pairs), call.plan_gate_up(),
               call.plan_late_hidden(pairs), call.plan_down(result + first * row_bytes, tokens));
  }
  return {out, total};
}

}  // namespace

TORCH_LIBRARY_IMPL(vllm_ext_cpu, CPU, library) { library.impl("mixed_moe", &mixed_moe); }

}  // namespace vllm_ext
