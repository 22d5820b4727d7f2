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

// One row of the weight times kTokens tokens: out[i * 32].
template <class V, Element kElement, int kTokens>
static void multiply_row(const void* weight, int64_t depth, const float* x, int64_t stride, float* out) {
  typename V::Floats sums[kTokens];
  for (auto& sum : sums) sum = V::zero();
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    const auto w = load_elements<V, kElement>(weight, k);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) sums[i] = V::fma(w, V::load(x + i * stride + k), sums[i]);
  }
  if (k < depth) {
    const auto w = load_last<V, kElement>(weight, k, depth - k);
    for (int i = 0; i < kTokens; ++i) sums[i] = V::fma(w, V::load(x + i * stride + k), sums[i]);
  }
  for (int i = 0; i < kTokens; ++i) out[i * 2 * kRows] = V::reduce_add(sums[i]);
}

template <class V, Element kElement>
static void multiply_elements(const PlainPair& pair) {
  for (int block = 0; block < 2; ++block) {
    for (int row = 0; row < kRows; ++row) {
      float* out = pair.out + block * kRows + row;
      if (row >= pair.rows[block]) {
        for (int token = 0; token < pair.tokens; ++token) out[token * 2 * kRows] = 0.0f;
        continue;
      }
      const auto* weight = static_cast<const uint8_t*>(pair.block[block]) + row * pair.depth * element_bytes(kElement);
      int token = 0;
      for (; token + 8 <= pair.tokens; token += 8) {
        multiply_row<V, kElement, 8>(weight, pair.depth, pair.x + token * pair.stride, pair.stride,
                                     out + token * 2 * kRows);
      }
      for (; token + 2 <= pair.tokens; token += 2) {
        multiply_row<V, kElement, 2>(weight, pair.depth, pair.x + token * pair.stride, pair.stride,
                                     out + token * 2 * kRows);
      }
      if (token < pair.tokens) {
        multiply_row<V, kElement, 1>(weight, pair.depth, pair.x + token * pair.stride, pair.stride,
                                     out + token * 2 * kRows);
      }
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
