// SPDX-License-Identifier: Apache-2.0
// Weights that are stored as they are (bf16, fp16, fp32), in float32 arithmetic: no rounding but that of the result.
#pragma once

#include "kernels.h"

namespace vllm_ext {

template <class V, Element kElement>
static inline __attribute__((always_inline)) typename V::Floats load_elements(const void* weight, int64_t k) {
  const auto* bytes = static_cast<const uint8_t*>(weight) + k * element_bytes(kElement);
  if constexpr (kElement == Element::kBf16) return V::load_bf16(bytes);
  if constexpr (kElement == Element::kFp16) return V::load_fp16(bytes);
  if constexpr (kElement == Element::kFp32) {
    float values[16];
    __builtin_memcpy(values, bytes, sizeof values);
    return V::load(values);
  }
}

// The last `count` < 16 elements of a row, then zeros; never past the row's end.
template <class V, Element kElement>
static typename V::Floats load_last(const void* weight, int64_t k, int64_t count) {
  uint8_t bytes[64] = {};
  __builtin_memcpy(bytes, static_cast<const uint8_t*>(weight) + k * element_bytes(kElement),
                   static_cast<std::size_t>(count * element_bytes(kElement)));
  return load_elements<V, kElement>(bytes, 0);
}

// kWeights rows of the weight times kTokens tokens from `token` on: out[i * 32 + row]. Each value that is loaded is used
// in several products, since a core multiplies twice as fast as it loads.
template <class V, Element kElement, int kWeights, int kTokens>
static void multiply_rows(const PlainPair& pair, const uint8_t* weight, int token, float* out) {
  const int64_t depth = pair.depth, stride = pair.stride, row_bytes = depth * element_bytes(kElement);
  const float* x = pair.x + token * stride;
  out += token * 2 * kRows;
  typename V::Floats sums[kWeights][kTokens];
  for (auto& row : sums) {
    for (auto& sum : row) sum = V::zero();
  }
  typename V::Floats w[kWeights];
  const auto add_products = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      const auto values = V::load(x + i * stride + k);
#pragma GCC unroll 4
      for (int row = 0; row < kWeights; ++row) sums[row][i] = V::fma(w[row], values, sums[row][i]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
#pragma GCC unroll 4
    for (int row = 0; row < kWeights; ++row) w[row] = load_elements<V, kElement>(weight + row * row_bytes, k);
    add_products(k);
  }
  if (k < depth) {
    for (int row = 0; row < kWeights; ++row) w[row] = load_last<V, kElement>(weight + row * row_bytes, k, depth - k);
    add_products(k);
  }
  for (int row = 0; row < kWeights; ++row) {
    for (int i = 0; i < kTokens; ++i) out[i * 2 * kRows + row] = V::reduce_add(sums[row][i]);
  }
}

template <class V, Element kElement, int kWeights>
static void multiply_all_tokens(const PlainPair& pair, const uint8_t* weight, float* out) {
  constexpr int most = V::kPlainTokens;
  int token = 0;
  for (; token + most <= pair.tokens; token += most) multiply_rows<V, kElement, kWeights, most>(pair, weight, token, out);
  for (; token + 2 <= pair.tokens; token += 2) multiply_rows<V, kElement, kWeights, 2>(pair, weight, token, out);
  if (token < pair.tokens) multiply_rows<V, kElement, kWeights, 1>(pair, weight, token, out);
}

template <class V, Element kElement>
static void multiply_elements(const PlainPair& pair) {
  const int64_t row_bytes = pair.depth * element_bytes(kElement);
  for (int block = 0; block < 2; ++block) {
    const auto* weight = static_cast<const uint8_t*>(pair.block[block]);
    float* out = pair.out + block * kRows;
    int row = 0;
    // One or two tokens wait for memory, which gives one row after the other sooner than several in turn.
    const int last = pair.tokens > 2 ? pair.rows[block] - V::kPlainWeights : -1;
    for (; row <= last; row += V::kPlainWeights) {
      multiply_all_tokens<V, kElement, V::kPlainWeights>(pair, weight + row * row_bytes, out + row);
    }
    for (; row < pair.rows[block]; ++row) {
      multiply_all_tokens<V, kElement, 1>(pair, weight + row * row_bytes, out + row);
    }
    for (; row < kRows; ++row) {
      for (int token = 0; token < pair.tokens; ++token) out[token * 2 * kRows + row] = 0.0f;
    }
  }
}

// x must be readable, and finite, up to the next multiple of 16 elements.
template <class V>
static void multiply_plain(const PlainPair& pair) {
  switch (pair.element) {
    case Element::kBf16: return multiply_elements<V, Element::kBf16>(pair);
    case Element::kFp16: return multiply_elements<V, Element::kFp16>(pair);
    case Element::kFp32: return multiply_elements<V, Element::kFp32>(pair);
  }
}

}  // namespace vllm_ext
