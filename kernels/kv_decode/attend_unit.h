// SPDX-License-Identifier: Apache-2.0
// Attention of one unit over a range of its context, with one running softmax for coded keys and one for those in full
// precision: they are in different coordinates until the end.
#pragma once

#include "coded_attention.h"

namespace vllm_ext {

class UnitAttention : public CodedAttention {
 public:
  using CodedAttention::CodedAttention;

  // Tiles [first, end) of 128 positions; with_near: the full-precision tokens, too.
  void attend(int64_t first, int64_t end, bool with_near, const Sums& sums) {
    sums_now_ = sums;
    std::fill(sums.values, sums.values + rows_ * layout_.value.length, 0.0f);
    std::fill(sums.lows, sums.lows + rows_ * layout_.value.groups, 0.0f);
    std::fill(sums.near_values, sums.near_values + rows_ * layout_.head_dim, 0.0f);
    for (int64_t row = 0; row < rows_; ++row) {
      sums.most[row] = sums.near_most[row] = kUnseen;
      sums.total[row] = sums.near_total[row] = 0.0f;
    }
    if (with_near) attend_near();
    TileRows *now = tiles_, *next = tiles_ + 1;
    bool is_filled = false;
    for (int64_t tile = first; tile < end; ++tile) {
      const int64_t seen = find_seen(tile * kTileTokens);
      if (seen == 0) {
        is_filled = false;
        continue;
      }
      if (!is_filled) fill_rows(tile, *now);
      is_filled = tile + 1 < end;
      if (is_filled) fill_rows(tile + 1, *next);
      attend_tile(tile * kTileTokens, seen, *now, is_filled ? *next : *now);
      std::swap(now, next);
    }
  }

  // Rows of the output, from the sums of all parts; `stride` floats from one part to the next.
  void finish(float* first, int64_t stride, int64_t parts) {
    const int64_t D = layout_.head_dim;
    const Side& side = layout_.value;
    const Coordinates& to = problem_.value_coordinates;
    const float* smooth = to.smooth ? to.smooth + unit_.kv_head * D : nullptr;
    const float* shift = to.shift ? to.shift + unit_.kv_head * D : nullptr;
    const int64_t* order = to.order ? to.order + unit_.kv_head * D : nullptr;
    for (int64_t row = 0; row < rows_; ++row) {
      const Sums near = Sums::place(first, rows_, layout_);
      float most = near.near_most[row];
      for (int64_t part = 0; part < parts; ++part) {
        most = std::max(most, Sums::place(first + part * stride, rows_, layout_).most[row]);
      }
      std::fill(line_, line_ + D, 0.0f);
      float total = 0.0f;
      for (int64_t part = 0; part < parts; ++part) {
        const Sums sums = Sums::place(first + part * stride, rows_, layout_);
        const float share = std::exp(sums.most[row] - most);
        const float* values = sums.values + row * side.length;
        const float* lows = sums.lows + row * side.groups;
        total += share * sums.total[row];
        for (int64_t group = 0, channel = 0; group < side.groups; ++group) {
          for (int64_t i = 0; i < side.group_size; ++i, ++channel) {
            line_[channel] += share * (values[side.place[static_cast<size_t>(channel)]] + lows[group]);
          }
        }
      }
      const float share = std::exp(near.near_most[row] - most);
      const float inverse = 1.0f / (total + share * near.near_total[row]);
      float* result = line_ + D;
      for (int64_t i = 0; i < D; ++i) {
        const int64_t channel = order ? order[i] : i;
        float value = line_[i];
        if (smooth) value *= smooth[channel];
        if (shift) value += shift[channel] * total;
        result[channel] = (value + share * near.near_values[row * D + channel]) * inverse;
      }
      const int64_t token = problem_.query_start_loc[unit_.request] + unit_.first_query + row / unit_.heads;
      const int64_t head = head_of(row);
      const int64_t bytes = D * element_bytes(problem_.query.element);
      problem_.kernels.store_row(result, D, problem_.query.element,
                                 problem_.out + (token * problem_.heads + head) * bytes);
    }
  }

 private:
  // A token in full precision.
  struct NearToken {
    int64_t position;
    const uint8_t *key, *value;
    bool is_step;
  };

  static_assert(kNearTokens <= 32, "a query's unseen tokens are the bits of one integer");

