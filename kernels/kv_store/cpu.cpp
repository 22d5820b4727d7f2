// SPDX-License-Identifier: Apache-2.0
// `store_kv` on the CPU. reference.py is the specification; codes, scales and lows are the same bits, except where two
// clips of a group have the same error up to its last bits.
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <limits>
#include <optional>

#include "cells.h"
#include "dispatch.h"
#include "lanes.h"

namespace vllm_ext {
namespace {

constexpr int64_t kMaxHeadDim = 1024;
// Rows of one head below which threads take longer to wake than to work.
constexpr int64_t kFewRows = 64;

struct StoreWorkspace {
  PageLayout layout;
};

WorkspacePool<StoreWorkspace>& pool() {
  static WorkspacePool<StoreWorkspace> workspaces;
  return workspaces;
}

// K or V of a step, and their calibration; null pointers where there is none.
struct StoredSide {
  const uint8_t* rows;
  Element element;
  int64_t token_stride, head_stride;  // bytes
  const int64_t* order;
  const float *smooth, *shift, *clip;
  const Side* side;
};

// A number as the cache stores it, its bits and its value.
struct Stored {
  uint16_t bits;
  float value;
};

// The nearest that can be stored; beyond the largest that one, where a conversion gives NaN.
Stored round_to_stored(float value, bool is_fp8) {
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
GroupCode code_clipped(const KvKernels& kv, const Side& side, const float* x, float least, float greatest, float clip,
                       uint8_t* codes) {
  // Volatile: a compiler may join its product with the differences below, which rounds once where the reference does
  // twice.
  volatile float half = (greatest - least) / 2 * clip;
  const float middle = (greatest + least) / 2, top = static_cast<float>(side.top);
  // The smallest positive number there is: a step of 0 has no codes.
  const float smallest = side.is_fp8 ? 0x1p-9f : 0x1p-24f;
  GroupCode code;
  code.low = round_to_stored(middle - half, side.is_fp8);
  code.scale = round_to_stored(std::max((middle + half - code.low.value) / top, smallest), side.is_fp8);
  if (code.scale.value != code.scale.value || code.low.value != code.low.value) {
    std::memset(codes, 0, static_cast<size_t>(side.group_size));
    code.error = std::numeric_limits<float>::quiet_NaN();
    return code;
  }
  code.error = kv.code_group(x, side.group_size, code.low.value, code.scale.value, side.top, codes);
  return code;
}

void pack_row(const Side& side, const uint8_t* codes, int64_t head_dim, uint8_t* out) {
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

struct Store {
  const Kernels& kernels;
  const PageLayout& layout;
  uint8_t* cache;
  int64_t block_stride, plane_stride, kv_heads;
  const int64_t* slots;
  std::array<StoredSide, 2> sides;
  size_t num_sides;
  const double* clips;
  size_t num_clips;

  void store_row(const StoredSide& from, int64_t token, int64_t head) const {
    const Side& side = *from.side;
    const int64_t D = layout.head_dim;
    float x[kMaxHeadDim], stored[kMaxHeadDim];
    uint8_t codes[kMaxHeadDim], tried[kMaxHeadDim];
    kernels.load_row(from.rows + token * from.token_stride + head * from.head_stride, from.element, D, 1.0f, x);
    if (from.shift) {
      for (int64_t i = 0; i < D; ++i) x[i] -= from.shift[head * D + i];
    }
    if (from.smooth) {
      for (int64_t i = 0; i < D; ++i) x[i] /= from.smooth[head * D + i];
    }
    const float* values = x;
    if (from.order) {
      for (int64_t i = 0; i < D; ++i) stored[i] = x[from.order[head * D + i]];
      values = stored;
    }
    const int64_t block = slots[token] / layout.block_size, within = slots[token] % layout.block_size;
    uint8_t* plane = cache + block * block_stride + head * plane_stride;
    uint8_t* scales = plane + side.scales_offset + within * side.scale_row_bytes;
    uint8_t* lows = plane + side.lows_offset + within * side.scale_row_bytes;
    const size_t size = side.is_fp8 ? 1 : 2;
    for (int64_t group = 0; group < side.groups; ++group) {
      const float* part = values + group * side.group_size;
      uint8_t* to = codes + group * side.group_size;
      float least, greatest;
      kernels.kv.find_range(part, side.group_size, &least, &greatest);
      const auto clip = from.clip ? from.clip[head * side.groups + group] : static_cast<float>(clips[0]);
      GroupCode best = code_clipped(kernels.kv, side, part, least, greatest, clip, to);
      for (size_t i = 1; !from.clip && i < num_clips; ++i) {
        const GroupCode other =
            code_clipped(kernels.kv, side, part, least, greatest, static_cast<float>(clips[i]), tried);
        if (!(other.error < best.error)) continue;
        best = other;
        std::copy_n(tried, side.group_size, to);
      }
      std::memcpy(scales + static_cast<size_t>(group) * size, &best.scale.bits, size);
      std::memcpy(lows + static_cast<size_t>(group) * size, &best.low.bits, size);
    }
    pack_row(side, codes, D, plane + side.codes_offset + within * side.row_bytes);
  }

  void store_tokens(int64_t begin, int64_t end) const {
    for (int64_t token = begin; token < end; ++token) {
      if (slots[token] < 0) continue;
      for (size_t side = 0; side < num_sides; ++side) {
        for (int64_t head = 0; head < kv_heads; ++head) store_row(sides[side], token, head);
      }
    }
  }
};

void kv_store(const at::Tensor& key, const at::Tensor& value, const at::Tensor& cache, const at::Tensor& slot_mapping,
              at::IntArrayRef layout, const std::optional<at::Tensor>& key_order,
              const std::optional<at::Tensor>& key_smooth, const std::optional<at::Tensor>& key_shift,
              const std::optional<at::Tensor>& key_clip, const std::optional<at::Tensor>& value_order,
              const std::optional<at::Tensor>& value_smooth, const std::optional<at::Tensor>& value_shift,
              const std::optional<at::Tensor>& value_clip, at::ArrayRef<double> clips) {
  TORCH_CHECK_VALUE(layout.size() == kNumLayoutFields, "layout must have ", kNumLayoutFields, " fields, got ",
                    layout.size());
  auto workspace = pool().acquire();
  workspace->layout.read(layout.data());
  const PageLayout& pages = workspace->layout;
  const int64_t D = pages.head_dim;
  TORCH_CHECK_VALUE(D <= kMaxHeadDim, "head_dim=", D, " is above ", kMaxHeadDim);
  TORCH_CHECK_VALUE(cache.dim() == 4 && cache.scalar_type() == at::kByte && cache.size(2) == pages.block_size &&
                        cache.size(3) == pages.cell_bytes && cache.stride(3) == 1 &&
                        cache.stride(2) == pages.cell_bytes,
                    "cache must be uint8 [blocks, kv heads, ", pages.block_size, ", ", pages.cell_bytes,
                    "] whose planes are contiguous, got ", cache.scalar_type(), " ", cache.sizes(), " with strides ",
                    cache.strides());
  const int64_t kv_heads = cache.size(1);
  TORCH_CHECK_VALUE(!clips.empty(), "clips must name at least one share of the range");
  const at::Tensor slots = slot_mapping.to(at::kLong).contiguous();
  const int64_t tokens = slots.numel();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens; ++i) {
    TORCH_CHECK_VALUE(slot[i] < cache.size(0) * pages.block_size, "slot ", slot[i], " is past the cache's ",
                      cache.size(0), " blocks of ", pages.block_size);
  }
  std::vector<at::Tensor> kept;
  const auto find_tensor = [&](const std::optional<at::Tensor>& given, at::ScalarType type, int64_t columns,
                               const char* name) -> const void* {
    if (!given) return nullptr;
    TORCH_CHECK_VALUE(given->dim() == 2 && given->size(0) == kv_heads && given->size(1) == columns, name, " must be [",
                      kv_heads, ", ", columns, "], got ", given->sizes());
    kept.push_back(given->to(type).contiguous());
    return kept.back().const_data_ptr();
  };
  const auto find_side = [&](const at::Tensor& x, const char* name, const Side& side,
                             const std::optional<at::Tensor>& order, const std::optional<at::Tensor>& smooth,
                             const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& clip) {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) >= tokens && x.size(1) == kv_heads && x.size(2) == D, name,
                      " must be float [at least ", tokens, ", ", kv_heads, ", ", D, "], got ", x.scalar_type(), " ",
                      x.sizes());
    kept.push_back(x.stride(2) == 1 ? x : x.contiguous());
    const at::Tensor rows = kept.back();
    const auto* channels = static_cast<const int64_t*>(find_tensor(order, at::kLong, D, "order"));
    for (int64_t i = 0; channels && i < kv_heads * D; ++i) {
      TORCH_CHECK_VALUE(channels[i] >= 0 && channels[i] < D, "order holds ", channels[i], ", but head_dim=", D);
    }
    const int64_t bytes = rows.element_size();
    return StoredSide{static_cast<const uint8_t*>(rows.const_data_ptr()),
                      find_element(rows.scalar_type()),
                      rows.stride(0) * bytes,
                      rows.stride(1) * bytes,
                      channels,
                      static_cast<const float*>(find_tensor(smooth, at::kFloat, D, "smooth")),
                      static_cast<const float*>(find_tensor(shift, at::kFloat, D, "shift")),
                      static_cast<const float*>(find_tensor(clip, at::kFloat, side.groups, "clip")),
                      &side};
  };
  Store store{current_kernels(),
              pages,
              static_cast<uint8_t*>(cache.data_ptr()),
              cache.stride(0),
              cache.stride(1),
              kv_heads,
              slot,
              {},
              0,
              clips.data(),
              clips.size()};
  store.sides[store.num_sides++] =
      find_side(value, "value", pages.value, value_order, value_smooth, value_shift, value_clip);
  if (!pages.key.is_per_channel) {
    store.sides[store.num_sides++] = find_side(key, "key", pages.key, key_order, key_smooth, key_shift, key_clip);
  }
  if (tokens * kv_heads <= kFewRows) {
    const ThreadScope scope(store.kernels);
    store.store_tokens(0, tokens);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kFewRows / 4 / kv_heads);
  run_stages(store.kernels, at::get_num_threads(), Stage{divide_up(tokens, grain), [&](int64_t task, int64_t, int) {
    store.store_tokens(task * grain, std::min(tokens, (task + 1) * grain));
  }});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_ext_cpu, library) {
  library.def(
      "kv_store(Tensor key, Tensor value, Tensor(a!) cache, Tensor slot_mapping, int[] layout, Tensor? key_order, "
      "Tensor? key_smooth, Tensor? key_shift, Tensor? key_clip, Tensor? value_order, Tensor? value_smooth, "
      "Tensor? value_shift, Tensor? value_clip, float[] clips) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_ext_cpu, CPU, library) { library.impl("kv_store", &kv_store); }

}  // namespace vllm_ext
