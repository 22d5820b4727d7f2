// SPDX-License-Identifier: Apache-2.0
// Query rows that share a kv head: their integers, and the memory in which they meet the context.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "problem.h"
#include "workspace.h"

namespace vllm_ext {

// Query rows of one unit. More would hide the unpacking a little better, and take memory that the caches do not have.
constexpr int64_t kMaxQueryRows = 32;
// Full-precision tokens at a time: their floats stay in the L1 cache.
constexpr int64_t kNearTokens = 32;

// Whether 0 times one of them is not 0. As integers, which a compiler turns into vectors.
static inline bool has_nonfinite(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits << 1);
  }
  return most >= 0xff000000u;
}

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Consecutive queries of a request, and heads of one kv head. Row q * heads + h is head h of query q.
struct Unit {
  int64_t request, kv_head, first_head, heads;
  int64_t first_query, queries;  // within the step
  int64_t parts;
  float* partial;  // of all its parts, where they are several

  int64_t rows() const { return queries * heads; }
};

// What a part of the context gives each row: sums of exponentials, and of values weighted by them.
struct Sums {
  float *most, *total, *lows, *values;
  float *near_most, *near_total, *near_values;

  static int64_t count(int64_t rows, const PageLayout& layout) {
    return rows * (4 + layout.value.groups + layout.value.length + layout.head_dim) + kLanes;
  }
  static Sums place(float* at, int64_t rows, const PageLayout& layout) {
    Sums sums;
    const auto take = [&at](int64_t count) { return std::exchange(at, at + count); };
    sums.values = take(rows * layout.value.length);
    sums.near_values = take(rows * layout.head_dim);
    sums.lows = take(rows * layout.value.groups);
    sums.most = take(rows);
    sums.total = take(rows);
    sums.near_most = take(rows);
    sums.near_total = take(rows);
    return sums;
  }
};

// Rows of codes of one tile, and the page planes they are in.
struct TileRows {
  const uint8_t* plane[kTileTokens];
  const uint8_t* keys[kTileTokens];
  const uint8_t* values[kTileTokens];
};

class UnitState {
 public:
  UnitState(const Problem& problem, const Unit& unit, Scratch& scratch)
      : problem_(problem), unit_(unit), layout_(problem.layout), kv_(problem.kernels.kv) {
    rows_ = unit.rows();
    first_position_ = problem.step_start(unit.request) + unit.first_query;
    last_position_ = first_position_ + unit.queries - 1;
    for (int64_t query = 0; query < unit.queries; ++query) {
      window_[query] = problem.find_window(first_position_ + query);
    }
    place_buffers(scratch);
    prepare_query();
  }

  // Where the sums of a unit with one part are.
  float* own_floats() { return sums_; }
  Sums own_sums() { return Sums::place(sums_, rows_, layout_); }

 protected:
  int64_t head_of(int64_t row) const {
    return unit_.kv_head * (problem_.heads / problem_.kv_heads) + unit_.first_head + row % unit_.heads;
  }

  // Integers for one group of channels, of which `sum` is the sum.
  void round_query(int64_t row, int64_t group, const float* placed, float sum) {
    const Side& side = layout_.key;
    const ChannelGroup& part = side.group[static_cast<size_t>(group)];
    int8_t* codes = query_codes_ + row * kPlanes * side.length + part.start;
    const int64_t place = row * side.groups + group;
    factors_[place] = kv_.round_row(placed + part.start, 4 * part.count, codes, codes + side.length);
    query_sums_[place] = sum;
  }

  const Problem& problem_;
  const Unit& unit_;
  const PageLayout& layout_;
  const KvKernels& kv_;
  int64_t rows_, first_position_, last_position_;
  int64_t window_[kMaxQueryRows];  // where each query's window begins
  bool is_masked_ = false;
  Sums sums_now_{};
  TileRows* tiles_;
  uint8_t* codes_;
  int8_t *query_codes_, *weight_codes_;
  int32_t* products_;
  uint8_t* padded_[2];
  uint8_t* visible_;
  float *sums_, *query_, *stored_query_, *placed_query_, *scores_, *weighted_, *scales_, *lows_, *loaded_;
  float *factors_, *query_sums_, *offsets_, *keep_, *weight_scales_, *near_, *line_, *placed_scales_;

