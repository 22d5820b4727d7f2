// SPDX-License-Identifier: Apache-2.0
// From numbers to what a page holds of them: scale, low and codes of a group, and the bytes of a row of codes.
#pragma once

#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

#include <cstring>
#include <limits>

#include "cells.h"

namespace vllm_ext {

// A number as the cache stores it, its bits and its value.
struct Stored {
  uint16_t bits;
  float value;
};

// The nearest that can be stored; beyond the largest that one, where a conversion gives NaN.
inline Stored round_to_stored(float value, bool is_fp8) {
  if (is_fp8) {
    const c10::Float8_e4m3fn rounded(value > 448.0f ? 448.0f : value < -448.0f ? -448.0f : value);
    return {rounded.x, static_cast<float>(rounded)};
  }
  const c10::Half rounded(value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value);
  return {rounded.x, static_cast<float>(rounded)};
}

struct GroupCode {
  Stored scale, low;
  float error;
};

// Codes of one group, for levels that span a share `clip` of its range.
inline GroupCode code_clipped(const KvKernels& kv, const Side& side, const float* x, float least, float greatest,
                              float clip, uint8_t* codes) {
  // Volatile: a compiler may join its product with the differences below, which rounds once where the reference does
  // twice.
  volatile float half = (greatest - least) / 2 * clip;
  const float middle = (greatest + least) / 2, top = static_cast<float>(side.top);
  // The smallest positive number there is: a step of 0 has no codes.
  const float smallest = side.is_fp8 ? 0x1p-9f : 0x1p-24f;
  GroupCode code;
  code.low = round_to_stored(middle - half, side.is_low_fp8);
  code.scale = round_to_stored(std::max((middle + half - code.low.value) / top, smallest), side.is_fp8);
  if (code.scale.value != code.scale.value || code.low.value != code.low.value) {
    std::memset(codes, 0, static_cast<size_t>(side.group_size));
    code.error = std::numeric_limits<float>::quiet_NaN();
    return code;
  }
  code.error = kv.code_group(x, side.group_size, code.low.value, code.scale.value, side.top, codes);
  return code;
}

// Shares of a group's range that are tried: `fixed` alone where a layer has one for this group.
struct Clips {
  const double* shares;
  size_t count;
};

// Codes of one group by the share that loses least, the first of equal ones. tried: room for as many codes.
inline GroupCode code_best(const KvKernels& kv, const Side& side, const float* x, const float* fixed, Clips clips,
                           uint8_t* codes, uint8_t* tried) {
  float least, greatest;
  kv.find_range(x, side.group_size, &least, &greatest);
  const float first = fixed ? *fixed : static_cast<float>(clips.shares[0]);
  GroupCode best = code_clipped(kv, side, x, least, greatest, first, codes);
  for (size_t i = 1; !fixed && i < clips.count; ++i) {
    const GroupCode other = code_clipped(kv, side, x, least, greatest, static_cast<float>(clips.shares[i]), tried);
    if (!(other.error < best.error)) continue;
    best = other;
    std::copy_n(tried, side.group_size, codes);
  }
  return best;
}

// The bytes of a number in a row of them: one for fp8, two for fp16.
inline void write_stored(uint8_t* row, int64_t place, Stored number, bool is_fp8) {
  const int64_t size = is_fp8 ? 1 : 2;
  std::memcpy(row + place * size, &number.bits, static_cast<size_t>(size));
}

// Codes of a row to its bytes.
inline void pack_row(const Side& side, const uint8_t* codes, int64_t head_dim, uint8_t* out) {
  if (side.is_widened) {
    for (int64_t i = 0; i < head_dim; i += 8, out += 3) {
      uint32_t stream = 0;
      for (int j = 0; j < 8; ++j) stream |= static_cast<uint32_t>(codes[i + j]) << (3 * j);
      std::memcpy(out, &stream, 3);
    }
    return;
  }
  const int64_t whole = head_dim / side.fields;
  for (int64_t i = 0; i < whole; ++i) {
    const uint8_t* from = codes + i * side.fields;
    switch (side.fields) {
      case 5: out[i] = static_cast<uint8_t>(from[0] + 3 * from[1] + 9 * from[2] + 27 * from[3] + 81 * from[4]); break;
      case 4: out[i] = static_cast<uint8_t>(from[0] | from[1] << 2 | from[2] << 4 | from[3] << 6); break;
      case 2: out[i] = static_cast<uint8_t>(from[0] | from[1] << 4); break;
      default: out[i] = from[0];
    }
  }
  if (whole == side.row_bytes) return;
  // Of ternary codes, a last byte may hold fewer than five.
  int byte = 0, weight = 1;
  for (int64_t i = whole * side.fields; i < head_dim; ++i, weight *= 3) byte += weight * codes[i];
  out[whole] = static_cast<uint8_t>(byte);
}

}  // namespace vllm_ext
