// SPDX-License-Identifier: Apache-2.0
// AMX in plain C++, for machines that have AVX-512 and no AMX. Included before everything else (-include): from there
// on, what the kernels do with tiles happens here. As the hardware does, it refuses tiles that are not configured.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// The operand of ldtilecfg: 64 bytes; bytes per row from byte 16 on, rows from byte 48 on.
extern "C" {
__attribute__((weak, visibility("hidden"))) uint8_t emulated_config[64] = {};
}

// The assembler prefers its macros to instructions of the same name.
asm(R"(
.macro ldtilecfg place:vararg
  vmovdqu64 \place, %zmm31
  vmovdqu64 %zmm31, emulated_config(%rip)
.endm
.macro tilerelease
  vpxord %zmm31, %zmm31, %zmm31
  vmovdqu64 %zmm31, emulated_config(%rip)
.endm
)");

namespace emulated {

constexpr int kRows = 16, kRowBytes = 64;

inline uint8_t tiles[8][kRows][kRowBytes];

inline uint8_t (&find(int tile))[kRows][kRowBytes] {
  uint16_t row_bytes;
  std::memcpy(&row_bytes, emulated_config + 16 + 2 * tile, 2);
  if (emulated_config[0] != 1 || row_bytes != kRowBytes || emulated_config[48 + tile] != kRows) {
    std::printf("tile %d is used with palette %d, %d bytes per row and %d rows\n", tile, emulated_config[0], row_bytes,
                emulated_config[48 + tile]);
    std::exit(2);
  }
  return tiles[tile];
}

inline void load(int tile, const void* base, long stride) {
  auto& rows = find(tile);
  for (int row = 0; row < kRows; ++row) std::memcpy(rows[row], static_cast<const uint8_t*>(base) + row * stride, kRowBytes);
}

inline void store(int tile, void* base, long stride) {
  auto& rows = find(tile);
  for (int row = 0; row < kRows; ++row) std::memcpy(static_cast<uint8_t*>(base) + row * stride, rows[row], kRowBytes);
}

inline void zero(int tile) { std::memset(find(tile), 0, kRows * kRowBytes); }

// sums[m][n] += signed[m][4 k + j] * unsigned[k][4 n + j] over k and j, in 32 bits.
inline void multiply(int sums, int signed_rows, int unsigned_rows) {
  auto &out = find(sums), &a = find(signed_rows), &b = find(unsigned_rows);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kRowBytes / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, out[m] + 4 * n, 4);
      for (int k = 0; k < kRows; ++k) {
        for (int j = 0; j < 4; ++j) sum += static_cast<int8_t>(a[m][4 * k + j]) * b[k][4 * n + j];
      }
      std::memcpy(out[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_dpbsud(sums, a, b) emulated::multiply(sums, a, b)
