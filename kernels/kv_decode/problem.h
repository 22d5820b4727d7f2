// SPDX-License-Identifier: Apache-2.0
// One call of `attend`, as pointers; and the rule of kv_decode/reference.py: which query reads which key how.
#pragma once

#include "kernels.h"
#include "kv_store/cells.h"

namespace vllm_ext {

// Rows of D elements at [token][head], strides in bytes.
struct TokenRows {
  const uint8_t* data;
  Element element;
  int64_t token_stride, head_stride;

  const uint8_t* find(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// Full-precision pages: K of `token` is at its row, V `value_offset` bytes further.
struct RecentPages {
  const uint8_t* data;
  Element element;
  int64_t page_stride, head_stride, token_stride, value_offset;
  int64_t page_tokens;
};

// Calibration of K or V of one layer, null where there is none; `codec.CodecTensors` says what they are.
struct Coordinates {
  const int64_t* order;
  const float* smooth;
  const float* shift;
};

struct Problem {
  const Kernels& kernels;
  const PageLayout& layout;
  int64_t heads, kv_heads;
  TokenRows query, key, value;
  uint8_t* out;  // [tokens][heads][D], of the query's element

  const uint8_t* cache;
  int64_t block_stride, plane_stride;
  const int32_t* block_table;
  int64_t table_width;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  RecentPages recent;
  const int32_t* recent_table;
  int64_t recent_width;

  Coordinates key_coordinates, value_coordinates;
  float scale;
  int64_t window, sinks;

  int64_t group_tokens() const { return layout.key.is_per_channel ? layout.key.group_size : 1; }
  // The first position after the sinks that a query reads in full precision; it may be below 0.
  int64_t find_window(int64_t position) const {
    const int64_t start = position - window + 1, tokens = group_tokens();
    return (start >= 0 ? start / tokens : -((-start + tokens - 1) / tokens)) * tokens;
  }
  int64_t step_start(int64_t request) const {
    return seq_lens[request] - (query_start_loc[request + 1] - query_start_loc[request]);
  }
  // The full-precision page of a token before this step; 0: none.
  int64_t find_page(int64_t request, int64_t position) const {
    const int64_t column = position / recent.page_tokens;
    if (column >= recent_width) return 0;
    return std::max<int32_t>(recent_table[request * recent_width + column], 0);
  }
  bool is_kept(int64_t request, int64_t position) const {
    return position >= step_start(request) || find_page(request, position) > 0;
  }
  bool is_full_precision(int64_t request, int64_t query, int64_t position) const {
    return (position < sinks || position >= find_window(query)) && is_kept(request, position);
  }
};

}  // namespace vllm_ext
