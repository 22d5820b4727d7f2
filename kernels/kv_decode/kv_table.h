// SPDX-License-Identifier: Apache-2.0
// One instruction set's functions for the quantized KV cache, from the operations of its vectors.
#pragma once

#include "kv_store/group_codes.h"
#include "products.h"
#include "rows.h"
#include "softmax.h"

namespace vllm_ext {

template <class V>
static constexpr KvKernels make_kv_table() {
  return {
      .unpack_keys = unpack_keys<V>,
      .unpack_values = unpack_values<V>,
      .multiply_codes = multiply_codes<V>,
      .load_scales = load_scales<V>,
      .round_row = round_row<V>,
      .add_scores = add_scores<V>,
      .exponentiate = exponentiate<V>,
      .weigh = weigh<V>,
      .add_products = add_products<V>,
      .dot_floats = dot_floats<V>,
      .add_floats = add_floats<V>,
      .find_range = find_range<V>,
      .code_group = code_group<V>,
  };
}

}  // namespace vllm_ext
