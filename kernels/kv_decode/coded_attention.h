// SPDX-License-Identifier: Apache-2.0
// Tiles of coded tokens: scores straight from codes, their softmax, and sums of coded values.
//
//     q . (scale * code + low) = scale * (q . code) + low * sum(q)       codes are never turned into numbers
//     sum of p * (scale * code + low) = sum of (p * scale) * code + sum of p * low
#pragma once

#include "unit.h"

namespace vllm_ext {

class CodedAttention : public UnitState {
 public:
  using UnitState::UnitState;

 protected:
  // How many tokens of a tile have to be read: up to the last that a query reads coded. Fills `visible_` where not all
  // queries read all tokens.
  int64_t find_seen(int64_t base) {
    is_masked_ = base < problem_.sinks || base + kTileTokens > window_[0];
    if (!is_masked_) return kTileTokens;
    int64_t seen = 0;
    for (int64_t i = 0; i < kTileTokens; ++i) {
      const int64_t position = base + i;
      const bool is_sink = position < problem_.sinks;
      const bool is_kept = position <= last_position_ && (is_sink || position >= window_[0]) &&
                           problem_.is_kept(unit_.request, position);
      for (int64_t query = 0; query < unit_.queries; ++query) {
        const bool is_near = is_kept && (is_sink || position >= window_[query]);
        const bool is_visible = position <= first_position_ + query && !is_near;
        visible_[query * kTileTokens + i] = is_visible;
        if (is_visible) seen = i + 1;
      }
    }
    return seen;
  }

  void fill_rows(int64_t tile, TileRows& rows) {
    const int64_t base = tile * kTileTokens, size = layout_.block_size;
    const int32_t* table = problem_.block_table + unit_.request * problem_.table_width;
    const int64_t end = std::min<int64_t>(kTileTokens, last_position_ + 1 - base);
    for (int64_t i = 0; i < end;) {
      const int64_t position = base + i, within = position % size;
      const uint8_t* plane =
          problem_.cache + table[position / size] * problem_.block_stride + unit_.kv_head * problem_.plane_stride;
      const int64_t stop = std::min(end, i + size - within);
      const uint8_t* key = plane + layout_.key.codes_offset + within * layout_.key.row_bytes;
      const uint8_t* value = plane + layout_.value.codes_offset + within * layout_.value.row_bytes;
      for (; i < stop; ++i, key += layout_.key.row_bytes, value += layout_.value.row_bytes) {
        rows.plane[i] = plane;
        rows.keys[i] = key;
        rows.values[i] = value;
      }
    }
    for (int64_t i = std::max<int64_t>(end, 0); i < kTileTokens; ++i) {
      rows.plane[i] = rows.plane[0];
      rows.keys[i] = rows.keys[0];
      rows.values[i] = rows.values[0];
    }
  }

  void attend_tile(int64_t base, int64_t count, const TileRows& rows, const TileRows& next) {
    const uint8_t* pointers[kTileTokens];
    const int64_t padded = round_up(count, kLanes);
    const auto* key_rows = pad_rows(layout_.key, rows.keys, padded_[0], count, pointers);
    kv_.unpack_keys(key_rows, layout_.key.format, static_cast<int>(padded / kLanes), rows.values, codes_);
    if (layout_.key.is_per_channel) {
      score_channel_groups(base, count, rows);
    } else {
      score_token_groups(base, count, rows);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      float* scores = scores_ + row * kTileTokens;
      const uint8_t* visible = is_masked_ ? visible_ + row / unit_.heads * kTileTokens : nullptr;
      if (visible) {
        for (int64_t i = 0; i < count; ++i) scores[i] = visible[i] ? scores[i] : kUnseen;
      }
      std::fill(scores + count, scores + padded, kUnseen);
      const float before = sums_now_.most[row];
      const float total = kv_.exponentiate(scores, padded, &sums_now_.most[row]);
      keep_[row] = std::exp(before - sums_now_.most[row]);
      sums_now_.total[row] = keep_[row] * sums_now_.total[row] + total;
      if (visible) {
        for (int64_t i = 0; i < count; ++i) scores[i] = visible[i] ? scores[i] : 0.0f;
      }
    }
    add_values(base, count, rows, next);
  }

 private:
  const uint8_t* const* pad_rows(const Side& side, const uint8_t* const* rows, uint8_t* padded, int64_t count,
                                 const uint8_t** pointers) const {
    if (side.copied_bytes == 0) return rows;
    for (int64_t i = 0; i < kTileTokens; ++i) {
      uint8_t* copy = padded + i * side.copied_bytes;
      pointers[i] = copy;
      if (i >= count) continue;
      if (side.is_widened) {
        widen_row(rows[i], layout_.head_dim, copy);
      } else {
        std::copy_n(rows[i], side.row_bytes, copy);
      }
    }
    return pointers;
  }

