// SPDX-License-Identifier: Apache-2.0
// The float32 part of attention: scores from integers, exponentials, and the weights of the values as integers.
#pragma once

#include "activations.h"
#include "kv_kernels.h"

namespace vllm_ext {

// 16 numbers in fp8 e4m3, or in fp16.
template <class V>
static inline __attribute__((always_inline)) typename V::Floats load_sixteen_scales(const uint8_t* from, bool is_fp8) {
  if (!is_fp8) return V::load_fp16(from);
  // The same digits as fp16, whose exponent has another bias: 2**8 too small. All ones are NaN in both, after a sum.
  uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const unsigned digits = from[i] & 127u;
    halves[i] = static_cast<uint16_t>((from[i] & 128u) << 8 | ((digits << 7) + (digits + 1) / 128 * 0x3e80u));
  }
  return V::mul(V::load_fp16(halves), V::repeat(256.0f));
}

template <class V>
static void load_scales(const uint8_t* from, int64_t count, bool is_fp8, float* out) {
  const int64_t size = is_fp8 ? 1 : 2;
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) V::store(out + k, load_sixteen_scales<V>(from + k * size, is_fp8));
  if (k == count) return;
  uint8_t bytes[2 * kLanes] = {};
  float last[kLanes];
  __builtin_memcpy(bytes, from + k * size, static_cast<std::size_t>((count - k) * size));
  V::store(last, load_sixteen_scales<V>(bytes, is_fp8));
  for (int64_t i = k; i < count; ++i) out[i] = last[i - k];
}

template <class V>
static float round_row(const float* x, int64_t n, int8_t* high_codes, int8_t* low_codes) {
  const float scale = find_largest<V>(x, n) / 127.0f;
  if (!(scale > 0.0f)) {
    __builtin_memset(high_codes, 0, static_cast<std::size_t>(n));
    __builtin_memset(low_codes, 0, static_cast<std::size_t>(n));
    return scale;
  }
  // Not a division: no reference rounds these, and half a unit of the last plane is all that may differ.
  const auto inverse = V::repeat(1.0f / scale), least = V::repeat(-127.0f), most = V::repeat(127.0f);
  for (int64_t k = 0; k < n; k += kLanes) {
    const auto quotient = V::mul(V::load(x + k), inverse);
    const auto high = V::max(V::min(V::round(quotient), most), least);
    V::store_bytes(high_codes + k, V::to_ints(high));
    const auto rest = V::round(V::mul(V::sub(quotient, high), V::repeat(256.0f)));
    V::store_bytes(low_codes + k, V::to_ints(V::max(V::min(rest, most), least)));
  }
  return scale / 256.0f;
}

template <class V>
static inline __attribute__((always_inline)) typename V::Floats join_planes(const int32_t* high, const int32_t* low) {
  // Not joined as integers: of wide codes and long rows, 256 times the high sum may need more than 32 bits.
  return V::fma(V::to_floats(V::load_ints(high)), V::repeat(256.0f), V::to_floats(V::load_ints(low)));
}

template <class V>
static void add_scores(const ScoreTerm& term) {
  const auto factor = V::repeat(term.factor), sum = V::repeat(term.sum);
  for (int i = 0; i < term.tokens; i += kLanes) {
    const auto before = term.is_first ? V::repeat(term.offset) : V::load(term.scores + i);
    const auto dot = V::mul(factor, join_planes<V>(term.high + i, term.low + i));
    const auto coded = V::fma(V::load(term.scales + i), dot, before);
    V::store(term.scores + i, V::fma(V::load(term.lows + i), sum, coded));
  }
}

template <class V>
static float exponentiate(float* scores, int64_t n, float* most) {
  auto largest = V::repeat(*most), poison = V::zero();
  for (int64_t k = 0; k < n; k += kLanes) {
    const auto values = V::load(scores + k);
    largest = V::max(values, largest);
    // A maximum may lose a NaN; 0 times it is NaN.
    poison = V::fma(values, V::zero(), poison);
  }
  *most = V::reduce_max(largest) + V::reduce_add(poison);
  if (*most <= kUnseen) {
    __builtin_memset(scores, 0, static_cast<std::size_t>(n) * sizeof(float));
    return 0.0f;
  }
  const auto shift = V::repeat(*most);
  auto sum = V::zero();
  for (int64_t k = 0; k < n; k += kLanes) {
    const auto weight = exponential<V>(V::sub(V::load(scores + k), shift));
    V::store(scores + k, weight);
    sum = V::add(sum, weight);
  }
  return V::reduce_add(sum);
}

template <class V>
static float weigh(const float* weights, const float* scales, const float* lows, int64_t n, float* out) {
  auto sum = V::zero();
  for (int64_t k = 0; k < n; k += kLanes) {
    const auto weight = V::load(weights + k);
    V::store(out + k, V::mul(weight, V::load(scales + k)));
    sum = V::fma(weight, V::load(lows + k), sum);
  }
  return V::reduce_add(sum);
}

template <class V>
static void add_products(const int32_t* high, const int32_t* low, int64_t n, float scale, float keep, float* sums) {
  const auto factor = V::repeat(scale), kept = V::repeat(keep);
  for (int64_t k = 0; k < n; k += kLanes) {
    const auto products = join_planes<V>(high + k, low + k);
    V::store(sums + k, V::fma(factor, products, V::mul(kept, V::load(sums + k))));
  }
}

template <class V>
static void dot_floats(const float* query, int rows, const float* keys, int tokens, int64_t D, float scale,
                       float* scores) {
  for (int token = 0; token < tokens; ++token, keys += D) {
    for (int row = 0; row < rows; ++row) {
      auto sum = V::zero();
      for (int64_t k = 0; k < D; k += kLanes) sum = V::fma(V::load(query + row * D + k), V::load(keys + k), sum);
      scores[row * kTileTokens + token] = scale * V::reduce_add(sum);
    }
  }
}

template <class V>
static void add_floats(const float* weights, int rows, const float* values, int tokens, int64_t D, const float* keep,
                       float* sums) {
  constexpr int kColumns = 4;
  for (int row = 0; row < rows; ++row, weights += kTileTokens, sums += D) {
    const auto kept = V::repeat(keep[row]);
    for (int64_t k = 0; k < D; k += kColumns * kLanes) {
      const int columns = static_cast<int>(D - k < kColumns * kLanes ? (D - k) / kLanes : kColumns);
      typename V::Floats sum[kColumns];
      for (int i = 0; i < kColumns; ++i) {
        sum[i] = i < columns ? V::mul(kept, V::load(sums + k + i * kLanes)) : V::zero();
      }
      for (int token = 0; token < tokens; ++token) {
        const auto weight = V::repeat(weights[token]);
        const float* from = values + token * D + k;
        if (columns == kColumns) {
#pragma GCC unroll 4
          for (int i = 0; i < kColumns; ++i) sum[i] = V::fma(weight, V::load(from + i * kLanes), sum[i]);
        } else {
          for (int i = 0; i < columns; ++i) sum[i] = V::fma(weight, V::load(from + i * kLanes), sum[i]);
        }
      }
      for (int i = 0; i < columns; ++i) V::store(sums + k + i * kLanes, sum[i]);
    }
  }
}

}  // namespace vllm_ext
