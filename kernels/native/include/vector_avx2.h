// SPDX-License-Identifier: Apache-2.0
// The operations of vector_avx512.h in pairs of 256-bit registers, with AVX-VNNI (kVnni) or without.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define VLLM_EXT_INLINE static inline __attribute__((always_inline))

namespace vllm_ext {

template <bool kVnni>
struct Avx2 {
  struct Codes {
    __m256i half[2];
  };
  struct Ints {
    __m256i half[2];
  };
  struct Floats {
    __m256 half[2];
  };
  using Word = __m256i;

  // 2 blocks x 2 rows of sums are 8 of the 16 registers.
  static constexpr int kMaxRows = 2;
  static constexpr int kMaxChains = 1;
  // Rows of a plain weight, and tokens, whose sums are in registers at once.
  static constexpr int kPlainWeights = 2, kPlainTokens = 3;

  VLLM_EXT_INLINE __m256i load_half(const void* p, int half) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p) + half);
  }
  VLLM_EXT_INLINE void store_half(void* p, int half, __m256i a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p) + half, a);
  }

  VLLM_EXT_INLINE Codes load_codes(const uint8_t* p) { return {{load_half(p, 0), load_half(p, 1)}}; }
  VLLM_EXT_INLINE void store_codes(uint8_t* p, Codes c) {
    store_half(p, 0, c.half[0]);
    store_half(p, 1, c.half[1]);
  }
  template <int kMask>
  VLLM_EXT_INLINE Codes mask(Codes c) {
    const __m256i bits = _mm256_set1_epi8(static_cast<char>(kMask));
    return {{_mm256_and_si256(c.half[0], bits), _mm256_and_si256(c.half[1], bits)}};
  }
  template <int kBits>
  VLLM_EXT_INLINE Codes shift_right(Codes c) {
    if constexpr (kBits > 0) return {{_mm256_srli_epi16(c.half[0], kBits), _mm256_srli_epi16(c.half[1], kBits)}};
    if constexpr (kBits < 0) return {{_mm256_slli_epi16(c.half[0], -kBits), _mm256_slli_epi16(c.half[1], -kBits)}};
    return c;
  }
  template <int kMask>
  VLLM_EXT_INLINE Codes select(Codes a, Codes b) {
    const __m256i bits = _mm256_set1_epi8(static_cast<char>(kMask));
    Codes c;
    for (int i = 0; i < 2; ++i) {
      c.half[i] = _mm256_or_si256(_mm256_and_si256(bits, a.half[i]), _mm256_andnot_si256(bits, b.half[i]));
    }
    return c;
  }

  VLLM_EXT_INLINE Word repeat_word(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  VLLM_EXT_INLINE Ints zero_ints() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }

  template <int kBits>
  VLLM_EXT_INLINE __m256i dot_half(__m256i sum, __m256i c, __m256i x) {
    if constexpr (kVnni) {
#ifdef __AVXVNNI__
      return _mm256_dpbusd_avx_epi32(sum, c, x);
#endif
    }
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (kBits <= 6) {
      // Two products of at most 63 * 127 stay within the 16 bits at which vpmaddubsw saturates.
      return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(c, x), ones));
    }
    // Products of 8-bit codes do not: the two nibbles apart.
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(c, nibble), x);
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c, 4), nibble), x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
  template <int kBits>
  VLLM_EXT_INLINE Ints dot(Ints sum, Codes c, Word x) {
    return {{dot_half<kBits>(sum.half[0], c.half[0], x), dot_half<kBits>(sum.half[1], c.half[1], x)}};
  }
  VLLM_EXT_INLINE Ints add(Ints a, Ints b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
  }
  VLLM_EXT_INLINE Ints shift_left_8(Ints a) {
    return {{_mm256_slli_epi32(a.half[0], 8), _mm256_slli_epi32(a.half[1], 8)}};
  }
  VLLM_EXT_INLINE Ints load_ints(const int32_t* p) { return {{load_half(p, 0), load_half(p, 1)}}; }
  VLLM_EXT_INLINE void store_ints(int32_t* p, Ints a) {
    store_half(p, 0, a.half[0]);
    store_half(p, 1, a.half[1]);
  }
  VLLM_EXT_INLINE Floats to_floats(Ints a) { return {{_mm256_cvtepi32_ps(a.half[0]), _mm256_cvtepi32_ps(a.half[1])}}; }
  VLLM_EXT_INLINE Ints to_ints(Floats a) { return {{_mm256_cvtps_epi32(a.half[0]), _mm256_cvtps_epi32(a.half[1])}}; }
  VLLM_EXT_INLINE void store_bytes(int8_t* p, Ints a) {
    // Packing works within 128-bit lanes: put its quadwords back in order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.half[0], a.half[1]), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

#define VLLM_EXT_EACH(name, intrinsic)                                                          \
  VLLM_EXT_INLINE Floats name(Floats a, Floats b) {                                             \
    return {{intrinsic(a.half[0], b.half[0]), intrinsic(a.half[1], b.half[1])}};                \
  }
  VLLM_EXT_EACH(add, _mm256_add_ps)
  VLLM_EXT_EACH(sub, _mm256_sub_ps)
  VLLM_EXT_EACH(mul, _mm256_mul_ps)
  VLLM_EXT_EACH(div, _mm256_div_ps)
  VLLM_EXT_EACH(max, _mm256_max_ps)
  VLLM_EXT_EACH(min, _mm256_min_ps)
#undef VLLM_EXT_EACH

  VLLM_EXT_INLINE Floats zero() { return repeat(0.0f); }
  VLLM_EXT_INLINE Floats repeat(float a) { return {{_mm256_set1_ps(a), _mm256_set1_ps(a)}}; }
  VLLM_EXT_INLINE Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  VLLM_EXT_INLINE void store(float* p, Floats a) {
    _mm256_storeu_ps(p, a.half[0]);
    _mm256_storeu_ps(p + 8, a.half[1]);
  }
  VLLM_EXT_INLINE Floats abs(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {{_mm256_andnot_ps(sign, a.half[0]), _mm256_andnot_ps(sign, a.half[1])}};
  }
  VLLM_EXT_INLINE Floats round(Floats a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {{_mm256_round_ps(a.half[0], kNearest), _mm256_round_ps(a.half[1], kNearest)}};
  }
  VLLM_EXT_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
  }
  VLLM_EXT_INLINE Floats fnma(Floats a, Floats b, Floats c) {
    return {{_mm256_fnmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fnmadd_ps(a.half[1], b.half[1], c.half[1])}};
  }
  VLLM_EXT_INLINE Floats scale_by_power(Floats a, Floats n) {
    Floats result;
    for (int i = 0; i < 2; ++i) {
      const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.half[i]), _mm256_set1_epi32(127));
      result.half[i] = _mm256_mul_ps(a.half[i], _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }
    return result;
  }
  VLLM_EXT_INLINE float reduce_add(Floats a) {
    const __m256 wide = _mm256_add_ps(a.half[0], a.half[1]);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  VLLM_EXT_INLINE float reduce_max(Floats a) {
    const __m256 wide = _mm256_max_ps(a.half[0], a.half[1]);
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
  }

  VLLM_EXT_INLINE __m128i load_quarter(const void* p, int half) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p) + half);
  }
  VLLM_EXT_INLINE Floats load_fp16(const void* p) {
    return {{_mm256_cvtph_ps(load_quarter(p, 0)), _mm256_cvtph_ps(load_quarter(p, 1))}};
  }
  VLLM_EXT_INLINE Floats load_bf16(const void* p) {
    Floats a;
    for (int i = 0; i < 2; ++i) {
      a.half[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_quarter(p, i)), 16));
    }
    return a;
  }
  VLLM_EXT_INLINE void store_fp16(void* p, Floats a) {
    for (int i = 0; i < 2; ++i) {
      _mm_storeu_si128(static_cast<__m128i*>(p) + i, _mm256_cvtps_ph(a.half[i], _MM_FROUND_TO_NEAREST_INT));
    }
  }
  VLLM_EXT_INLINE void store_bf16(void* p, Floats a) {
    __m256i rounded[2];
    for (int i = 0; i < 2; ++i) {
      const __m256i bits = _mm256_castps_si256(a.half[i]);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.half[i], a.half[i], _CMP_UNORD_Q));
      rounded[i] = _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    }
    const __m256i packed = _mm256_packus_epi32(rounded[0], rounded[1]);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }

  VLLM_EXT_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace vllm_ext
