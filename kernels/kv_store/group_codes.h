// SPDX-License-Identifier: Apache-2.0
// From a group of numbers to codes: its range, and the nearest levels. What is between them, the rounding of scale and
// low, takes a group's two numbers and no vectors.
#pragma once

#include <limits>

#include "activations.h"

namespace vllm_ext {

template <class V>
static void find_range(const float* x, int64_t n, float* least, float* greatest) {
  float low = std::numeric_limits<float>::infinity(), high = -low, poison = 0.0f;
  int64_t k = 0;
  if (n >= 16) {
    auto lows = V::load(x), highs = lows, poisons = V::zero();
    for (; k + 16 <= n; k += 16) {
      const auto values = V::load(x + k);
      lows = V::min(lows, values);
      highs = V::max(highs, values);
      poisons = V::fma(values, V::zero(), poisons);
    }
    low = -V::reduce_max(V::sub(V::zero(), lows));
    high = V::reduce_max(highs);
    poison = V::reduce_add(poisons);
  }
  for (; k < n; ++k) {
    low = x[k] < low ? x[k] : low;
    high = x[k] > high ? x[k] : high;
    poison += 0.0f * x[k];
  }
  *least = low + poison;
  *greatest = high + poison;
}

template <class V>
static float code_group(const float* x, int64_t n, float low, float scale, int top, uint8_t* codes) {
  const auto lows = V::repeat(low), scales = V::repeat(scale);
  auto error = V::zero();
  float tail_error = 0.0f;
  each_sixteen<V>(x, n, [&](int64_t k, typename V::Floats values) {
    // A true division, as in the reference: where a quotient is near a tie, a product gives the other code.
    auto steps = V::round(V::div(V::sub(values, lows), scales));
    steps = V::max(V::min(steps, V::repeat(static_cast<float>(top))), V::zero());
    const auto difference = V::sub(V::fma(scales, steps, lows), values);
    const int64_t count = k + 16 <= n ? 16 : n - k;
    if (count == 16 && top <= 127) {
      V::store_bytes(reinterpret_cast<int8_t*>(codes + k), V::to_ints(steps));
    } else {
      int32_t integers[16];
      V::store_ints(integers, V::to_ints(steps));
      for (int64_t i = 0; i < count; ++i) codes[k + i] = static_cast<uint8_t>(integers[i]);
    }
    if (count == 16) {
      error = V::fma(difference, difference, error);
    } else {
      float differences[16];
      V::store(differences, difference);
      for (int64_t i = 0; i < count; ++i) tail_error += differences[i] * differences[i];
    }
  });
  return V::reduce_add(error) + tail_error;
}

}  // namespace vllm_ext
