// SPDX-License-Identifier: Apache-2.0
// One instruction set's table, from the operations of its vectors.
#pragma once

#include "activations.h"
#include "kv_decode/kv_table.h"
#include "plain.h"
#include "thread_state.h"
#include "tile.h"

namespace vllm_ext {

template <class V>
static constexpr Kernels make_table(const char* name, unsigned needs) {
  return {
      .name = name,
      .needs = needs,
      .enter = enter_flushing,
      .leave = leave_flushing,
      .multiply_records = multiply_records<V>,
      .multiply_plain = multiply_plain<V>,
      .load_row = load_row<V>,
      .store_row = store_row<V>,
      .find_largest = find_largest<V>,
      .round_group = round_group<V>,
      .round_chunk = round_chunk<V>,
      .apply_swiglu = apply_swiglu<V>,
      .add_weighted = add_weighted<V>,
      .kv = make_kv_table<V>(),
  };
}

}  // namespace vllm_ext