 private:
  void place_buffers(Scratch& scratch) {
    const int64_t D = layout_.head_dim, tile_rows = kPlanes * rows_;
    const int64_t key_bytes = kTileTokens / kLanes * count_key_vectors(layout_.key.format) * kVectorBytes;
    const int64_t value_bytes = count_value_blocks(layout_.value.format) * kTileTokens / 4 * kVectorBytes;
    // A group's vectors are counted in fours: the last may reach past the last block's.
    const int64_t code_bytes = std::max(key_bytes + 4 * kVectorBytes, value_bytes);
    const int64_t query_bytes = tile_rows * layout_.key.length;
    const int64_t widest = std::max<int64_t>(kTileTokens, layout_.value.length);
    const int64_t groups = std::max(layout_.key.groups, layout_.value.groups);
    const int64_t scales = groups * kTileTokens, query_groups = rows_ * layout_.key.groups;
    const auto floats = [](int64_t count) { return Scratch::part_bytes<float>(count); };
    int64_t size = Scratch::part_bytes<TileRows>(2) + Scratch::part_bytes<uint8_t>(code_bytes);
    size += Scratch::part_bytes<int8_t>(query_bytes) + Scratch::part_bytes<int8_t>(tile_rows * kTileTokens);
    size += Scratch::part_bytes<int32_t>(tile_rows * widest);
    for (const Side* side : {&layout_.key, &layout_.value}) {
      size += Scratch::part_bytes<uint8_t>(kTileTokens * side->copied_bytes);
    }
    size += Scratch::part_bytes<uint8_t>(unit_.queries * kTileTokens);
    size += floats(Sums::count(rows_, layout_)) + 2 * floats(rows_ * D) + floats(rows_ * layout_.key.length);
    size += floats(rows_ * kTileTokens) + floats(kTileTokens) + 2 * floats(scales) + floats(scales + kLanes);
    size += 2 * floats(query_groups) + 3 * floats(rows_) + floats(kNearTokens * D);
    size += floats(2 * D + layout_.key.length) + floats(2 * layout_.key.length);
    scratch.reserve(size);
    tiles_ = scratch.take<TileRows>(2);
    codes_ = scratch.take<uint8_t>(code_bytes);
    query_codes_ = scratch.take<int8_t>(query_bytes);
    weight_codes_ = scratch.take<int8_t>(tile_rows * kTileTokens);
    products_ = scratch.take<int32_t>(tile_rows * widest);
    padded_[0] = scratch.take<uint8_t>(kTileTokens * layout_.key.copied_bytes);
    padded_[1] = scratch.take<uint8_t>(kTileTokens * layout_.value.copied_bytes);
    visible_ = scratch.take<uint8_t>(unit_.queries * kTileTokens);
    sums_ = scratch.take<float>(Sums::count(rows_, layout_));
    query_ = scratch.take<float>(rows_ * D);
    stored_query_ = scratch.take<float>(rows_ * D);
    placed_query_ = scratch.take<float>(rows_ * layout_.key.length);
    scores_ = scratch.take<float>(rows_ * kTileTokens);
    weighted_ = scratch.take<float>(kTileTokens);
    scales_ = scratch.take<float>(scales);
    lows_ = scratch.take<float>(scales);
    loaded_ = scratch.take<float>(scales + kLanes);
    factors_ = scratch.take<float>(query_groups);
    query_sums_ = scratch.take<float>(query_groups);
    offsets_ = scratch.take<float>(rows_);
    keep_ = scratch.take<float>(rows_);
    weight_scales_ = scratch.take<float>(rows_);
    near_ = scratch.take<float>(kNearTokens * D);
    line_ = scratch.take<float>(2 * D + layout_.key.length);
    placed_scales_ = scratch.take<float>(2 * layout_.key.length);
    // Rows past a tile's tokens, and the rest of a short row, are never written.
    std::fill(padded_[0], padded_[0] + kTileTokens * layout_.key.copied_bytes, uint8_t{0});
    std::fill(padded_[1], padded_[1] + kTileTokens * layout_.value.copied_bytes, uint8_t{0});
  }

  // The queries in both coordinates, times the scale of the scores; their integers, where no token changes them.
  void prepare_query() {
    const int64_t D = layout_.head_dim;
    const Side& side = layout_.key;
    const Coordinates& to = problem_.key_coordinates;
    const float* smooth = to.smooth ? to.smooth + unit_.kv_head * D : nullptr;
    const float* shift = to.shift ? to.shift + unit_.kv_head * D : nullptr;
    const int64_t* order = to.order ? to.order + unit_.kv_head * D : nullptr;
    std::fill(placed_query_, placed_query_ + rows_ * side.length, 0.0f);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t token = problem_.query_start_loc[unit_.request] + unit_.first_query + row / unit_.heads;
      float* query = query_ + row * D;
      float* stored = stored_query_ + row * D;
      float* placed = placed_query_ + row * side.length;
      problem_.kernels.load_row(problem_.query.find(token, head_of(row)), problem_.query.element, D, problem_.scale,
                                query);
      offsets_[row] = 0.0f;
      for (int64_t i = 0; i < D; ++i) {
        const int64_t channel = order ? order[i] : i;
        stored[i] = smooth ? query[channel] * smooth[channel] : query[channel];
        placed[side.place[static_cast<size_t>(i)]] = stored[i];
        if (shift) offsets_[row] += query[i] * shift[i];
      }
      if (side.is_per_channel) continue;
      for (int64_t group = 0; group < side.groups; ++group) {
        float sum = 0.0f;
        for (int64_t i = 0; i < side.group_size; ++i) sum += stored[group * side.group_size + i];
        round_query(row, group, placed, sum);
      }
    }
  }
};

}  // namespace vllm_ext
