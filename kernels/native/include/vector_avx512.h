// SPDX-License-Identifier: Apache-2.0
// The operations of the kernels on AVX-512 with VNNI: one register is one line of codes, 16 integers or 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the deliberately undefined operands in its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define VLLM_EXT_INLINE static inline __attribute__((always_inline))

namespace vllm_ext {

struct Avx512 {
  using Codes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  using Word = __m512i;

  // 2 blocks x 6 rows of sums are 12 of the 32 registers. Two tiles of 6 take less time than one of 12: of its sums,
  // some end up in memory, and unpacking twice costs little beside the dot products.
  static constexpr int kMaxRows = 6;
  static constexpr int kMaxChains = 4;
  // Rows of a plain weight, and tokens, whose sums are in registers at once.
  static constexpr int kPlainWeights = 4, kPlainTokens = 6;

  VLLM_EXT_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  VLLM_EXT_INLINE void store_codes(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
  template <int kMask>
  VLLM_EXT_INLINE Codes mask(Codes c) {
    return _mm512_and_si512(c, _mm512_set1_epi8(static_cast<char>(kMask)));
  }
  // Shifts cross from one byte into the next: what follows must mask.
  template <int kBits>
  VLLM_EXT_INLINE Codes shift_right(Codes c) {
    if constexpr (kBits > 0) return _mm512_srli_epi16(c, kBits);
    if constexpr (kBits < 0) return _mm512_slli_epi16(c, -kBits);
    return c;
  }
  // Bits of a where the mask is 1, of b where it is 0.
  template <int kMask>
  VLLM_EXT_INLINE Codes select(Codes a, Codes b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(kMask)), a, b, 0xCA);
  }

  VLLM_EXT_INLINE Word repeat_word(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  VLLM_EXT_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
  template <int kBits>
  VLLM_EXT_INLINE Ints dot(Ints sum, Codes c, Word x) {
    return _mm512_dpbusd_epi32(sum, c, x);
  }
  VLLM_EXT_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  VLLM_EXT_INLINE Ints shift_left_8(Ints a) { return _mm512_slli_epi32(a, 8); }
  VLLM_EXT_INLINE Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  VLLM_EXT_INLINE void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
  VLLM_EXT_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  VLLM_EXT_INLINE Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
  // The low byte of each integer, saturated.
  VLLM_EXT_INLINE void store_bytes(int8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
  }

  VLLM_EXT_INLINE Floats zero() { return _mm512_setzero_ps(); }
  VLLM_EXT_INLINE Floats repeat(float a) { return _mm512_set1_ps(a); }
  VLLM_EXT_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
  VLLM_EXT_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  VLLM_EXT_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  VLLM_EXT_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  VLLM_EXT_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  VLLM_EXT_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  VLLM_EXT_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  VLLM_EXT_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  VLLM_EXT_INLINE Floats abs(Floats a) { return _mm512_abs_ps(a); }
  VLLM_EXT_INLINE Floats round(Floats a) { return _mm512_roundscale_ps(a, 0); }
  VLLM_EXT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  VLLM_EXT_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  // a * 2^n for an integral n.
  VLLM_EXT_INLINE Floats scale_by_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
  VLLM_EXT_INLINE float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }
  VLLM_EXT_INLINE float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }

  VLLM_EXT_INLINE Floats load_fp16(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  VLLM_EXT_INLINE Floats load_bf16(const void* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  VLLM_EXT_INLINE void store_fp16(void* p, Floats a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  VLLM_EXT_INLINE void store_bf16(void* p, Floats a) {
    // Not vcvtneps2bf16, which flushes denormals and is missing on the first CPUs with VNNI.
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }

  VLLM_EXT_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace vllm_ext
