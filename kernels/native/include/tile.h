// SPDX-License-Identifier: Apache-2.0
// Records times int8 activations. Sums stay in registers for a group of columns; then
//
//     out += scale * x_scale * (dot(codes, x) - zero * sum(x))
//
// dot and sum are integers: with one plane exact in float32, with two of up to 31 bits and rounded to 24.
// A tile is 2 blocks times up to V::kMaxRows rows of integers. Codes are unpacked again for each tile: that takes
// units that the dot products leave idle, where a buffer of unpacked codes would take loads, which they need.
#pragma once

#include <utility>

#include "kernels.h"
#include "unpack.h"

namespace vllm_ext {

// Independent sums of one output, so that few rows do not wait for the latency of a dot product.
template <class V, int kNumRows>
constexpr int kChains = kNumRows > 4 || V::kMaxChains == 1 ? 1 : kNumRows == 1 ? V::kMaxChains : 2;

template <class V, int kBits, int kNumRows>
struct Sums {
  typename V::Ints sum[2][kNumRows][kChains<V, kNumRows>];
};

// Vector kVector of a unit in both blocks, times all rows.
template <class V, int kBits, int kNumRows, int kVector>
static inline __attribute__((always_inline)) void dot_vector(const uint8_t* const codes[2], int unit, const int8_t* x,
                                                             Sums<V, kBits, kNumRows>& sums) {
  constexpr int chain = kVector % kChains<V, kNumRows>;
  const auto first = unpack_vector<V, kBits, kVector>(codes[0], unit);
  const auto second = unpack_vector<V, kBits, kVector>(codes[1], unit);
#pragma GCC unroll 12
  for (int row = 0; row < kNumRows; ++row) {
    const auto word = V::repeat_word(x + row * kDepth + 4 * kVector);
    sums.sum[0][row][chain] = V::template dot<kBits>(sums.sum[0][row][chain], first, word);
    sums.sum[1][row][chain] = V::template dot<kBits>(sums.sum[1][row][chain], second, word);
  }
}

template <class V, int kBits, int kNumRows, int... kVectors>
static inline __attribute__((always_inline)) void dot_unit(std::integer_sequence<int, kVectors...>,
                                                           const uint8_t* const codes[2], int unit, const int8_t* x,
                                                           Sums<V, kBits, kNumRows>& sums) {
  (dot_vector<V, kBits, kNumRows, kVectors>(codes, unit, x, sums), ...);
}

// kTokens tokens from `token` on; meanwhile the pair at `next` is loaded. All of it, header lines too: a line that is
// waited for costs as much as the work on ten.
template <class V, int kBits, int kPlanes, int kTokens>
static void multiply_tile(const RecordPair& pair, int token, const uint8_t* next) {
  constexpr int kNumRows = kTokens * kPlanes;
  constexpr int kLines = 4 * kBits;
  const int headers = pair.headers, units = kUnits / headers;
  const int64_t step = record_bytes(kBits, headers);
  const int64_t size = pair.chunks * step;
  const uint8_t* record[2] = {pair.block[0], pair.block[1]};
  const int8_t* x = pair.x.codes + static_cast<int64_t>(token) * kPlanes * kDepth;
  const float* scales = pair.x.scales + token;
  const float* x_sums = pair.x.sums + token;
  float* out = pair.out + static_cast<int64_t>(token) * 2 * kRows;
  for (int i = 0; i < 2 * kTokens; ++i) V::store(out + i * kRows, V::zero());
  for (int64_t chunk = 0; chunk < pair.chunks; ++chunk) {
    const uint8_t* const codes[2] = {record[0] + kLine * headers, record[1] + kLine * headers};
    for (int line = 0; line < headers; ++line, next += kLine) {
      V::prefetch(next);
      V::prefetch(next + size);
    }
    for (int group = 0; group < headers; ++group) {
      Sums<V, kBits, kNumRows> sums;
      for (auto& block : sums.sum) {
        for (auto& row : block) {
          for (auto& chain : row) chain = V::zero_ints();
        }
      }
      for (int unit = group * units; unit < (group + 1) * units; ++unit) {
#pragma GCC unroll 8
        for (int line = 0; line < kLines / kUnits; ++line, next += kLine) {
          V::prefetch(next);
          V::prefetch(next + size);
        }
        dot_unit<V, kBits, kNumRows>(std::make_integer_sequence<int, kUnitVectors>(), codes, unit, x + kUnitDepth * unit,
                                     sums);
      }
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block) {
        const uint8_t* header = record[block] + kLine * group;
        const auto scale = V::load_fp16(header), zero = V::load_fp16(header + kLine / 2);
#pragma GCC unroll 12
        for (int i = 0; i < kTokens; ++i) {
          auto dot = sums.sum[block][i * kPlanes][0];
          for (int chain = 1; chain < kChains<V, kNumRows>; ++chain) {
            dot = V::add(dot, sums.sum[block][i * kPlanes][chain]);
          }
          if constexpr (kPlanes == 2) {
            // At most 256 * 128 * 255 * 127 + the low plane: within 31 bits.
            dot = V::shift_left_8(dot);
            for (int chain = 0; chain < kChains<V, kNumRows>; ++chain) {
              dot = V::add(dot, sums.sum[block][i * kPlanes + kPlanes - 1][chain]);
            }
          }
          const auto centred = V::fnma(zero, V::repeat(x_sums[i]), V::to_floats(dot));
          float* sum = out + (2 * i + block) * kRows;
          V::store(sum, V::fma(V::mul(centred, scale), V::repeat(scales[i]), V::load(sum)));
        }
      }
      scales += pair.x.scale_stride;
      x_sums += pair.x.scale_stride;
    }
    record[0] += step;
    record[1] += step;
    x += pair.x.chunk_stride;
  }
}

using TileFunction = void (*)(const RecordPair&, int, const uint8_t*);

template <class V, int kBits, int kPlanes, int... kCounts>
static void multiply_tiles(const RecordPair& pair, std::integer_sequence<int, kCounts...>) {
  static constexpr TileFunction functions[] = {multiply_tile<V, kBits, kPlanes, kCounts + 1>...};
  constexpr int most = sizeof...(kCounts);
  const int tokens = pair.x.tokens;
  int tiles = (tokens + most - 1) / most;
  // Tiles of nearly the same size: a last one of a token or two would unpack as much as a full one.
  const uint8_t* next = pair.next;
  for (int token = 0; tiles > 0; --tiles) {
    const int count = (tokens - token + tiles - 1) / tiles;
    functions[count - 1](pair, token, next);
    token += count;
    // The next pair is in the cache now: what the following tiles load is what they read.
    next = pair.block[0];
  }
}

template <class V, int kBits>
static void multiply_width(const RecordPair& pair) {
  if (pair.x.planes == 1) {
    multiply_tiles<V, kBits, 1>(pair, std::make_integer_sequence<int, V::kMaxRows>());
  } else {
    multiply_tiles<V, kBits, 2>(pair, std::make_integer_sequence<int, V::kMaxRows / 2>());
  }
}

template <class V>
static void multiply_records(const RecordPair& pair) {
  switch (pair.bits) {
    case 2: return multiply_width<V, 2>(pair);
    case 3: return multiply_width<V, 3>(pair);
    case 4: return multiply_width<V, 4>(pair);
    case 5: return multiply_width<V, 5>(pair);
    case 6: return multiply_width<V, 6>(pair);
    default: return multiply_width<V, 8>(pair);
  }
}

}  // namespace vllm_ext
