// SPDX-License-Identifier: Apache-2.0
// Everything on activations: element types, rounding to int8, SwiGLU, weighted sums.
#pragma once

#include "kernels.h"

namespace vllm_ext {

// Calls function(k, values) for 16 floats at a time; of the last, those past n are zeros.
template <class V, class Function>
static inline __attribute__((always_inline)) void each_sixteen(const float* x, int64_t n, Function function) {
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) function(k, V::load(x + k));
  if (k < n) {
    float last[16] = {};
    for (int64_t i = k; i < n; ++i) last[i - k] = x[i];
    function(k, V::load(last));
  }
}

template <class V>
static void load_row(const void* x, Element element, int64_t n, float factor, float* out) {
  const auto* bytes = static_cast<const uint8_t*>(x);
  const int64_t size = element_bytes(element);
  const auto scale = V::repeat(factor);
  for (int64_t k = 0; k < n; k += 16) {
    uint8_t last[64] = {};
    const uint8_t* from = bytes + k * size;
    const bool is_whole = k + 16 <= n;
    if (!is_whole || element == Element::kFp32) {
      __builtin_memcpy(last, from, static_cast<std::size_t>((is_whole ? 16 : n - k) * size));
      from = last;
    }
    typename V::Floats values;
    if (element == Element::kBf16) {
      values = V::load_bf16(from);
    } else if (element == Element::kFp16) {
      values = V::load_fp16(from);
    } else {
      float floats[16];
      __builtin_memcpy(floats, from, sizeof floats);
      values = V::load(floats);
    }
    values = V::mul(values, scale);
    if (is_whole) {
      V::store(out + k, values);
    } else {
      float floats[16];
      V::store(floats, values);
      for (int64_t i = k; i < n; ++i) out[i] = floats[i - k];
    }
  }
}

template <class V>
static void store_row(const float* x, int64_t n, Element element, void* out) {
  auto* bytes = static_cast<uint8_t*>(out);
  const int64_t size = element_bytes(element);
  each_sixteen<V>(x, n, [&](int64_t k, typename V::Floats values) {
    uint8_t packed[64];
    if (element == Element::kBf16) {
      V::store_bf16(packed, values);
    } else if (element == Element::kFp16) {
      V::store_fp16(packed, values);
    } else {
      float floats[16];
      V::store(floats, values);
      __builtin_memcpy(packed, floats, sizeof floats);
    }
    const int64_t count = k + 16 <= n ? 16 : n - k;
    __builtin_memcpy(bytes + k * size, packed, static_cast<std::size_t>(count * size));
  });
}

template <class V>
static float find_largest(const float* x, int64_t n) {
  auto most = V::zero(), poison = V::zero();
  each_sixteen<V>(x, n, [&](int64_t, typename V::Floats values) {
    most = V::max(V::abs(values), most);
    // A maximum may lose a NaN; 0 * x is NaN for NaN and infinity.
    poison = V::fma(values, V::zero(), poison);
  });
  return V::reduce_max(most) + V::reduce_add(poison);
}

// Codes of 16 values: rounded, at most 127. `scale` must be positive.
template <class V>
static inline __attribute__((always_inline)) typename V::Floats round_to_codes(typename V::Floats values,
                                                                               typename V::Floats scale) {
  // A true division: a product with the inverse differs from the reference where a quotient is near a tie.
  const auto codes = V::round(V::div(values, scale));
  return V::max(V::min(codes, V::repeat(127.0f)), V::repeat(-127.0f));
}

template <class V>
static float round_group(const float* x, int64_t n, float largest, int8_t* codes) {
  const float scale = largest / 127.0f;
  if (!(scale > 0.0f)) {
    for (int64_t k = 0; k < n; ++k) codes[k] = 0;
    return scale;
  }
  each_sixteen<V>(x, n, [&](int64_t k, typename V::Floats values) {
    const auto integers = V::to_ints(round_to_codes<V>(values, V::repeat(scale)));
    if (k + 16 <= n) {
      V::store_bytes(codes + k, integers);
    } else {
      int8_t last[16];
      V::store_bytes(last, integers);
      for (int64_t i = k; i < n; ++i) codes[i] = last[i - k];
    }
  });
  return scale;
}