  // scales_ and lows_ [group][128] of a side with scales for every token; 0 past `count`.
  void load_token_scales(const Side& side, const TileRows& rows, int64_t base, int64_t count) {
    const int64_t size = layout_.block_size, groups = side.groups;
    for (float* out : {scales_, lows_}) {
      const int64_t offset = out == scales_ ? side.scales_offset : side.lows_offset;
      float* loaded = groups == 1 ? out : loaded_;
      for (int64_t i = 0; i < count;) {
        const int64_t within = (base + i) % size, some = std::min(count - i, size - within);
        kv_.load_scales(rows.plane[i] + offset + within * side.scale_row_bytes, some * groups, side.is_fp8,
                        loaded + i * groups);
        i += some;
      }
      for (int64_t group = 0; group < groups; ++group) {
        float* to = out + group * kTileTokens;
        if (groups > 1) {
          for (int64_t i = 0; i < count; ++i) to[i] = loaded[i * groups + group];
        }
        std::fill(to + count, to + round_up(count, kLanes), 0.0f);
      }
    }
    if (!is_masked_) return;
    // Cells that no query reads may never have been written.
    for (int64_t i = 0; i < count; ++i) {
      bool is_visible = false;
      for (int64_t query = 0; query < unit_.queries; ++query) is_visible |= visible_[query * kTileTokens + i] != 0;
      if (is_visible) continue;
      for (int64_t group = 0; group < groups; ++group) scales_[group * kTileTokens + i] = lows_[group * kTileTokens + i] = 0;
    }
  }

  // Exact for pages of a tile, of which it is worth it.
  void prefetch_scales(const Side& side, const TileRows& next) const {
    const int64_t rows = side.is_per_channel ? std::max<int64_t>(1, kTileTokens / side.group_size) : kTileTokens;
    for (int64_t byte = 0; byte < rows * side.scale_row_bytes; byte += kVectorBytes) {
      __builtin_prefetch(next.plane[byte / side.scale_row_bytes * (kTileTokens / rows)] + side.scales_offset + byte);
    }
    for (int64_t byte = 0; byte < rows * side.low_row_bytes; byte += kVectorBytes) {
      __builtin_prefetch(next.plane[byte / side.low_row_bytes * (kTileTokens / rows)] + side.lows_offset + byte);
    }
  }

  void score_token_groups(int64_t base, int64_t count, const TileRows& rows) {
    const Side& side = layout_.key;
    load_token_scales(side, rows, base, count);
    for (int64_t group = 0; group < side.groups; ++group) {
      multiply_query(side.group[static_cast<size_t>(group)], 0, round_up(count, kLanes) / kLanes);
      for (int64_t row = 0; row < rows_; ++row) {
        add_row_scores(row, group, 0, count, scales_ + group * kTileTokens, lows_ + group * kTileTokens);
      }
    }
  }

  // Scales for every channel and group of tokens go into the query, which is rounded anew for each group.
  void score_channel_groups(int64_t base, int64_t count, const TileRows& rows) {
    const Side& side = layout_.key;
    const int64_t D = layout_.head_dim, size = layout_.block_size;
    std::fill(scales_, scales_ + kTileTokens, 1.0f);
    std::fill(lows_, lows_ + kTileTokens, 1.0f);
    float* scale = line_;
    float* low = line_ + D;
    float* scaled = line_ + 2 * D;
    std::fill(placed_scales_, placed_scales_ + 2 * side.length, 0.0f);
    float* placed_lows = placed_scales_ + side.length;
    for (int64_t first = 0; first < count; first += side.group_size) {
      const int64_t last = std::min(count, first + side.group_size);
      const int64_t group = (base + first) % size / side.group_size;
      if (!is_group_seen(first, last)) {
        for (int64_t row = 0; row < rows_; ++row) {
          std::fill(scores_ + row * kTileTokens + first, scores_ + row * kTileTokens + last, kUnseen);
        }
        continue;
      }
      const uint8_t* plane = rows.plane[first];
      kv_.load_scales(plane + side.scales_offset + group * side.scale_row_bytes, D, side.is_fp8, scale);
      kv_.load_scales(plane + side.lows_offset + group * side.low_row_bytes, D, side.is_low_fp8, low);
      const int32_t* places = side.place.data();
      for (int64_t i = 0; i < D; ++i) {
        placed_scales_[places[i]] = scale[i];
        placed_lows[places[i]] = low[i];
      }
      for (int64_t row = 0; row < rows_; ++row) {
        const float* placed = placed_query_ + row * side.length;
        round_query(row, 0, scaled, kv_.weigh(placed, placed_scales_, placed_lows, side.length, scaled));
      }
      const int64_t blocks = (round_up(last, kLanes) - first) / kLanes;
      multiply_query(side.group[0], first / kLanes, blocks);
      for (int64_t row = 0; row < rows_; ++row) add_row_scores(row, 0, first, last - first, scales_, lows_);
    }
  }

