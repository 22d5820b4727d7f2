// SPDX-License-Identifier: Apache-2.0
// A weight as a row of the table describes it (kernels/arena.py), and its product with rows of activations. Shared by
// the operators; needs torch only for its errors.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "kernels.h"
#include "workspace.h"

namespace vllm_ext {

// Columns of the table: `Field` in kernels/arena.py.
enum Field { kWeightBits, kActBits, kGroupSize, kCodesOffset, kScalesOffset, kZerosOffset, kLayout, kNumFields };

enum Layout { kPlainCodes, kPlainBf16, kPlainFp16, kPlainFp32, kCpuRecord };

inline void check_record_format(int64_t bits, int64_t group_size) {
  TORCH_CHECK_VALUE(is_code_width(bits), "bits=", bits, " is not a code width; use one of 2, 3, 4, 5, 6, 8");
  TORCH_CHECK_VALUE(groups_fit(group_size), "group_size=", group_size, " does not fit records of ", kDepth,
                    ": use 32, 64, a multiple of ", kDepth, ", or -1");
}

inline void check_groups(int64_t K, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size == -1 || (group_size > 0 && K % group_size == 0), "group_size=", group_size,
                    " does not divide K=", K);
}

// Sizes that tables and arguments state may be anything: what does not fit into 64 bits is the largest number, which no
// arena has.
constexpr int64_t kTooLarge = std::numeric_limits<int64_t>::max();

inline int64_t multiply_sizes(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) return kTooLarge;
  }
  return product;
}

inline void check_section(const at::Tensor& arena, int64_t offset, int64_t size) {
  int64_t end = 0;
  if (__builtin_add_overflow(offset, size, &end)) end = kTooLarge;
  TORCH_CHECK_VALUE(offset >= 0 && size >= 0 && end <= arena.numel() && end != kTooLarge, "section [", offset, ", ", end,
                    ") lies outside the arena of ", arena.numel(),
                    " bytes: the table does not belong to this arena, or the arena is truncated");
}

// Outputs and inputs of one weight: also what fits in an int, and in sums of a few of them, twice over.
constexpr int64_t kSizeLimit = int64_t{1} << 31;

inline void check_size(const char* name, int64_t value, int64_t limit = kSizeLimit) {
  TORCH_CHECK_VALUE(value > 0 && value < limit, name, " must be positive and below ", limit, ", got ", value);
}

inline Element find_element(at::ScalarType type) {
  TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kHalf || type == at::kFloat,
                    "x must be bf16, fp16 or fp32, got ", type);
  return type == at::kBFloat16 ? Element::kBf16 : type == at::kHalf ? Element::kFp16 : Element::kFp32;
}

// A weight [N, K]; gate_up: N is gate and up one after the other, and a pair is 16 rows of each.
struct Block {
  const uint8_t* start;
  int64_t N, K;
  bool gate_up;
  bool is_records;
  int bits, headers, planes;  // of records
  int64_t act_group;          // columns with one activation scale, where they are more than a chunk; else 0
  Element element;            // of a plain weight

  int64_t chunks() const { return divide_up(K, kDepth); }
  int64_t rows() const { return gate_up ? N / 2 : N; }
  int64_t pairs() const { return divide_up(rows(), gate_up ? kRows : 2 * kRows); }
  // Where the records of a pair begin, also past the last; of a plain weight, where it begins.
  const uint8_t* find_pair(int64_t pair) const {
    return is_records ? start + 2 * pair * chunks() * record_bytes(bits, headers) : start;
  }
  // Bytes of the weight that one pair and one chunk take.
  int64_t pair_bytes() const {
    return 2 * (is_records ? record_bytes(bits, headers) : kRows * kDepth * element_bytes(element));
  }
};

