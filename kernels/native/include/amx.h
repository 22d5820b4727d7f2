// SPDX-License-Identifier: Apache-2.0
// Records times int8 activations on AMX: the same sums as tile.h, bit for bit, for many rows.
//
// A vector of a record is one row of a B tile, so 64 columns of a block are one B tile, and 128 columns of a packed row
// of activations are two rows of A tiles. Tiles 0, 1: sums of the two blocks; 2, 3: activations; 4-7: codes.
#pragma once

#include "thread_state.h"
#include "tile.h"
#include "vector_avx512.h"

namespace vllm_ext {

constexpr int kTileRows = 16;
constexpr int kTileBytes = kTileRows * kLine;

// Up to this many rows of integers the vector kernels are faster: a tile product takes as long for 1 row as for 16.
constexpr int kFewRows = 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

static ThreadState enter_with_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = kLine;
    config.rows[tile] = kTileRows;
  }
  // Not _tile_loadconfig: GCC 12's says that it reads 8 bytes, so the stores to the others are dropped, and the first
  // use of a tile without rows kills the process.
  asm volatile("ldtilecfg %0" ::"m"(config));
  return enter_flushing();
}

static void leave_with_tiles(ThreadState state) {
  leave_flushing(state);
  // Tiles that stay configured make every switch of the thread save 8 KB, and surprise the next user.
  _tile_release();
}

template <int kBits, int... kVectors>
static inline __attribute__((always_inline)) void unpack_unit(std::integer_sequence<int, kVectors...>,
                                                              const uint8_t* codes, int unit, uint8_t* out) {
  (Avx512::store_codes(out + kLine * kVectors, unpack_vector<Avx512, kBits, kVectors>(codes, unit)), ...);
}

// GCC 12's _tile_loadd does not say that it reads memory: without this, stores may be moved past it, or dropped.
static inline __attribute__((always_inline)) void finish_stores() { asm volatile("" ::: "memory"); }

// All 32 vectors of a record: two B tiles. Loads the record at `next` meanwhile.
template <int kBits>
static __attribute__((noinline)) void unpack_record(const uint8_t* record, int headers, const uint8_t* next,
                                                    uint8_t* out) {
  const uint8_t* codes = record + kLine * headers;
  for (int line = 0; line < headers; ++line, next += kLine) Avx512::prefetch(next);
  for (int unit = 0; unit < kUnits; ++unit) {
    for (int line = 0; line < kBits; ++line, next += kLine) Avx512::prefetch(next);
    unpack_unit<kBits>(std::make_integer_sequence<int, kUnitVectors>(), codes, unit,
                       out + kLine * kUnitVectors * unit);
  }
}

// One group's sums to floats, as in multiply_tile: `sums` [block][row][16] of 16 rows of integers.
template <int kPlanes>
static void add_sums(const int32_t (*sums)[kTileRows][kRows], const uint8_t* const header[2], const float* scales,
                     const float* x_sums, int tokens, float* out) {
  using V = Avx512;
  for (int block = 0; block < 2; ++block) {
    const auto scale = V::load_fp16(header[block]), zero = V::load_fp16(header[block] + kLine / 2);
    for (int i = 0; i < tokens; ++i) {
      auto dot = V::load_ints(sums[block][i * kPlanes]);
      if constexpr (kPlanes == 2) dot = V::add(V::shift_left_8(dot), V::load_ints(sums[block][i * kPlanes + 1]));
      const auto centred = V::fnma(zero, V::repeat(x_sums[i]), V::to_floats(dot));
      float* sum = out + (2 * i + block) * kRows;
      V::store(sum, V::fma(V::mul(centred, scale), V::repeat(scales[i]), V::load(sum)));
    }
  }
}

template <int kBits, int kPlanes>
static void multiply_with_tiles(const RecordPair& pair) {
  constexpr int kTokens = kTileRows / kPlanes;
  alignas(64) uint8_t codes[2][2 * kTileBytes];
  alignas(64) int32_t sums[2][kTileRows][kRows];
  const int tokens = pair.x.tokens, headers = pair.headers;
  const int64_t step = record_bytes(kBits, headers);
  for (int64_t i = 0; i < static_cast<int64_t>(tokens) * 2; ++i) Avx512::store(pair.out + i * kRows, Avx512::zero());
  for (int64_t chunk = 0; chunk < pair.chunks; ++chunk) {
    const uint8_t* record[2] = {pair.block[0] + chunk * step, pair.block[1] + chunk * step};
    const uint8_t* next = pair.next + chunk * step;
    unpack_record<kBits>(record[0], headers, next, codes[0]);
    unpack_record<kBits>(record[1], headers, next + pair.chunks * step, codes[1]);
    finish_stores();
    _tile_loadd(4, codes[0], kLine);
    _tile_loadd(5, codes[0] + kTileBytes, kLine);
    _tile_loadd(6, codes[1], kLine);
    _tile_loadd(7, codes[1] + kTileBytes, kLine);
    const int8_t* x = pair.x.codes + chunk * pair.x.chunk_stride;
    for (int token = 0; token < tokens; token += kTokens, x += kTileRows * kDepth) {
      const int count = tokens - token < kTokens ? tokens - token : kTokens;
      float* out = pair.out + static_cast<int64_t>(token) * 2 * kRows;
      const int64_t first = chunk * headers * pair.x.scale_stride + token;
      _tile_loadd(2, x, kDepth);
      _tile_loadd(3, x + kLine, kDepth);
      _tile_zero(0);
      _tile_zero(1);
      _tile_dpbsud(0, 2, 4);
      _tile_dpbsud(1, 2, 6);
      if (headers == 2) {
        _tile_stored(0, sums[0], kLine);
        _tile_stored(1, sums[1], kLine);
        add_sums<kPlanes>(sums, record, pair.x.scales + first, pair.x.sums + first, count, out);
        _tile_zero(0);
        _tile_zero(1);
      }
      _tile_dpbsud(0, 3, 5);
      _tile_dpbsud(1, 3, 7);
      _tile_stored(0, sums[0], kLine);
      _tile_stored(1, sums[1], kLine);
      const uint8_t* const header[2] = {record[0] + kLine * (headers - 1), record[1] + kLine * (headers - 1)};
      const int64_t last = first + (headers - 1) * pair.x.scale_stride;
      add_sums<kPlanes>(sums, header, pair.x.scales + last, pair.x.sums + last, count, out);
    }
  }
}

template <int kBits>
static void multiply_with_tiles(const RecordPair& pair) {
  if (pair.x.planes == 1) {
    multiply_with_tiles<kBits, 1>(pair);
  } else {
    multiply_with_tiles<kBits, 2>(pair);
  }
}

static void multiply_records_amx(const RecordPair& pair) {
  // Groups of 32 columns are half a tile.
  if (pair.x.tokens * pair.x.planes <= kFewRows || pair.headers == 4) return multiply_records<Avx512>(pair);
  switch (pair.bits) {
    case 2: return multiply_with_tiles<2>(pair);
    case 3: return multiply_with_tiles<3>(pair);
    case 4: return multiply_with_tiles<4>(pair);
    case 5: return multiply_with_tiles<5>(pair);
    case 6: return multiply_with_tiles<6>(pair);
    default: return multiply_with_tiles<8>(pair);
  }
}

}  // namespace vllm_ext