  bool is_group_seen(int64_t first, int64_t last) const {
    if (!is_masked_) return true;
    for (int64_t query = 0; query < unit_.queries; ++query) {
      for (int64_t i = first; i < last; ++i) {
        if (visible_[query * kTileTokens + i]) return true;
      }
    }
    return false;
  }

  void multiply_query(const ChannelGroup& group, int64_t first_block, int64_t blocks) {
    const Side& side = layout_.key;
    const int64_t block_stride = count_key_vectors(side.format) * kVectorBytes;
    kv_.multiply_codes({.x = query_codes_ + group.start,
                        .x_stride = side.length,
                        .rows = static_cast<int>(kPlanes * rows_),
                        .codes = codes_ + first_block * block_stride + group.first * kVectorBytes,
                        .block_stride = block_stride,
                        .blocks = static_cast<int>(blocks),
                        .vectors = group.count,
                        .bits = side.bits,
                        .out = products_,
                        .out_stride = kTileTokens});
  }

  void add_row_scores(int64_t row, int64_t group, int64_t first, int64_t count, const float* scales,
                      const float* lows) {
    const int32_t* high = products_ + kPlanes * row * kTileTokens;
    const int64_t place = row * layout_.key.groups + group;
    kv_.add_scores({.high = high,
                    .low = high + kTileTokens,
                    .scales = scales,
                    .lows = lows,
                    .factor = factors_[place],
                    .sum = query_sums_[place],
                    .offset = offsets_[row],
                    .is_first = group == 0,
                    .tokens = static_cast<int>(round_up(count, kLanes)),
                    .scores = scores_ + row * kTileTokens + first});
  }

  void add_values(int64_t base, int64_t count, const TileRows& rows, const TileRows& next) {
    const uint8_t* pointers[kTileTokens];
    const Side& side = layout_.value;
    const int64_t padded = round_up(count, kLanes);
    const auto* value_rows = pad_rows(side, rows.values, padded_[1], count, pointers);
    kv_.unpack_values(value_rows, side.format, static_cast<int>(padded / 4), next.keys, codes_);
    load_token_scales(side, rows, base, count);
    prefetch_scales(layout_.key, next);
    prefetch_scales(layout_.value, next);
    for (int64_t group = 0; group < side.groups; ++group) {
      const ChannelGroup& part = side.group[static_cast<size_t>(group)];
      const float* scales = scales_ + group * kTileTokens;
      const float* lows = lows_ + group * kTileTokens;
      // With one query, cells that it does not see are 0 already.
      const bool is_damaged = is_masked_ && unit_.queries > 1 &&
                              (has_nonfinite(scales, padded) || has_nonfinite(lows, padded));
      float seen_scales[kTileTokens], seen_lows[kTileTokens];
      for (int64_t row = 0; row < rows_; ++row) {
        if (is_damaged) {
          // 0 times a NaN is NaN: a query must not meet those of tokens that it does not see.
          const uint8_t* visible = visible_ + row / unit_.heads * kTileTokens;
          for (int64_t i = 0; i < padded; ++i) {
            seen_scales[i] = visible[i] ? scales[i] : 0.0f;
            seen_lows[i] = visible[i] ? lows[i] : 0.0f;
          }
        }
        float& low = sums_now_.lows[row * side.groups + group];
        low = keep_[row] * low + kv_.weigh(scores_ + row * kTileTokens, is_damaged ? seen_scales : scales,
                                           is_damaged ? seen_lows : lows, padded, weighted_);
        int8_t* codes = weight_codes_ + kPlanes * row * kTileTokens;
        weight_scales_[row] = kv_.round_row(weighted_, padded, codes, codes + kTileTokens);
      }
      const int64_t width = kLanes * part.count;
      kv_.multiply_codes({.x = weight_codes_,
                          .x_stride = kTileTokens,
                          .rows = static_cast<int>(kPlanes * rows_),
                          .codes = codes_ + part.first * kTileTokens / 4 * kVectorBytes,
                          .block_stride = kTileTokens / 4 * kVectorBytes,
                          .blocks = part.count,
                          .vectors = static_cast<int>(padded / 4),
                          .bits = side.bits,
                          .out = products_,
                          .out_stride = width});
      for (int64_t row = 0; row < rows_; ++row) {
        const int32_t* high = products_ + kPlanes * row * width;
        kv_.add_products(high, high + width, width, weight_scales_[row], keep_[row],
                         sums_now_.values + row * side.length + part.start);
      }
    }
  }
};

}  // namespace vllm_ext
