// SPDX-License-Identifier: Apache-2.0
// What an instruction set offers: a table of functions. One isa_<name>.cpp fills each; dispatch.cpp chooses one.
//
// Words: a row is a token (of an expert's tokens). A chunk is 128 columns of K. A block is 16 rows of the weight.
// Activations of 16 bits are two int8 planes: x is about scale * (high + low / 256). This costs a second integer dot
// product and no second pass over the weights, and its error is far below the rounding of the output.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_decode/kv_kernels.h"
#include "record.h"

namespace vllm_ext {

enum class Element : int { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

// Static: a function that several units share would be linked once, with the instructions of any of them.
static constexpr int64_t element_bytes(Element element) { return element == Element::kFp32 ? 4 : 2; }

// Int8 activations, ordered so that the kernels walk through memory:
//     codes   [chunk][token][plane][128]     each chunk `chunk_stride` bytes after the one before
//     scales  [chunk * headers + group][token], floats, `scale_stride` apart; sums likewise
// A sum is that of a group's integers (256 * high + low with two planes), which the zero point multiplies.
struct Activations {
  const int8_t* codes;
  const float* scales;
  const float* sums;
  int64_t chunk_stride;
  int64_t scale_stride;
  int tokens;
  int planes;
};

// Two blocks of records times the activations: out[token][32], 16 outputs of each block. `next` is what this thread is
// likely to read after them, as many bytes in one piece; it is loaded meanwhile. Any address will do.
struct RecordPair {
  const uint8_t* block[2];
  const uint8_t* next;
  int bits;
  int headers;
  int64_t chunks;
  Activations x;
  float* out;
};

// The same for a weight that is stored as it is: rows of `depth` elements; x float32 [token][stride].
struct PlainPair {
  const void* block[2];
  int rows[2];
  Element element;
  int64_t depth;
  const float* x;
  int64_t stride;
  int tokens;
  float* out;
};

// Where the integers of one token's chunk go.
struct ChunkTarget {
  int8_t* codes;  // planes one after the other
  float* scales;  // of the chunk's first group; the next groups are `stride` apart
  float* sums;
  int64_t stride;
};

// What `enter` saved of the thread's state.
struct ThreadState {
  unsigned control;
};

// Instruction sets that a table needs, beside those of the compiler's baseline.
enum Need : unsigned {
  kNeedAvx2 = 1,
  kNeedAvxVnni = 2,
  kNeedAvx512Vnni = 4,
  kNeedAmxInt8 = 8,
};

struct Kernels {
  const char* name;
  unsigned needs;

  // Around the work of a thread: flush denormals to zero (one costs as much as 100 normal products), tiles on.
  ThreadState (*enter)();
  void (*leave)(ThreadState);

  void (*multiply_records)(const RecordPair&);
  void (*multiply_plain)(const PlainPair&);

  // n elements to float32, times `factor`; and back, rounded to nearest.
  void (*load_row)(const void* x, Element element, int64_t n, float factor, float* out);
  void (*store_row)(const float* x, int64_t n, Element element, void* out);

  // Largest magnitude of n floats; NaN where one is not finite.
  float (*find_largest)(const float* x, int64_t n);
  // n floats to int8 by the given largest magnitude (`find_largest`). Returns the scale: largest / 127.
  float (*round_group)(const float* x, int64_t n, float largest, int8_t* codes);
  // 128 floats to integers, in `headers` groups, each by its own largest magnitude where `largest` is null, else by
  // that.
  void (*round_chunk)(const float* x, int headers, int planes, const float* largest, const ChunkTarget& target);

  // hidden[token * stride + 0..15] = silu(gate) * up, of pairs[token] = 16 gates | 16 ups.
  void (*apply_swiglu)(const float* pairs, int tokens, float* hidden, int64_t stride);
  // out[rows[token] * stride + 0..31] += weights[token] * pairs[token].
  void (*add_weighted)(const float* pairs, const float* weights, const int32_t* rows, int tokens, float* out,
                       int64_t stride);

  KvKernels kv;
};

extern const Kernels kScalarKernels;
#ifdef VLLM_EXT_ISA_AVX2
extern const Kernels kAvx2Kernels;
#endif
#ifdef VLLM_EXT_ISA_AVXVNNI
extern const Kernels kAvxVnniKernels;
#endif
#ifdef VLLM_EXT_ISA_AVX512VNNI
extern const Kernels kAvx512VnniKernels;
#endif
#ifdef VLLM_EXT_ISA_AMX
extern const Kernels kAmxKernels;
#endif

}  // namespace vllm_ext