  // Sinks, then the window.
  void attend_near() {
    const int64_t step = problem_.step_start(unit_.request), token = problem_.query_start_loc[unit_.request];
    const int64_t sinks = std::min(problem_.sinks, last_position_ + 1);
    const int64_t window = std::max<int64_t>(sinks, window_[0]);
    const RecentPages& recent = problem_.recent;
    NearToken chosen[kNearTokens];
    int64_t count = 0;
    for (int64_t position = 0; position <= last_position_; ++position) {
      if (position >= sinks && position < window) {
        position = window;
        if (position > last_position_) break;
      }
      NearToken& next = chosen[count];
      next.position = position;
      next.is_step = position >= step;
      if (next.is_step) {
        next.key = problem_.key.find(token + position - step, unit_.kv_head);
        next.value = problem_.value.find(token + position - step, unit_.kv_head);
      } else {
        const int64_t page = problem_.find_page(unit_.request, position);
        if (page == 0) continue;
        next.key = recent.data + page * recent.page_stride + unit_.kv_head * recent.head_stride +
                   position % recent.page_tokens * recent.token_stride;
        next.value = next.key + recent.value_offset;
      }
      if (++count < kNearTokens) continue;
      attend_near_tokens(chosen, count);
      count = 0;
    }
    if (count > 0) attend_near_tokens(chosen, count);
  }

  void load_near(const NearToken* tokens, int64_t count, bool is_value) {
    for (int64_t i = 0; i < count; ++i) {
      const Element element = tokens[i].is_step ? (is_value ? problem_.value : problem_.key).element
                                                : problem_.recent.element;
      problem_.kernels.load_row(is_value ? tokens[i].value : tokens[i].key, element, layout_.head_dim, 1.0f,
                                near_ + i * layout_.head_dim);
    }
  }

  void attend_near_tokens(const NearToken* tokens, int64_t count) {
    const int64_t D = layout_.head_dim, padded = round_up(count, kLanes);
    load_near(tokens, count, /*is_value=*/false);
    kv_.dot_floats(query_, static_cast<int>(rows_), near_, static_cast<int>(count), D, 1.0f, scores_);
    uint32_t unseen[kMaxQueryRows], is_any_unseen = 0;
    for (int64_t row = 0; row < rows_; ++row) {
      float* scores = scores_ + row * kTileTokens;
      const int64_t at = first_position_ + row / unit_.heads, window = window_[row / unit_.heads];
      unseen[row] = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = tokens[i].position;
        if (position > at || (position >= problem_.sinks && position < window)) {
          scores[i] = kUnseen;
          unseen[row] |= uint32_t{1} << i;
        }
      }
      is_any_unseen |= unseen[row];
      std::fill(scores + count, scores + padded, kUnseen);
      const float before = sums_now_.near_most[row];
      const float total = kv_.exponentiate(scores, padded, &sums_now_.near_most[row]);
      keep_[row] = std::exp(before - sums_now_.near_most[row]);
      sums_now_.near_total[row] = keep_[row] * sums_now_.near_total[row] + total;
      // What an exponential leaves of them would still count beside a value near the greatest float.
      for (int64_t i = 0; unseen[row] && i < count; ++i) scores[i] = unseen[row] >> i & 1 ? 0.0f : scores[i];
    }
    load_near(tokens, count, /*is_value=*/true);
    if (is_any_unseen && has_nonfinite(near_, count * D)) {
      add_seen_values(tokens, count, unseen);
      return;
    }
    kv_.add_floats(scores_, static_cast<int>(rows_), near_, static_cast<int>(count), D, keep_, sums_now_.near_values);
  }

  // Query by query, without the values that it does not see: 0 times a NaN or an infinity is NaN.
  void add_seen_values(const NearToken* tokens, int64_t count, const uint32_t* unseen) {
    const int64_t D = layout_.head_dim;
    for (int64_t row = 0; row < rows_; row += unit_.heads) {
      load_near(tokens, count, /*is_value=*/true);
      for (int64_t i = 0; i < count; ++i) {
        if (unseen[row] >> i & 1) std::fill(near_ + i * D, near_ + (i + 1) * D, 0.0f);
      }
      kv_.add_floats(scores_ + row * kTileTokens, static_cast<int>(unit_.heads), near_, static_cast<int>(count), D,
                     keep_ + row, sums_now_.near_values + row * D);
    }
  }
};

}  // namespace vllm_ext
