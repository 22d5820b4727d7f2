// SPDX-License-Identifier: Apache-2.0
// What `mixed_moe` computes in one pass, before it computes: which pairs each expert has, where their activations lie,
// and the tasks of the first block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "lanes.h"
#include "workspace.h"

namespace vllm_ext {

enum { kGateUp, kDown, kNumBlocks };

// Pairs of one chunk: 128 intermediate columns are 8 times 16 of gate and of up.
constexpr int64_t kChunkPairs = kDepth / kRows;

struct MoeLayer {
  const at::Tensor& arena;
  const int64_t* table;
  int64_t num_experts, hidden_size, intermediate_size;
};

struct Expert {
  Block gate_up, down;
  int64_t first, count;  // of the sorted pairs
  BlockInput input, hidden;
  float* late_hidden;  // float32 rows, where the down block's scales span more than a chunk
};

struct GateUpTask {
  int expert, chunk;
  int64_t begin, count;
  int64_t cost;
  int slice;
};

struct MoeWorkspace : Workspace {
  std::vector<int32_t> local_ids;   // [tokens * top k]; -1 for none
  std::vector<int64_t> offsets;     // of each expert's pairs
  std::vector<int32_t> tokens;      // of the sorted pairs, within the pass
  std::vector<float> weights;       // routing weights of the sorted pairs
  std::vector<float> sum_weights;   // by which outputs are summed: those, or 1
  std::vector<Expert> experts;      // that have pairs, in the order of the table
  std::vector<int32_t> pair_experts;
  std::vector<GateUpTask> tasks;
  std::vector<int64_t> slice_ends;  // of the tasks
};

template <class Id, class Local>
inline void map_ids(const Id* ids, int64_t count, const Local* map, int64_t limit, int64_t num_local_experts,
                    std::vector<int32_t>& local_ids) {
  local_ids.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    int64_t id = ids[i];
    TORCH_CHECK_VALUE(id < limit, "topk_ids holds ", id, ", but there are ", limit, " experts");
    if (id >= 0 && map) {
      id = map[id];
      TORCH_CHECK_VALUE(id < num_local_experts, "expert_map holds ", id, ", but the table has ", num_local_experts,
                        " local experts");
    }
    local_ids[static_cast<size_t>(i)] = id < 0 ? -1 : static_cast<int32_t>(id);
  }
}

// Fills tokens, weights, experts and pair_experts from local_ids [num_tokens * top_k]; returns the number of pairs.
inline int64_t sort_pairs(const MoeLayer& layer, const int32_t* local_ids, const float* routing, int64_t num_tokens,
                          int64_t top_k, bool weight_on_input, MoeWorkspace& work) {
  const auto num_experts = static_cast<size_t>(layer.num_experts);
  work.offsets.assign(num_experts + 1, 0);
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    if (local_ids[i] >= 0) ++work.offsets[static_cast<size_t>(local_ids[i]) + 1];
  }
  work.experts.clear();
  work.pair_experts.clear();
  for (size_t expert = 0; expert < num_experts; ++expert) {
    const int64_t count = work.offsets[expert + 1], first = work.offsets[expert];
    work.offsets[expert + 1] += first;
    if (count == 0) continue;
    const int64_t* rows = layer.table + static_cast<int64_t>(expert) * kNumBlocks * kNumFields;
    const int index = static_cast<int>(work.experts.size());
    const int64_t hidden_size = layer.hidden_size, intermediate_size = layer.intermediate_size;
    work.experts.push_back({read_block(rows, layer.arena, 2 * intermediate_size, hidden_size, /*gate_up=*/true),
                            read_block(rows + kNumFields, layer.arena, hidden_size, intermediate_size, /*gate_up=*/false),
                            first,
                            count,
                            {},
                            {},
                            nullptr});
    work.pair_experts.insert(work.pair_experts.end(), static_cast<size_t>(count), index);
  }
  const int64_t pairs = work.offsets[num_experts];
  work.tokens.resize(static_cast<size_t>(pairs));
  work.weights.resize(static_cast<size_t>(pairs));
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    if (local_ids[i] < 0) continue;
    const auto place = static_cast<size_t>(work.offsets[static_cast<size_t>(local_ids[i])]++);
    work.tokens[place] = static_cast<int32_t>(i / top_k);
    work.weights[place] = routing[i];
  }
  work.sum_weights.assign(work.weights.begin(), work.weights.end());
  if (weight_on_input) std::fill(work.sum_weights.begin(), work.sum_weights.end(), 1.0f);
  return pairs;
}

// Gives every expert its part of the scratch memory. Their addresses must not change any more.
inline void place_inputs(MoeWorkspace& work) {
  int64_t num_bytes = 0;
  for (const Expert& expert : work.experts) {
    num_bytes += BlockInput::plan_bytes(expert.gate_up, expert.count);
    num_bytes += BlockInput::plan_bytes(expert.down, expert.count);
    if (expert.down.act_group) {
      num_bytes += Scratch::part_bytes<float>(expert.count * BlockInput::stride_of(expert.down));
    }
  }
  work.shared.reserve(num_bytes);
  for (Expert& expert : work.experts) {
    expert.input.place(expert.gate_up, expert.count, work.shared);
    expert.hidden.place(expert.down, expert.count, work.shared);
    if (expert.down.act_group) {
      expert.late_hidden = work.shared.take<float>(expert.count * BlockInput::stride_of(expert.down));
    }
  }
}

// Fills tasks and slice_ends: a slice of tasks for each lane, all of about the same cost, of experts that lie one after
// the other; in each the longest first, so that the lanes end at about the same time.
inline void sort_gate_up(MoeWorkspace& work, int lanes) {
  // Bytes of weights that are read in the time in which one row of integers is multiplied with one pair's chunk.
  constexpr int64_t kRowCost = 160;
  work.tasks.clear();
  int64_t total = 0;
  for (size_t i = 0; i < work.experts.size(); ++i) {
    const Expert& expert = work.experts[i];
    const int64_t panel = panel_tokens(expert.gate_up);
    for (int64_t begin = 0; begin < expert.count; begin += panel) {
      const int64_t count = std::min(panel, expert.count - begin);
      const int64_t cost = expert.gate_up.pair_bytes() + kRowCost * count * expert.gate_up.planes;
      for (int64_t chunk = 0; chunk < expert.down.chunks(); ++chunk, total += cost) {
        work.tasks.push_back({static_cast<int>(i), static_cast<int>(chunk), begin, count, cost, 0});
      }
    }
  }
  const int64_t slices = count_slices(lanes);
  work.slice_ends.assign(static_cast<size_t>(slices), 0);
  int64_t before = 0;
  for (GateUpTask& task : work.tasks) {
    // The slice in which the task's middle lies.
    task.slice = static_cast<int>((2 * before + task.cost) * slices / (2 * total));
    before += task.cost;
    ++work.slice_ends[static_cast<size_t>(task.slice)];
  }
  for (size_t i = 1; i < work.slice_ends.size(); ++i) work.slice_ends[i] += work.slice_ends[i - 1];
  // Ties in memory order.
  std::sort(work.tasks.begin(), work.tasks.end(), [](const GateUpTask& a, const GateUpTask& b) {
    if (a.slice != b.slice) return a.slice < b.slice;
    if (a.cost != b.cost) return a.cost > b.cost;
    if (a.expert != b.expert) return a.expert < b.expert;
    return a.begin != b.begin ? a.begin < b.begin : a.chunk < b.chunk;
  });
}

}  // namespace vllm_ext