// A row of the table for a weight [N, K] -> Block. Raises ValueError for what does not fit, in the words of arena.py.
inline Block read_block(const int64_t* row, const at::Tensor& arena, int64_t N, int64_t K, bool gate_up) {
  check_size("the number of outputs of a weight", N);
  check_size("the number of inputs of a weight", K);
  Block block{};
  block.N = N;
  block.K = K;
  block.gate_up = gate_up;
  block.planes = 2;
  block.headers = 1;
  const int64_t act_bits = row[kActBits], layout = row[kLayout];
  TORCH_CHECK_VALUE(act_bits == 8 || act_bits == 16, "act_bits=", act_bits, " is not one of 8, 16");
  int64_t size = 0;
  if (layout == kCpuRecord) {
    const int64_t group_size = row[kGroupSize];
    check_record_format(row[kWeightBits], group_size);
    check_groups(K, group_size);
    block.is_records = true;
    block.bits = static_cast<int>(row[kWeightBits]);
    block.headers = count_headers(group_size);
    block.planes = act_bits == 8 ? 1 : 2;
    // With two planes a scale for each chunk is within the definition: it only makes the error smaller.
    if (act_bits == 8 && (group_size == -1 || group_size > kDepth)) block.act_group = group_size == -1 ? K : group_size;
    size = multiply_sizes({gate_up ? 2 : 1, divide_up(block.rows(), kRows), block.chunks(),
                           record_bytes(block.bits, block.headers)});
  } else {
    TORCH_CHECK_VALUE(layout == kPlainBf16 || layout == kPlainFp16 || layout == kPlainFp32, "layout ", layout,
                      " has no compiled kernel; repack the weight as layout ", static_cast<int>(kCpuRecord));
    TORCH_CHECK_VALUE(act_bits == 16, "act_bits=8 needs a weight of codes; this one has layout ", layout);
    block.element = layout == kPlainBf16 ? Element::kBf16 : layout == kPlainFp16 ? Element::kFp16 : Element::kFp32;
    size = multiply_sizes({N, K, element_bytes(block.element)});
  }
  TORCH_CHECK_VALUE(row[kCodesOffset] % kLine == 0, "codes_offset=", row[kCodesOffset], " is not a multiple of ", kLine);
  check_section(arena, row[kCodesOffset], size);
  block.start = arena.const_data_ptr<uint8_t>() + row[kCodesOffset];
  return block;
}

// Whether x and a table [..., columns] are for these kernels. Looked at here, in each call, for a table may change: in
// Python it takes longer than the weights of one token. What is malformed is not for them either; Python names it.
inline bool is_for_kernels(const at::Tensor& x, const at::Tensor& table, int64_t columns) {
  if (x.scalar_type() != at::kBFloat16 && x.scalar_type() != at::kHalf) return false;
  if (table.dim() == 0 || table.size(-1) != columns || table.scalar_type() != at::kLong) return false;
  const at::Tensor fields = table.contiguous();
  const auto* row = fields.const_data_ptr<int64_t>();
  for (const auto* end = row + fields.numel(); row < end; row += columns) {
    if (row[kLayout] == kCpuRecord) return true;
  }
  return false;
}

// Activations of some tokens in the form that a block wants: integers, or float32 rows.
class BlockInput {
 public:
  static int64_t plan_bytes(const Block& block, int64_t tokens) {
    if (!block.is_records) return Scratch::part_bytes<float>(tokens * stride_of(block));
    const int64_t rows = tokens * block.planes, groups = block.chunks() * block.headers;
    return Scratch::part_bytes<int8_t>(block.chunks() * rows * kDepth + kTileSlack) +
           2 * Scratch::part_bytes<float>(groups * tokens);
  }

  void place(const Block& block, int64_t tokens, Scratch& scratch) {
    block_ = &block;
    tokens_ = tokens;
    if (!block.is_records) {
      floats_ = scratch.take<float>(tokens * stride_of(block));
      return;
    }
    const int64_t groups = block.chunks() * block.headers;
    codes_ = scratch.take<int8_t>(block.chunks() * tokens * block.planes * kDepth + kTileSlack);
    scales_ = scratch.take<float>(groups * tokens);
    sums_ = scratch.take<float>(groups * tokens);
  }

  // Columns of a row of floats that `set_row` reads: those past K must be zeros.
  static int64_t stride_of(const Block& block) { return block.chunks() * kDepth; }