template <class V>
static void round_chunk(const float* x, int headers, int planes, const float* largest, const ChunkTarget& target) {
  const int columns = kDepth / headers;
  for (int group = 0; group < headers; ++group) {
    const float* values = x + group * columns;
    int8_t* codes = target.codes + group * columns;
    const float scale = (largest ? *largest : find_largest<V>(values, columns)) / 127.0f;
    float* out_scale = target.scales + group * target.stride;
    float* out_sum = target.sums + group * target.stride;
    if (!(scale > 0.0f)) {
      for (int plane = 0; plane < planes; ++plane) __builtin_memset(codes + plane * kDepth, 0, columns);
      *out_scale = scale;
      *out_sum = 0.0f;
      continue;
    }
    const auto divisor = V::repeat(scale);
    auto sum = V::zero(), low_sum = V::zero();
    for (int k = 0; k < columns; k += 16) {
      const auto quotient = V::div(V::load(values + k), divisor);
      const auto high = V::max(V::min(V::round(quotient), V::repeat(127.0f)), V::repeat(-127.0f));
      V::store_bytes(codes + k, V::to_ints(high));
      sum = V::add(sum, high);
      if (planes == 2) {
        auto low = V::round(V::mul(V::sub(quotient, high), V::repeat(256.0f)));
        low = V::max(V::min(low, V::repeat(127.0f)), V::repeat(-127.0f));
        V::store_bytes(codes + kDepth + k, V::to_ints(low));
        low_sum = V::add(low_sum, low);
      }
    }
    *out_sum = V::reduce_add(sum);
    *out_scale = scale;
    if (planes == 2) {
      *out_sum = 256.0f * *out_sum + V::reduce_add(low_sum);
      *out_scale = scale / 256.0f;
    }
  }
}

// e**x to about 2 units in the last place, for x in [-87, 88].
template <class V>
static inline __attribute__((always_inline)) typename V::Floats exponential(typename V::Floats x) {
  x = V::max(V::min(x, V::repeat(88.0f)), V::repeat(-87.0f));
  const auto n = V::round(V::mul(x, V::repeat(1.44269504f)));
  // ln 2 in two parts, so that the remainder is exact.
  const auto r = V::fnma(n, V::repeat(-2.12194440e-4f), V::fnma(n, V::repeat(0.693359375f), x));
  // Taylor's series: |r| <= ln(2) / 2, where its seventh term is below 2**-24.
  auto p = V::repeat(1.0f / 5040);
  p = V::fma(p, r, V::repeat(1.0f / 720));
  p = V::fma(p, r, V::repeat(1.0f / 120));
  p = V::fma(p, r, V::repeat(1.0f / 24));
  p = V::fma(p, r, V::repeat(1.0f / 6));
  p = V::fma(p, r, V::repeat(0.5f));
  p = V::fma(p, r, V::repeat(1.0f));
  p = V::fma(p, r, V::repeat(1.0f));
  return V::scale_by_power(p, n);
}

template <class V>
static void apply_swiglu(const float* pairs, int tokens, float* hidden, int64_t stride) {
  for (int token = 0; token < tokens; ++token, pairs += 2 * kRows, hidden += stride) {
    const auto up = V::load(pairs + kRows);
    // Below -88, where silu is 0 to 1e-36, the exponential no longer grows. In this order a NaN stays.
    const auto gate = V::max(V::repeat(-88.0f), V::load(pairs));
    const auto below = V::add(V::repeat(1.0f), exponential<V>(V::sub(V::zero(), gate)));
    V::store(hidden, V::mul(V::div(gate, below), up));
  }
}

template <class V>
static void add_weighted(const float* pairs, const float* weights, const int32_t* rows, int tokens, float* out,
                         int64_t stride) {
  for (int token = 0; token < tokens; ++token, pairs += 2 * kRows) {
    const auto weight = V::repeat(weights[token]);
    float* sum = out + rows[token] * stride;
    V::store(sum, V::fma(weight, V::load(pairs), V::load(sum)));
    V::store(sum + kRows, V::fma(weight, V::load(pairs + kRows), V::load(sum + kRows)));
  }
}

}  // namespace vllm_ext
