// SPDX-License-Identifier: Apache-2.0
// The operations of vector_avx512.h in plain C++: any machine, and the plainest statement of what each one does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vllm_ext {

struct Scalar {
  struct Codes {
    uint8_t byte[64];
  };
  struct Ints {
    int32_t lane[16];
  };
  struct Floats {
    float lane[16];
  };
  struct Word {
    int8_t byte[4];
  };

  static constexpr int kMaxRows = 2;
  static constexpr int kMaxChains = 1;
  // Rows of a plain weight, and tokens, whose sums are in registers at once.
  static constexpr int kPlainWeights = 2, kPlainTokens = 2;

  template <class Result, class Function>
  static Result each(Function function) {
    Result result;
    for (int i = 0; i < 16; ++i) result.lane[i] = function(i);
    return result;
  }

  static Codes load_codes(const uint8_t* p) {
    Codes c;
    std::memcpy(c.byte, p, 64);
    return c;
  }
  static void store_codes(uint8_t* p, const Codes& c) { std::memcpy(p, c.byte, 64); }
  template <int kMask>
  static Codes mask(Codes c) {
    for (uint8_t& byte : c.byte) byte &= kMask;
    return c;
  }
  // Within each byte: what follows masks the bits that differ from the 16-bit shifts of the vector units.
  template <int kBits>
  static Codes shift_right(Codes c) {
    for (uint8_t& byte : c.byte) byte = static_cast<uint8_t>(kBits >= 0 ? byte >> kBits : byte << -kBits);
    return c;
  }
  template <int kMask>
  static Codes select(Codes a, const Codes& b) {
    for (int i = 0; i < 64; ++i) a.byte[i] = static_cast<uint8_t>((a.byte[i] & kMask) | (b.byte[i] & ~kMask));
    return a;
  }

  static Word repeat_word(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Ints zero_ints() { return {}; }
  // Not inlined: its loops, repeated for each vector of each tile, would take a minute to compile.
  template <int kBits>
  __attribute__((noinline)) static Ints dot(Ints sum, const Codes& c, const Word& x) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 4; ++j) sum.lane[i] += c.byte[4 * i + j] * x.byte[j];
    }
    return sum;
  }
  static Ints add(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Ints shift_left_8(const Ints& a) {
    return each<Ints>([&](int i) { return a.lane[i] * 256; });
  }
  static Ints load_ints(const int32_t* p) {
    return each<Ints>([&](int i) { return p[i]; });
  }
  static void store_ints(int32_t* p, const Ints& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static Floats to_floats(const Ints& a) {
    return each<Floats>([&](int i) { return static_cast<float>(a.lane[i]); });
  }
  static Ints to_ints(const Floats& a) {
    // As the vector units do, out of range and NaN give the smallest integer.
    return each<Ints>([&](int i) {
      const float rounded = std::nearbyintf(a.lane[i]);
      return rounded >= -2147483648.0f && rounded < 2147483648.0f ? static_cast<int32_t>(rounded) : INT32_MIN;
    });
  }
  static void store_bytes(int8_t* p, const Ints& a) {
    for (int i = 0; i < 16; ++i) {
      p[i] = static_cast<int8_t>(a.lane[i] < -128 ? -128 : a.lane[i] > 127 ? 127 : a.lane[i]);
    }
  }

  static Floats zero() { return repeat(0.0f); }
  static Floats repeat(float a) {
    return each<Floats>([&](int) { return a; });
  }
  static Floats load(const float* p) {
    return each<Floats>([&](int i) { return p[i]; });
  }
  static void store(float* p, const Floats& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static Floats add(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Floats sub(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Floats mul(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Floats div(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Floats max(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Floats min(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Floats abs(const Floats& a) {
    return each<Floats>([&](int i) { return std::fabs(a.lane[i]); });
  }
  static Floats round(const Floats& a) {
    return each<Floats>([&](int i) { return std::nearbyintf(a.lane[i]); });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Floats fnma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return c.lane[i] - a.lane[i] * b.lane[i]; });
  }
  static Floats scale_by_power(const Floats& a, const Floats& n) {
    return each<Floats>([&](int i) { return std::ldexp(a.lane[i], static_cast<int>(n.lane[i])); });
  }
  static float reduce_add(const Floats& a) {
    float sum = 0.0f;
    for (float value : a.lane) sum += value;
    return sum;
  }
  static float reduce_max(const Floats& a) {
    float most = a.lane[0];
    for (float value : a.lane) most = value > most ? value : most;
    return most;
  }

  static float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  }
  static float widen_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    // A denormal half is fraction * 2**-24, a normal float.
    const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  static uint16_t narrow_to_half(float value) {
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x47800000u) return sign | 0x7c00u;
    if (magnitude < 0x38800000u) {
      // A denormal result counts multiples of 2**-24; adding 0.5 aligns them with the last bit of a float.
      return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
  }
  static Floats load_fp16(const void* p) {
    uint16_t halves[16];
    std::memcpy(halves, p, sizeof halves);
    return each<Floats>([&](int i) { return widen_half(halves[i]); });
  }
  static Floats load_bf16(const void* p) {
    uint16_t halves[16];
    std::memcpy(halves, p, sizeof halves);
    return each<Floats>([&](int i) { return from_bits(static_cast<uint32_t>(halves[i]) << 16); });
  }
  static void store_fp16(void* p, const Floats& a) {
    uint16_t halves[16];
    for (int i = 0; i < 16; ++i) halves[i] = narrow_to_half(a.lane[i]);
    std::memcpy(p, halves, sizeof halves);
  }
  static void store_bf16(void* p, const Floats& a) {
    uint16_t halves[16];
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = to_bits(a.lane[i]);
      halves[i] = static_cast<uint16_t>(a.lane[i] != a.lane[i] ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    std::memcpy(p, halves, sizeof halves);
  }

  static void prefetch(const uint8_t*) {}
};

}  // namespace vllm_ext