  void set_row(const Kernels& kernels, int64_t token, const float* row) {
    if (!block_->is_records) {
      std::memcpy(floats_ + token * stride_of(*block_), row, static_cast<size_t>(stride_of(*block_)) * sizeof(float));
      return;
    }
    float largest = 0.0f;
    for (int64_t chunk = 0; chunk < block_->chunks(); ++chunk) {
      const int64_t k = chunk * kDepth;
      if (block_->act_group && k % block_->act_group == 0) {
        largest = kernels.find_largest(row + k, std::min(block_->act_group, block_->K - k));
      }
      set_chunk(kernels, token, chunk, row + k, block_->act_group ? &largest : nullptr);
    }
  }

  // 128 columns; `largest` only where scales span more than a chunk.
  void set_chunk(const Kernels& kernels, int64_t token, int64_t chunk, const float* values, const float* largest) {
    if (!block_->is_records) {
      std::memcpy(floats_ + token * stride_of(*block_) + chunk * kDepth, values, kDepth * sizeof(float));
      return;
    }
    const int64_t first = chunk * block_->headers * tokens_ + token;
    kernels.round_chunk(values, block_->headers, block_->planes, largest,
                        {codes_ + (chunk * tokens_ + token) * block_->planes * kDepth, scales_ + first, sums_ + first,
                         tokens_});
  }

  // out[token][32] for tokens [first, first + count): pair `pair` of a block times them. The block is the one of
  // `place`, or another that wants its activations in the same form. `next`: what is read after this pair.
  void multiply(const Kernels& kernels, const Block& block, int64_t pair, int64_t first, int64_t count,
                const uint8_t* next, float* out) const {
    // The second block of a pair may not exist; the first is computed twice then, and the copy ignored.
    const int64_t second = block.gate_up ? 2 * pair + 1 : std::min(2 * pair + 1, divide_up(block.N, kRows) - 1);
    if (block.is_records) {
      const int64_t size = block.chunks() * record_bytes(block.bits, block.headers);
      const Activations x{codes_ + first * block.planes * kDepth,
                          scales_ + first,
                          sums_ + first,
                          tokens_ * block.planes * kDepth,
                          tokens_,
                          static_cast<int>(count),
                          block.planes};
      kernels.multiply_records({{block.find_pair(pair), block.start + second * size},
                                next,
                                block.bits,
                                block.headers,
                                block.chunks(),
                                x,
                                out});
      return;
    }
    const int64_t row = block.gate_up ? pair * kRows : 2 * pair * kRows;
    const int64_t other = block.gate_up ? block.rows() + row : second * kRows;
    const int64_t row_bytes = block.K * element_bytes(block.element);
    kernels.multiply_plain({{block.start + row * row_bytes, block.start + other * row_bytes},
                            {static_cast<int>(std::min<int64_t>(kRows, block.rows() - row)),
                             static_cast<int>(std::min<int64_t>(kRows, block.N - other))},
                            block.element,
                            block.K,
                            floats_ + first * stride_of(block),
                            stride_of(block),
                            static_cast<int>(count),
                            out});
  }

 private:
  // AMX loads 16 rows, whether the last tile has so many or not.
  static constexpr int64_t kTileSlack = 16 * kDepth;

  const Block* block_ = nullptr;
  int64_t tokens_ = 0;
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  float* sums_ = nullptr;
  float* floats_ = nullptr;
};

// Tokens that are multiplied with a stretch of weights before the next ones: their integers stay in the L2 cache. A
// multiple of every tile.
static inline int64_t panel_tokens(const Block& block) { return block.is_records && block.planes == 1 ? 240 : 120; }

// Keeps the state of a thread while it works (kernels.enter and leave).
class ThreadScope {
 public:
  explicit ThreadScope(const Kernels& kernels) : kernels_(kernels), saved_(kernels.enter()) {}
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;
  ~ThreadScope() { kernels_.leave(saved_); }

 private:
  const Kernels& kernels_;
  ThreadState saved_;
};

}  // namespace vllm_ext
