// SPDX-License-Identifier: Apache-2.0
// What an instruction set offers to the quantized KV cache: a table of functions, a part of `Kernels`.
//
// Words: a tile is up to 128 tokens of one kv head. A row is the codes of one token, as its page holds them; a chunk is
// 16 bytes of it, a field a code's place in its byte. A query row is one query head at one position.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_ext {

constexpr int kTileTokens = 128;
constexpr int kLanes = 16;
constexpr int kChunkBytes = 16;
constexpr int kVectorBytes = 64;
// The score of a key that a query does not see. Finite, so that 0 times it is 0: NaN then comes from damage alone.
constexpr float kUnseen = -1e30f;
// Int8 planes of a query, and of the weights of values. One is not enough for a query: with a few large channels in a
// group, its rounding moves scores by several percent.
constexpr int kPlanes = 2;

// Codes of a row: `fields` to a byte (5: ternary, 4, 2 or 1), the first in the low bits. A row has at least one chunk.
// Where its bytes do not divide into chunks, the last one ends with the row and begins inside the one before, so that
// no load leaves the row.
struct RowFormat {
  int fields;
  int row_bytes;
};

// Static: a function that several units share would be linked once, with the instructions of any of them.
static constexpr int count_chunks(const RowFormat& format) {
  return (format.row_bytes + kChunkBytes - 1) / kChunkBytes;
}
static constexpr int find_chunk(const RowFormat& format, int chunk) {
  const int start = chunk * kChunkBytes;
  return start + kChunkBytes <= format.row_bytes ? start : format.row_bytes - kChunkBytes;
}
// Of 64 codes each: of 16 tokens of K, and of 4 tokens of V.
static constexpr int count_key_vectors(const RowFormat& format) { return count_chunks(format) * 4 * format.fields; }
static constexpr int count_value_blocks(const RowFormat& format) { return count_chunks(format) * format.fields; }

// Integer products: out[row * out_stride + 16 * block + n] = sum over v and j of x[row][4 v + j] * codes[block][v], byte
// 4 n + j.
struct CodeProduct {
  const int8_t* x;
  int64_t x_stride;
  int rows;
  const uint8_t* codes;
  int64_t block_stride;
  int blocks;
  int vectors;
  int bits;  // of the widest code
  int32_t* out;
  int64_t out_stride;
};

// One query row, times one group of channels of a tile: the integers, what they stand for, and what they are added to.
//     score = (is_first ? offset : score) + scale * factor * (256 * high + low) + low_end * sum
struct ScoreTerm {
  const int32_t *high, *low;
  const float *scales, *lows;
  float factor, sum, offset;
  bool is_first;
  int tokens;  // a multiple of 16
  float* scores;
};

struct KvKernels {
  // Rows of 16 * blocks tokens to out[block][vector]: dword n of vector (4 chunk + i) * fields + field holds that field
  // of bytes 4 i .. 4 i + 3 of token n. Meanwhile the rows of `next`, as many, are loaded.
  void (*unpack_keys)(const uint8_t* const* rows, const RowFormat& format, int blocks, const uint8_t* const* next,
                      uint8_t* out);
  // Rows of 4 * quads tokens to out[block][32 vectors]: dword n of vector q of block chunk * fields + field holds that
  // field of byte n, of tokens 4 q .. 4 q + 3.
  void (*unpack_values)(const uint8_t* const* rows, const RowFormat& format, int quads, const uint8_t* const* next,
                        uint8_t* out);
  void (*multiply_codes)(const CodeProduct& product);

  // fp8 e4m3 or fp16 to float32.
  void (*load_scales)(const uint8_t* from, int64_t count, bool is_fp8, float* out);
  // n floats, a multiple of 16, to two planes of int8: x is about scale * (256 * high + low). Returns the scale, NaN
  // where one of x is not finite.
  float (*round_row)(const float* x, int64_t n, int8_t* high, int8_t* low);
  void (*add_scores)(const ScoreTerm& term);
  // n scores, a multiple of 16, to exp(score - *most), where *most first becomes the largest so far. Returns their sum.
  float (*exponentiate)(float* scores, int64_t n, float* most);
  // out = weights * scales; returns sum(weights * lows). n: a multiple of 16.
  float (*weigh)(const float* weights, const float* scales, const float* lows, int64_t n, float* out);
  // sums = keep * sums + scale * (256 * high + low). n: a multiple of 16.
  void (*add_products)(const int32_t* high, const int32_t* low, int64_t n, float scale, float keep, float* sums);

  // scores[row * 128 + token] = scale * query[row] . keys[token], rows of D floats, a multiple of 16.
  void (*dot_floats)(const float* query, int rows, const float* keys, int tokens, int64_t D, float scale, float* scores);
  // sums[row] = keep[row] * sums[row] + sum over tokens of weights[row * 128 + token] * values[token].
  void (*add_floats)(const float* weights, int rows, const float* values, int tokens, int64_t D, const float* keep,
                     float* sums);

  // Least and greatest of n floats, a multiple of 8; both NaN where one is not finite.
  void (*find_range)(const float* x, int64_t n, float* least, float* greatest);
  // Codes 0 .. top of n floats: the nearest of low + scale * code. Returns the squared error.
  float (*code_group)(const float* x, int64_t n, float low, float scale, int top, uint8_t* codes);
};

}  // namespace vllm_ext
