// SPDX-License-Identifier: Apache-2.0
// Where the fields of a token lie in its page, as `layout.py` draws them, and where the kernels put its channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kv_decode/kv_kernels.h"

namespace vllm_ext {

// The layout as integers; cpu.py writes them in this order: the page, then K, then V.
enum PageField { kHeadDim, kBlockSize, kCellBytes, kNumPageFields };
enum SideField {
  kSideDoubleBits,  // 3: ternary, five to a byte; 6: a stream of 3-bit codes
  kSideGroupSize,
  kSidePerChannel,
  kSideIsFp8,
  kSideCodesOffset,
  kSideRowBytes,
  kSideScalesOffset,
  kSideScaleRowBytes,
  kSideLowsOffset,
  kNumSideFields,
};
constexpr std::size_t kNumLayoutFields = kNumPageFields + 2 * kNumSideFields;

// Channels that share a scale. Of K: vectors `first` .. `first + count - 1`, the count a multiple of 4, and the query's
// integers for them from byte `start` of a row on. Of V: blocks, and their sums from float `start` on.
struct ChannelGroup {
  int first, count;
  int64_t start;
};

struct Side {
  int fields, top, bits;
  int64_t group_size;
  bool is_per_channel, is_fp8, is_low_fp8;
  int64_t codes_offset, row_bytes, scales_offset, scale_row_bytes, lows_offset, low_row_bytes;
  // Codes of 3 bits, which cross the borders of bytes: a copy of a row has them in 4 bits each.
  bool is_widened;
  // Of the rows that are unpacked: those of the page or, where rows are widened or less than a chunk, copies of
  // `copied_bytes`; 0: no copies.
  RowFormat format;
  int64_t copied_bytes;
  int groups;
  std::vector<ChannelGroup> group;
  // Of every channel: its integer in the query's row (K), its sum (V).
  std::vector<int32_t> place;
  int64_t length;  // of such a row

  void read(const int64_t* field, int64_t head_dim, bool is_key) {
    is_widened = field[kSideDoubleBits] == 6;
    fields = field[kSideDoubleBits] == 3 ? 5 : is_widened ? 2 : static_cast<int>(16 / field[kSideDoubleBits]);
    top = field[kSideDoubleBits] == 3 ? 2 : (1 << (field[kSideDoubleBits] / 2)) - 1;
    bits = top < 16 ? 4 : 8;
    group_size = field[kSideGroupSize];
    is_per_channel = field[kSidePerChannel] != 0;
    is_fp8 = field[kSideIsFp8] != 0;
    // layout.py, Codec.low_dtype.
    is_low_fp8 = is_fp8 && !is_per_channel;
    codes_offset = field[kSideCodesOffset];
    row_bytes = field[kSideRowBytes];
    scales_offset = field[kSideScalesOffset];
    scale_row_bytes = field[kSideScaleRowBytes];
    lows_offset = field[kSideLowsOffset];
    low_row_bytes = is_per_channel ? 2 * head_dim : scale_row_bytes;
    format = {fields, static_cast<int>(std::max<int64_t>(is_widened ? head_dim / 2 : row_bytes, kChunkBytes))};
    copied_bytes = is_widened || row_bytes < kChunkBytes ? format.row_bytes : 0;
    place_channels(head_dim, is_key);
  }

 private:
  // The vector (K) or block (V) of a channel.
  int find_part(int64_t channel, bool is_key) const {
    const int byte = static_cast<int>(channel / fields), field = static_cast<int>(channel % fields);
    const int chunk = byte / kChunkBytes, lane = byte - find_chunk(format, chunk);
    return is_key ? (4 * chunk + lane / 4) * fields + field : chunk * fields + field;
  }

  void place_channels(int64_t head_dim, bool is_key) {
    const int64_t step = is_per_channel ? head_dim : group_size;
    groups = static_cast<int>(head_dim / step);
    group.clear();
    place.resize(static_cast<std::size_t>(head_dim));
    length = 0;
    for (int64_t begin = 0; begin < head_dim; begin += step) {
      int first = find_part(begin, is_key), last = first;
      for (int64_t channel = begin; channel < begin + step; ++channel) {
        first = std::min(first, find_part(channel, is_key));
        last = std::max(last, find_part(channel, is_key));
      }
      int count = last - first + 1;
      if (is_key) count = (count + 3) / 4 * 4;
      const int64_t width = is_key ? 4 : kLanes;
      for (int64_t channel = begin; channel < begin + step; ++channel) {
        const int byte = static_cast<int>(channel / fields);
        const int lane = byte - find_chunk(format, byte / kChunkBytes);
        place[static_cast<std::size_t>(channel)] = static_cast<int32_t>(
            length + width * (find_part(channel, is_key) - first) + (is_key ? lane % 4 : lane));
      }
      group.push_back({first, count, length});
      length += width * count;
    }
  }
};

// A row of 3-bit codes, a multiple of 16, to two codes a byte: 48 bits at a time, halved until every code is alone.
static inline void widen_row(const uint8_t* from, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 16, from += 6, out += 8) {
    uint64_t x = 0;
    std::memcpy(&x, from, 6);
    x = (x & 0x0000000000ffffff) | (x & 0x0000ffffff000000) << 8;
    x = (x & 0x00000fff00000fff) | (x & 0x00fff00000fff000) << 4;
    x = (x & 0x003f003f003f003f) | (x & 0x0fc00fc00fc00fc0) << 2;
    x = (x & 0x0707070707070707) | (x & 0x3838383838383838) << 1;
    std::memcpy(out, &x, 8);
  }
}

struct PageLayout {
  int64_t head_dim, block_size, cell_bytes;
  Side key, value;
  std::vector<int64_t> fields;

  // Of one layer after the other, the layout is mostly that of the call before.
  void read(const int64_t* values) {
    if (!fields.empty() && std::equal(fields.begin(), fields.end(), values)) return;
    fields.assign(values, values + kNumLayoutFields);
    head_dim = values[kHeadDim];
    block_size = values[kBlockSize];
    cell_bytes = values[kCellBytes];
    key.read(values + kNumPageFields, head_dim, /*is_key=*/true);
    value.read(values + kNumPageFields + kNumSideFields, head_dim, /*is_key=*/false);
  }
};

}  // namespace vllm_ext
