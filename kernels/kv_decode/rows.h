// SPDX-License-Identifier: Apache-2.0
// From rows of packed codes to the vectors that the products take, one code to a byte. All query rows that share a kv
// head use what is unpacked once.
#pragma once

#include "kv_kernels.h"
#if defined(__AVX512BW__)
#include "vector_avx512.h"
#endif

namespace vllm_ext {

// Bytes `start` .. `start` + 15 of 16 rows to four vectors: dword n of vector i is dword i of row n.
template <class V>
struct RowLoader {
  static inline void load_keys(const uint8_t* const* rows, int start, typename V::Codes out[4]) {
    for (int i = 0; i < 4; ++i) {
      uint8_t bytes[kVectorBytes];
      for (int n = 0; n < kLanes; ++n) __builtin_memcpy(bytes + 4 * n, rows[n] + start + 4 * i, 4);
      out[i] = V::load_codes(bytes);
    }
  }
  // Bytes `start` .. `start` + 15 of 4 rows: byte 4 n + j is byte n of row j.
  static inline typename V::Codes load_values(const uint8_t* const* rows, int start) {
    uint8_t bytes[kVectorBytes];
    for (int n = 0; n < kChunkBytes; ++n) {
      for (int j = 0; j < 4; ++j) bytes[4 * n + j] = rows[j][start + n];
    }
    return V::load_codes(bytes);
  }
  // Five ternary digits of every byte, the first with weight 1, to vectors `stride` bytes apart.
  static inline void store_digits(typename V::Codes codes, uint8_t* out, int64_t stride) {
    uint8_t bytes[kVectorBytes];
    V::store_codes(bytes, codes);
    for (int i = 0; i < kVectorBytes; ++i) {
      unsigned rest = bytes[i];
      for (int field = 0; field < 5; ++field, rest /= 3) out[field * stride + i] = static_cast<uint8_t>(rest % 3);
    }
  }
};

#if defined(__AVX512BW__)

template <>
struct RowLoader<Avx512> {
  static __m512i join(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    const auto load = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    __m512i joined = _mm512_castsi128_si512(load(a));
    joined = _mm512_inserti32x4(joined, load(b), 1);
    joined = _mm512_inserti32x4(joined, load(c), 2);
    return _mm512_inserti32x4(joined, load(d), 3);
  }
  VLLM_EXT_INLINE void load_keys(const uint8_t* const* rows, int start, __m512i out[4]) {
    __m512i part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      part[i] = join(rows[i] + start, rows[i + 4] + start, rows[i + 8] + start, rows[i + 12] + start);
    }
    const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]), b = _mm512_unpacklo_epi32(part[2], part[3]);
    const __m512i c = _mm512_unpackhi_epi32(part[0], part[1]), d = _mm512_unpackhi_epi32(part[2], part[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
  }
  VLLM_EXT_INLINE __m512i load_values(const uint8_t* const* rows, int start) {
    const __m512i joined = join(rows[0] + start, rows[1] + start, rows[2] + start, rows[3] + start);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i transposed =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, joined), transposed);
  }
  // A byte as a fraction of 243 in 16 bits, rounded up: times 3, the carry is the digit of greatest weight.
  VLLM_EXT_INLINE void store_digits(__m512i codes, uint8_t* out, int64_t stride) {
    const __m512i one = _mm512_set1_epi16(270), three = _mm512_set1_epi16(3);
    __m512i even = _mm512_mullo_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(255)), one);
    __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(codes, 8), one);
#pragma GCC unroll 5
    for (int field = 4; field >= 0; --field) {
      const __m512i high = _mm512_slli_epi16(_mm512_mulhi_epu16(odd, three), 8);
      _mm512_storeu_si512(out + field * stride, _mm512_or_si512(high, _mm512_mulhi_epu16(even, three)));
      even = _mm512_mullo_epi16(even, three);
      odd = _mm512_mullo_epi16(odd, three);
    }
  }
};

#endif

// All fields of a vector of packed bytes, to vectors `stride` bytes apart.
template <class V, int kFields>
static inline __attribute__((always_inline)) void store_fields(typename V::Codes codes, uint8_t* out, int64_t stride) {
  if constexpr (kFields == 5) {
    RowLoader<V>::store_digits(codes, out, stride);
  } else if constexpr (kFields == 4) {
    V::store_codes(out, V::template mask<3>(codes));
    V::store_codes(out + stride, V::template mask<3>(V::template shift_right<2>(codes)));
    V::store_codes(out + 2 * stride, V::template mask<3>(V::template shift_right<4>(codes)));
    V::store_codes(out + 3 * stride, V::template mask<3>(V::template shift_right<6>(codes)));
  } else if constexpr (kFields == 2) {
    V::store_codes(out, V::template mask<15>(codes));
    V::store_codes(out + stride, V::template mask<15>(V::template shift_right<4>(codes)));
  } else {
    V::store_codes(out, codes);
  }
}

// The lines of `count` rows that begin with a chunk.
template <class V>
static inline __attribute__((always_inline)) void prefetch_rows(const uint8_t* const* rows, int count, int chunk) {
  if (chunk % 4) return;
  for (int i = 0; i < count; ++i) V::prefetch(rows[i] + chunk * kChunkBytes);
}

template <class V, int kFields>
static void unpack_key_rows(const uint8_t* const* rows, const RowFormat& format, int blocks,
                            const uint8_t* const* next, uint8_t* out) {
  const int chunks = count_chunks(format);
  for (int block = 0; block < blocks; ++block, rows += kLanes, next += kLanes) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      prefetch_rows<V>(next, kLanes, chunk);
      typename V::Codes words[4];
      RowLoader<V>::load_keys(rows, find_chunk(format, chunk), words);
      for (int i = 0; i < 4; ++i, out += kFields * kVectorBytes) store_fields<V, kFields>(words[i], out, kVectorBytes);
    }
  }
}

template <class V, int kFields>
static void unpack_value_rows(const uint8_t* const* rows, const RowFormat& format, int quads,
                              const uint8_t* const* next, uint8_t* out) {
  constexpr int64_t kBlock = kTileTokens / 4 * kVectorBytes;
  const int chunks = count_chunks(format);
  for (int quad = 0; quad < quads; ++quad, rows += 4, next += 4, out += kVectorBytes) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      prefetch_rows<V>(next, 4, chunk);
      const auto codes = RowLoader<V>::load_values(rows, find_chunk(format, chunk));
      store_fields<V, kFields>(codes, out + chunk * kFields * kBlock, kBlock);
    }
  }
}

template <class V>
static void unpack_keys(const uint8_t* const* rows, const RowFormat& format, int blocks, const uint8_t* const* next,
                        uint8_t* out) {
  switch (format.fields) {
    case 5: return unpack_key_rows<V, 5>(rows, format, blocks, next, out);
    case 4: return unpack_key_rows<V, 4>(rows, format, blocks, next, out);
    case 2: return unpack_key_rows<V, 2>(rows, format, blocks, next, out);
    default: return unpack_key_rows<V, 1>(rows, format, blocks, next, out);
  }
}

template <class V>
static void unpack_values(const uint8_t* const* rows, const RowFormat& format, int quads, const uint8_t* const* next,
                          uint8_t* out) {
  switch (format.fields) {
    case 5: return unpack_value_rows<V, 5>(rows, format, quads, next, out);
    case 4: return unpack_value_rows<V, 4>(rows, format, quads, next, out);
    case 2: return unpack_value_rows<V, 2>(rows, format, quads, next, out);
    default: return unpack_value_rows<V, 1>(rows, format, quads, next, out);
  }
}

}  // namespace vllm_ext
