// SPDX-License-Identifier: Apache-2.0
// Unpacked codes times int8 rows, on vectors.
#pragma once

#include "kv_kernels.h"

namespace vllm_ext {

// kRows rows times kBlocks blocks. Enough sums at once to hide the latency of a dot product.
template <class V, int kNumRows, int kBlocks, int kBits>
static inline void multiply_some(const CodeProduct& product, int row, int block) {
  typename V::Ints sums[kNumRows][kBlocks];
  for (auto& row_sums : sums) {
    for (auto& sum : row_sums) sum = V::zero_ints();
  }
  const int8_t* x = product.x + row * product.x_stride;
  const uint8_t* codes = product.codes + block * product.block_stride;
  for (int v = 0; v < product.vectors; ++v, x += 4, codes += kVectorBytes) {
    typename V::Codes loaded[kBlocks];
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) loaded[i] = V::load_codes(codes + i * product.block_stride);
#pragma GCC unroll 4
    for (int j = 0; j < kNumRows; ++j) {
      const auto word = V::repeat_word(x + j * product.x_stride);
#pragma GCC unroll 4
      for (int i = 0; i < kBlocks; ++i) sums[j][i] = V::template dot<kBits>(sums[j][i], loaded[i], word);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kNumRows; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) {
      V::store_ints(product.out + (row + j) * product.out_stride + kLanes * (block + i), sums[j][i]);
    }
  }
}

template <class V, int kNumRows, int kBits>
static void multiply_row_group(const CodeProduct& product, int row) {
  constexpr int kBlocks = V::kMaxRows >= 4 ? 4 : 1;
  int block = 0;
  for (; block + kBlocks <= product.blocks; block += kBlocks) {
    multiply_some<V, kNumRows, kBlocks, kBits>(product, row, block);
  }
  if constexpr (kBlocks > 1) {
    for (; block < product.blocks; ++block) multiply_some<V, kNumRows, 1, kBits>(product, row, block);
  }
}

template <class V, int kBits>
static void multiply_width_of(const CodeProduct& product) {
  constexpr int kMost = V::kMaxRows >= 4 ? 4 : 1;
  int row = 0;
  for (; row + kMost <= product.rows; row += kMost) multiply_row_group<V, kMost, kBits>(product, row);
  if constexpr (kMost > 1) {
    for (; row < product.rows; ++row) multiply_row_group<V, 1, kBits>(product, row);
  }
}

template <class V>
static void multiply_codes(const CodeProduct& product) {
  if (product.bits <= 4) return multiply_width_of<V, 4>(product);
  multiply_width_of<V, 8>(product);
}

}  // namespace vllm_ext
