// SPDX-License-Identifier: Apache-2.0
// From the lines of a record to vectors of unsigned codes, one byte each, for any width.
#pragma once

#include "record.h"

namespace vllm_ext {

struct Pieces {
  Piece piece[3];
  int count;
};

static constexpr Pieces find_pieces(int bits, int v) {
  Pieces found{};
  found.count = list_pieces(bits, 0, v, found.piece);
  return found;
}

// Lines of codes from unit 0 to unit `unit` for a line of unit 0.
static constexpr int line_in_unit(int bits, int line, int unit) {
  if (bits != 5) return line + bits * unit;
  return line < 16 ? line + 4 * unit : line + unit;
}

// Piece kIndex of vector kVector, its bits at their place in the code, other bits undefined.
template <class V, int kBits, int kVector, int kIndex>
static inline __attribute__((always_inline)) typename V::Codes load_piece(const uint8_t* codes, int unit) {
  constexpr Piece piece = find_pieces(kBits, kVector).piece[kIndex];
  const auto line = V::load_codes(codes + kLine * line_in_unit(kBits, piece.line, unit));
  return V::template shift_right<piece.line_bit - piece.code_bit>(line);
}

// Vector kVector (0..7) of a unit, given the record's first line of codes.
template <class V, int kBits, int kVector>
static inline __attribute__((always_inline)) typename V::Codes unpack_vector(const uint8_t* codes, int unit) {
  constexpr Pieces pieces = find_pieces(kBits, kVector);
  constexpr auto mask_of = [](const Piece& piece) { return ((1 << piece.width) - 1) << piece.code_bit; };
  auto vector = load_piece<V, kBits, kVector, 0>(codes, unit);
  if constexpr (pieces.count == 2) {
    const auto second = load_piece<V, kBits, kVector, 1>(codes, unit);
    vector = V::template select<mask_of(pieces.piece[0])>(vector, second);
  } else if constexpr (pieces.count == 3) {
    const auto second = load_piece<V, kBits, kVector, 1>(codes, unit);
    const auto third = load_piece<V, kBits, kVector, 2>(codes, unit);
    const auto rest = V::template select<mask_of(pieces.piece[1])>(second, third);
    vector = V::template select<mask_of(pieces.piece[0])>(vector, rest);
  }
  if constexpr (kBits < 8) return V::template mask<(1 << kBits) - 1>(vector);
  return vector;
}

}  // namespace vllm_ext
