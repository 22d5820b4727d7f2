// SPDX-License-Identifier: Apache-2.0
// Layout CPU_RECORD: how the kernels want their weights. ../layout.py is the same in torch, and explains more.
//
//     record = 16 rows (outputs) x 128 columns (k), whole 64-byte lines
//
//     header lines   16 fp16 scales | 16 fp16 zero points     w[n, k] = scale[n] * (code[n, k] - zero[n])
//                    1 line; groups of 64 columns: 2 lines; of 32: 4 lines
//     4 * bits lines of codes
//
// The 128 columns are 32 vectors of 4: vector v holds k = 4v .. 4v+3 of all 16 rows, row n in bytes 4n .. 4n+3. Eight
// vectors are a unit (32 columns): a unit is the smallest part with the same code at every width, and the smallest
// group. Bits 7..0 of the bytes of the lines of unit U, vectors v0 .. v7:
//
//     2 bits   2U    v3 | v2 | v1 | v0              2U+1   v7 | v6 | v5 | v4
//     3 bits   3U    v6 low two | v1 | v0           3U+1   v7 low two | v3 | v2
//              3U+2  v7 high one, v6 high one | v5 | v4
//     4 bits   4U+i  v2i+1 | v2i
//     5 bits   4U+i  low four of v2i+1 | v2i        16+U   bit i: the high one of vi
//     6 bits   6U+i, i = 0 1 2      two bits of v3 (5-4, 3-2, 1-0) | vi
//              6U+3+i               two bits of v7                 | v4+i
//     8 bits   8U+i  vi
//
// Order of the records: for each 16 rows, all along K; a gate_up weight: 16 rows of gate, then the same 16 of up.
#pragma once

#include <cstdint>

namespace vllm_ext {

constexpr int kRows = 16;
constexpr int kDepth = 128;
constexpr int kLine = 64;
constexpr int kUnits = 4;
constexpr int kUnitDepth = 32;
constexpr int kUnitVectors = 8;

static constexpr bool is_code_width(int64_t bits) { return (bits >= 2 && bits <= 6) || bits == 8; }

// Whether a record's columns are whole groups, or part of one.
static constexpr bool groups_fit(int64_t group_size) {
  return group_size == -1 || group_size == 32 || group_size == 64 || (group_size > 0 && group_size % kDepth == 0);
}

static constexpr int count_headers(int64_t group_size) {
  return group_size == 32 ? 4 : group_size == 64 ? 2 : 1;
}

static constexpr int64_t record_bytes(int64_t bits, int headers) { return kLine * (headers + 4 * bits); }

static constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Some bits of the codes of one vector of a unit: `width` bits from `code_bit` on, in a line from `line_bit` on.
struct Piece {
  int line;
  int line_bit;
  int code_bit;
  int width;
};

// The drawing above as a table: pieces of vector v (0..7) of unit `unit`. Returns how many there are, at most 3.
static constexpr int list_pieces(int bits, int unit, int v, Piece pieces[3]) {
  switch (bits) {
    case 3:
      if (v < 6) {
        pieces[0] = {3 * unit + v / 2, 3 * (v % 2), 0, 3};
        return 1;
      }
      pieces[0] = {3 * unit + v - 6, 6, 0, 2};
      pieces[1] = {3 * unit + 2, v, 2, 1};
      return 2;
    case 5:
      pieces[0] = {4 * unit + v / 2, 4 * (v % 2), 0, 4};
      pieces[1] = {16 + unit, v, 4, 1};
      return 2;
    case 6:
      if (v % 4 < 3) {
        pieces[0] = {6 * unit + 3 * (v / 4) + v % 4, 0, 0, 6};
        return 1;
      }
      for (int i = 0; i < 3; ++i) pieces[i] = {6 * unit + 3 * (v / 4) + i, 6, 4 - 2 * i, 2};
      return 3;
    default:
      pieces[0] = {bits * unit + v * bits / 8, v * bits % 8, 0, bits};
      return 1;
  }
}

// The code of row n, column k of a record, given its first line of codes.
static inline int read_code(const uint8_t* codes, int bits, int n, int k) {
  Piece pieces[3] = {};
  const int count = list_pieces(bits, k / kUnitDepth, k / 4 % kUnitVectors, pieces);
  int code = 0;
  for (int i = 0; i < count; ++i) {
    const int byte = codes[pieces[i].line * kLine + 4 * n + k % 4];
    code |= (byte >> pieces[i].line_bit & ((1 << pieces[i].width) - 1)) << pieces[i].code_bit;
  }
  return code;
}

// Set the code of row n, column k; its bits must be 0 before.
static inline void write_code(uint8_t* codes, int bits, int n, int k, int code) {
  Piece pieces[3] = {};
  const int count = list_pieces(bits, k / kUnitDepth, k / 4 % kUnitVectors, pieces);
  for (int i = 0; i < count; ++i) {
    const int part = code >> pieces[i].code_bit & ((1 << pieces[i].width) - 1);
    codes[pieces[i].line * kLine + 4 * n + k % 4] |= static_cast<uint8_t>(part << pieces[i].line_bit);
  }
}

}  // namespace vllm_ext
