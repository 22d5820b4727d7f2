// SPDX-License-Identifier: Apache-2.0
// `mixed_linear` on the CPU. reference.py is the specification.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "blocks.h"
#include "dispatch.h"
#include "lanes.h"

namespace vllm_ext {
namespace {

// Columns of the table: the arena's fields, then the number of outputs.
constexpr int kNumRows = kNumFields, kNumColumns = kNumFields + 1;

// Tokens per pass: bounds the scratch memory of long prompts.
constexpr int64_t kPassTokens = 1024;

// Pairs of 16 outputs per task: a stretch of weights that is long enough for the prefetcher.
constexpr int64_t kTaskPairs = 4;

// How a block is divided: ranges of pairs, times panels of tokens.
struct BlockTasks {
  int64_t end;  // number of the last task, plus 1
  int64_t first_output, pairs, ranges;
};

struct LinearWorkspace : Workspace {
  std::vector<Block> blocks;
  std::vector<BlockTasks> tasks;   // one per block
  std::vector<BlockInput> inputs;  // one per block; blocks of one format share their memory
  std::vector<float> bias;
};

bool same_input(const Block& a, const Block& b) {
  return a.is_records == b.is_records && (!a.is_records || (a.headers == b.headers && a.planes == b.planes &&
                                                            a.act_group == b.act_group));
}

WorkspacePool<LinearWorkspace>& pool() {
  static WorkspacePool<LinearWorkspace> workspaces;
  return workspaces;
}

std::optional<at::Tensor> mixed_linear(const at::Tensor& x, const at::Tensor& arena, const at::Tensor& table,
                                       int64_t out_features, const std::optional<at::Tensor>& bias) {
  if (!is_for_kernels(x, table, kNumColumns)) return std::nullopt;
  TORCH_CHECK_VALUE(x.dim() > 0, "x must be [..., K], got ", x.sizes());
  const Element element = find_element(x.scalar_type());
  TORCH_CHECK_VALUE(arena.dim() == 1 && arena.scalar_type() == at::kByte && arena.is_contiguous(),
                    "arena must be contiguous uint8 [bytes], got ", arena.scalar_type(), " ", arena.sizes());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == kNumColumns && table.scalar_type() == at::kLong,
                    "table must be int64 [row blocks, ", kNumColumns, "], got ", table.scalar_type(), " ",
                    table.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == out_features && bias->is_floating_point()),
                    "bias must be float [", out_features, "]");
  const int64_t K = x.size(-1);
  check_size("K", K);
  const at::Tensor fields = table.contiguous();
  const auto* rows = fields.const_data_ptr<int64_t>();
  const int64_t num_blocks = table.size(0);
  int64_t total = 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    check_size("the number of outputs of a row block", rows[i * kNumColumns + kNumRows]);
    total += rows[i * kNumColumns + kNumRows];
  }
  TORCH_CHECK_VALUE(total == out_features, "out_features is ", out_features, ", but the table describes ", total,
                    " outputs");
  auto workspace = pool().acquire();
  workspace->blocks.clear();
  for (int64_t i = 0; i < num_blocks; ++i) {
    workspace->blocks.push_back(
        read_block(rows + i * kNumColumns, arena, rows[i * kNumColumns + kNumRows], K, /*gate_up=*/false));
  }

  const at::Tensor inputs = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  at::Tensor out = at::empty(shape, x.options());
  const int64_t all_tokens = x.numel() / K;
  if (all_tokens == 0) return out;
  const float* bias_values = nullptr;
  const Kernels& kernels = current_kernels();
  if (bias) {
    const at::Tensor row = (bias->scalar_type() == at::kDouble ? bias->to(at::kFloat) : *bias).contiguous();
    workspace->bias.resize(static_cast<size_t>(out_features));
    kernels.load_row(row.const_data_ptr(), find_element(row.scalar_type()), out_features, 1.0f, workspace->bias.data());
    bias_values = workspace->bias.data();
  }
  const auto* in = static_cast<const uint8_t*>(inputs.const_data_ptr());
  auto* result = static_cast<uint8_t*>(out.data_ptr());
  const int64_t size = element_bytes(element), padded = divide_up(K, kDepth) * kDepth;
  const int lanes = at::get_num_threads();
  workspace->grow_lanes(lanes);
  auto& blocks = workspace->blocks;
  auto& block_inputs = workspace->inputs;
  block_inputs.resize(blocks.size());
  int64_t panel = 240;
  for (const Block& block : blocks) panel = std::min(panel, panel_tokens(block));

  for (int64_t pass = 0; pass < all_tokens; pass += kPassTokens) {
    const int64_t tokens = std::min(kPassTokens, all_tokens - pass);
    int64_t num_bytes = 0;
    for (const Block& block : blocks) num_bytes += BlockInput::plan_bytes(block, tokens);
    workspace->shared.reserve(num_bytes);
    for (size_t i = 0; i < blocks.size(); ++i) block_inputs[i].place(blocks[i], tokens, workspace->shared);
    // Each distinct form of the activations is computed once.
    const auto first_alike = [&](size_t i) {
      size_t j = 0;
      while (!same_input(blocks[j], blocks[i])) ++j;
      return j;
    };
    const int64_t grain = std::max<int64_t>(1, 4096 / padded);
    const Stage round{divide_up(tokens, grain), [&](int64_t task, int lane) {
      Scratch& scratch = *workspace->lanes[static_cast<size_t>(lane)];
      scratch.reserve(Scratch::part_bytes<float>(padded));
      auto* row = scratch.take<float>(padded);
      std::fill(row + K, row + padded, 0.0f);
      for (int64_t token = task * grain; token < std::min(tokens, (task + 1) * grain); ++token) {
        kernels.load_row(in + (pass + token) * K * size, element, K, 1.0f, row);
        for (size_t i = 0; i < blocks.size(); ++i) {
          if (first_alike(i) == i) block_inputs[i].set_row(kernels, token, row);
        }
      }
    }};

    auto& block_tasks = workspace->tasks;
    block_tasks.clear();
    int64_t first_output = 0, num_tasks = 0;
    for (const Block& block : blocks) {
      const int64_t pairs = std::clamp<int64_t>(block.pairs() / (4 * lanes), 1, kTaskPairs);
      const int64_t ranges = divide_up(block.pairs(), pairs);
      num_tasks += divide_up(tokens, panel) * ranges;
      block_tasks.push_back({num_tasks, first_output, pairs, ranges});
      first_output += block.N;
    }
    const Stage multiply{num_tasks, [&](int64_t task, int64_t next_task, int lane) {
      size_t i = 0;
      while (task >= block_tasks[i].end) ++i;
      const BlockTasks& mine = block_tasks[i];
      const Block& block = blocks[i];
      const BlockInput& input = block_inputs[first_alike(i)];
      const int64_t number = task - (i ? block_tasks[i - 1].end : 0);
      const int64_t begin = number / mine.ranges * panel, count = std::min(panel, tokens - begin);
      const int64_t first_pair = number % mine.ranges * mine.pairs;
      const int64_t last_pair = std::min(block.pairs(), first_pair + mine.pairs);
      const int64_t following = next_task < task ? std::max<int64_t>(first_pair - mine.pairs, 0) : last_pair;
      Scratch& scratch = *workspace->lanes[static_cast<size_t>(lane)];
      scratch.reserve(Scratch::part_bytes<float>(count * 2 * kRows));
      auto* sums = scratch.take<float>(count * 2 * kRows);
      for (int64_t pair = first_pair; pair < last_pair; ++pair) {
        const uint8_t* next = block.find_pair(pair + 1 < last_pair ? pair + 1 : following);
        input.multiply(kernels, block, pair, begin, count, next, sums);
        const int64_t output = pair * 2 * kRows, outputs = std::min<int64_t>(2 * kRows, block.N - output);
        const int64_t column = mine.first_output + output;
        for (int64_t token = 0; token < count; ++token) {
          float* values = sums + token * 2 * kRows;
          if (bias_values) {
            for (int64_t n = 0; n < outputs; ++n) values[n] += bias_values[column + n];
          }
          kernels.store_row(values, outputs, element,
                            result + ((pass + begin + token) * out_features + column) * size);
        }
      }
    }};
    run_stages(kernels, lanes, round, multiply);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(vllm_ext_cpu, CPU, library) { library.impl("mixed_linear", &mixed_linear); }

}  // namespace vllm_ext
