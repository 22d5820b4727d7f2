// SPDX-License-Identifier: Apache-2.0
// Attention over quantized pages on every instruction set of this machine, without torch, on buffers of exactly the size
// that it may touch: made for -fsanitize=address,undefined. Exits 0 when all is well; else says what is not.
#include <cstdio>
#include <cstring>
#include <random>

#include "attend_unit.h"
#include "detect.h"

using namespace vllm_ext;

namespace {

int failures = 0;
std::mt19937 generator(1);

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

std::vector<float> draw_floats(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

struct Codec {
  int double_bits, group_size;
  bool is_per_channel, is_fp8;
};

struct Shape {
  Codec key, value;
  int head_dim, block_size;
};

// The integers of a layout, as kv_store/layout.py places its sections.
std::vector<int64_t> plan_layout(const Shape& shape) {
  std::vector<int64_t> fields = {shape.head_dim, shape.block_size, 0};
  int64_t offset = 0;
  for (const Codec& codec : {shape.key, shape.value}) {
    const int64_t D = shape.head_dim, size = codec.is_fp8 ? 1 : 2;
    const int64_t row = codec.double_bits == 3 ? (D + 4) / 5 : D * codec.double_bits / 16;
    const int64_t rows = codec.is_per_channel ? shape.block_size / codec.group_size : shape.block_size;
    const int64_t scale_row = codec.is_per_channel ? D * size : D / codec.group_size * size;
    const int64_t low_row = codec.is_per_channel ? 2 * D : scale_row;
    const int64_t scales = offset + shape.block_size * row, lows = scales + rows * scale_row;
    fields.insert(fields.end(), {codec.double_bits, codec.group_size, codec.is_per_channel, codec.is_fp8, offset, row,
                                 scales, scale_row, lows});
    offset = lows + rows * low_row;
  }
  fields[kCellBytes] = (offset + shape.block_size - 1) / shape.block_size;
  return fields;
}

// Scales and lows of ordinary size in all their bytes; what is left are codes.
void fill_cells(const std::vector<int64_t>& fields, int64_t block_size, uint8_t* plane) {
  for (int side = 0; side < 2; ++side) {
    const int64_t* field = &fields[static_cast<size_t>(kNumPageFields + side * kNumSideFields)];
    const int64_t rows = field[kSidePerChannel] ? block_size / field[kSideGroupSize] : block_size;
    for (int64_t i = 0; i < block_size * field[kSideRowBytes]; ++i) {
      plane[field[kSideCodesOffset] + i] = static_cast<uint8_t>(draw(0, field[kSideDoubleBits] == 3 ? 242 : 255));
    }
    for (const int64_t offset : {field[kSideScalesOffset], field[kSideLowsOffset]}) {
      const bool is_low = offset == field[kSideLowsOffset];
      const bool is_wide = is_low && field[kSidePerChannel] && field[kSideIsFp8];
      for (int64_t i = 0; i < rows * field[kSideScaleRowBytes] * (is_wide ? 2 : 1); ++i) {
        const bool is_top = (field[kSideIsFp8] && !is_wide) || i % 2;
        plane[offset + i] = static_cast<uint8_t>(draw(0x20, 0x34) | (is_top && is_low ? 0x80 : 0));
      }
    }
  }
}

double widen_scale(const uint8_t* at, bool is_fp8) {
  const int digits = is_fp8 ? at[0] & 127 : (at[0] | at[1] << 8) & 0x7fff;
  const int fraction_bits = is_fp8 ? 3 : 10, exponent = digits >> fraction_bits;
  const double fraction = std::ldexp(digits & ((1 << fraction_bits) - 1), -fraction_bits);
  const double value = exponent ? std::ldexp(1 + fraction, exponent - (is_fp8 ? 7 : 15)) : std::ldexp(fraction, is_fp8 ? -6 : -14);
  return (is_fp8 ? at[0] : at[1]) & 128 ? -value : value;
}

double decode(const int64_t* field, const uint8_t* plane, int64_t token, int64_t channel) {
  const uint8_t* row = plane + field[kSideCodesOffset] + token * field[kSideRowBytes];
  int code;
  if (field[kSideDoubleBits] == 3) {
    code = row[channel / 5];
    for (int64_t i = 0; i < channel % 5; ++i) code /= 3;
    code %= 3;
  } else {
    const int64_t bits = field[kSideDoubleBits] / 2, bit = channel * bits;
    const int next = bit / 8 + 1 < field[kSideRowBytes] ? row[bit / 8 + 1] : 0;
    code = (row[bit / 8] | next << 8) >> (bit % 8) & ((1 << bits) - 1);
  }
  const int64_t size = field[kSideIsFp8] ? 1 : 2, group = field[kSideGroupSize];
  const int64_t at = field[kSidePerChannel] ? token / group * field[kSideScaleRowBytes] + channel * size
                                            : token * field[kSideScaleRowBytes] + channel / group * size;
  // Lows of per-channel keys are fp16 beside any scales.
  const bool is_wide = field[kSidePerChannel] && field[kSideIsFp8];
  return widen_scale(plane + field[kSideLowsOffset] + (is_wide ? 2 * at : at), field[kSideIsFp8] && !is_wide) +
         widen_scale(plane + field[kSideScalesOffset] + at, field[kSideIsFp8]) * code;
}

constexpr int64_t kHeads = 6, kKvHeads = 2, kPageTokens = 4;

void test_unit(const Kernels& kernels, const Shape& shape, int64_t length, int64_t queries, int64_t window,
               int64_t sinks, int64_t parts) {
  const std::vector<int64_t> fields = plan_layout(shape);
  PageLayout layout;
  layout.read(fields.data());
  const int64_t D = shape.head_dim, N = shape.block_size, blocks = (length + N - 1) / N, pages = length / kPageTokens + 1;
  const int64_t plane = N * layout.cell_bytes;
  std::vector<uint8_t> cache(static_cast<size_t>(blocks * kKvHeads * plane));
  for (int64_t i = 0; i < blocks * kKvHeads; ++i) fill_cells(fields, N, &cache[static_cast<size_t>(i * plane)]);
  std::vector<int32_t> table(static_cast<size_t>(blocks)), recent_table(static_cast<size_t>(pages));
  for (int64_t i = 0; i < blocks; ++i) table[static_cast<size_t>(i)] = static_cast<int32_t>(blocks - 1 - i);
  for (int64_t i = 0; i < pages; ++i) recent_table[static_cast<size_t>(i)] = static_cast<int32_t>(i + 1);
  const std::vector<float> recent = draw_floats((pages + 1) * kKvHeads * kPageTokens * 2 * D);
  const std::vector<float> query = draw_floats(queries * kHeads * D), key = draw_floats(queries * kKvHeads * D);
  const std::vector<float> value = draw_floats(queries * kKvHeads * D);
  std::vector<float> out(static_cast<size_t>(queries * kHeads * D));
  const int32_t starts[] = {0, static_cast<int32_t>(queries)}, lens[] = {static_cast<int32_t>(length)};
  const auto bytes = [](const std::vector<float>& x) { return reinterpret_cast<const uint8_t*>(x.data()); };
  const auto rows = [&](const std::vector<float>& x, int64_t heads) {
    return TokenRows{bytes(x), Element::kFp32, heads * D * 4, D * 4};
  };
  const Problem problem{.kernels = kernels,
                        .layout = layout,
                        .heads = kHeads,
                        .kv_heads = kKvHeads,
                        .query = rows(query, kHeads),
                        .key = rows(key, kKvHeads),
                        .value = rows(value, kKvHeads),
                        .out = reinterpret_cast<uint8_t*>(out.data()),
                        .cache = cache.data(),
                        .block_stride = kKvHeads * plane,
                        .plane_stride = plane,
                        .block_table = table.data(),
                        .table_width = blocks,
                        .query_start_loc = starts,
                        .seq_lens = lens,
                        .recent = {bytes(recent), Element::kFp32, kKvHeads * kPageTokens * 2 * D * 4,
                                   kPageTokens * 2 * D * 4, 2 * D * 4, D * 4, kPageTokens},
                        .recent_table = recent_table.data(),
                        .recent_width = pages,
                        .key_coordinates = {},
                        .value_coordinates = {},
                        .scale = 0.1f,
                        .window = window,
                        .sinks = sinks};
  const int64_t group = kHeads / kKvHeads, tiles = (length + kTileTokens - 1) / kTileTokens;
  for (int64_t head = 0; head < kKvHeads; ++head) {
    const Unit unit{0, head, 0, group, 0, queries, parts, nullptr};
    const int64_t stride = Sums::count(unit.rows(), layout);
    std::vector<float> partial(static_cast<size_t>(parts * stride));
    Scratch scratch;
    const ThreadState saved = kernels.enter();
    UnitAttention attention(problem, unit, scratch);
    for (int64_t part = 0; part < parts; ++part) {
      attention.attend(tiles * part / parts, tiles * (part + 1) / parts, part == 0,
                       Sums::place(&partial[static_cast<size_t>(part * stride)], unit.rows(), layout));
    }
    attention.finish(partial.data(), stride, parts);
    kernels.leave(saved);
  }
  double error = 0, norm = 0;
  std::vector<double> weights(static_cast<size_t>(length));
  const int64_t step = length - queries;
  for (int64_t row = 0; row < queries * kHeads; ++row) {
    const int64_t at = step + row / kHeads, head = row % kHeads / group;
    const auto read = [&](bool is_value, int64_t position, int64_t channel) -> double {
      if (problem.is_full_precision(0, at, position)) {
        if (position >= step) return (is_value ? value : key)[static_cast<size_t>(((position - step) * kKvHeads + head) * D + channel)];
        const int64_t page = recent_table[static_cast<size_t>(position / kPageTokens)];
        return recent[static_cast<size_t>((((page * kKvHeads + head) * kPageTokens + position % kPageTokens) * 2 + is_value) * D + channel)];
      }
      const int64_t block = table[static_cast<size_t>(position / N)];
      return decode(&fields[static_cast<size_t>(kNumPageFields + is_value * kNumSideFields)],
                    &cache[static_cast<size_t>((block * kKvHeads + head) * plane)], position % N, channel);
    };
    double total = 0;
    for (int64_t position = 0; position <= at; ++position) {
      double score = 0;
      for (int64_t i = 0; i < D; ++i) score += query[static_cast<size_t>(row * D + i)] * read(false, position, i);
      total += weights[static_cast<size_t>(position)] = std::exp(0.1 * score);
    }
    for (int64_t i = 0; i < D; ++i) {
      double expected = 0;
      for (int64_t position = 0; position <= at; ++position) {
        expected += weights[static_cast<size_t>(position)] / total * read(true, position, i);
      }
      const double difference = out[static_cast<size_t>(row * D + i)] - expected;
      error += difference * difference;
      norm += expected * expected;
    }
  }
  if (error <= 1e-6 * norm) return;
  ++failures;
  std::printf("%s: relative error %g (D %d, block %d, bits %g and %g, length %lld, queries %lld)\n", kernels.name,
              std::sqrt(error / norm), shape.head_dim, shape.block_size, shape.key.double_bits / 2.0,
              shape.value.double_bits / 2.0, static_cast<long long>(length), static_cast<long long>(queries));
}

}  // namespace

int main() {
  const unsigned features = find_features();
  const Shape shapes[] = {
      {{4, 128, false, true}, {4, 128, false, true}, 128, 128}, {{4, 64, false, true}, {3, 64, false, true}, 64, 48},
      {{4, 32, true, true}, {4, 32, false, true}, 128, 64},     {{8, 64, false, false}, {8, 32, false, false}, 64, 32},
      {{16, 80, false, false}, {16, 40, false, true}, 80, 7},   {{3, 20, false, true}, {3, 20, false, true}, 80, 16},
      {{4, 16, false, true}, {3, 16, false, true}, 16, 16},     {{6, 128, false, true}, {6, 32, false, true}, 128, 64},
      {{6, 32, true, true}, {6, 16, false, true}, 16, 32},
  };
  for (const Kernels* const* table = kTables; *table; ++table) {
    if (!can_run(**table, features)) continue;
    for (const Shape& shape : shapes) {
      for (const int64_t length : {1, 33, 300}) {
        test_unit(**table, shape, length, 1, 0 + 9 * (length % 2), 3, 1);
        if (length > 8) test_unit(**table, shape, length, 7, 40, 5, 2);
      }
    }
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
