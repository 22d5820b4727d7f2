// SPDX-License-Identifier: Apache-2.0
// What ops that write quantized pages are called with: layout, pages, slots and calibration, checked.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "cells.h"
#include "coding.h"
#include "dispatch.h"
#include "lanes.h"

namespace vllm_ext {

constexpr int64_t kMaxHeadDim = 1024;
using OptionalTensor = std::optional<at::Tensor>;

struct StoreWorkspace {
  PageLayout layout;
};

inline WorkspacePool<StoreWorkspace>& store_pool() {
  static WorkspacePool<StoreWorkspace> workspaces;
  return workspaces;
}

// The coordinates in which a head's channels are coded, and the calibrated share of each group's range; null pointers
// where there is none.
struct StoreCalibration {
  const int64_t* order;
  const float *smooth, *shift, *clip;

  // A row of D numbers: x, or `ordered`.
  const float* transform(float* x, float* ordered, int64_t head, int64_t D) const {
    if (shift) {
      for (int64_t i = 0; i < D; ++i) x[i] -= shift[head * D + i];
    }
    if (smooth) {
      for (int64_t i = 0; i < D; ++i) x[i] /= smooth[head * D + i];
    }
    if (!order) return x;
    for (int64_t i = 0; i < D; ++i) ordered[i] = x[order[head * D + i]];
    return ordered;
  }
};

// Tensors of a call, checked and in the types that are read; they live as long as this.
class StoreArguments {
 public:
  StoreArguments(int64_t kv_heads, int64_t head_dim) : kv_heads_(kv_heads), head_dim_(head_dim) {}

  // Elements are side by side; other strides are the tensor's.
  at::Tensor keep_rows(const at::Tensor& x) {
    kept_.push_back(x.stride(-1) == 1 ? x : x.contiguous());
    return kept_.back();
  }

  const int64_t* keep_slots(const at::Tensor& slots, int64_t limit, const at::Tensor& cache) {
    kept_.push_back(slots.to(at::kLong).contiguous());
    const int64_t* slot = kept_.back().const_data_ptr<int64_t>();
    for (int64_t i = 0; i < slots.numel(); ++i) {
      TORCH_CHECK_VALUE(slot[i] < limit, "slot ", slot[i], " is past the cache's ", cache.size(0), " blocks of ",
                        cache.size(2));
    }
    return slot;
  }

  StoreCalibration keep_calibration(const Side& side, const OptionalTensor& order, const OptionalTensor& smooth,
                                    const OptionalTensor& shift, const OptionalTensor& clip) {
    const auto* channels = static_cast<const int64_t*>(find(order, at::kLong, head_dim_, "order"));
    for (int64_t i = 0; channels && i < kv_heads_ * head_dim_; ++i) {
      TORCH_CHECK_VALUE(channels[i] >= 0 && channels[i] < head_dim_, "order holds ", channels[i],
                        ", but head_dim=", head_dim_);
    }
    return {channels, static_cast<const float*>(find(smooth, at::kFloat, head_dim_, "smooth")),
            static_cast<const float*>(find(shift, at::kFloat, head_dim_, "shift")),
            static_cast<const float*>(
                find(clip, at::kFloat, side.is_per_channel ? head_dim_ : side.groups, "clip"))};
  }

 private:
  const void* find(const OptionalTensor& given, at::ScalarType type, int64_t columns, const char* name) {
    if (!given) return nullptr;
    TORCH_CHECK_VALUE(given->dim() == 2 && given->size(0) == kv_heads_ && given->size(1) == columns, name,
                      " must be [", kv_heads_, ", ", columns, "], got ", given->sizes());
    kept_.push_back(given->to(type).contiguous());
    return kept_.back().const_data_ptr();
  }

  int64_t kv_heads_, head_dim_;
  std::vector<at::Tensor> kept_;
};

// StorePages of a layer, one plane for each block and head.
struct StorePages {
  const PageLayout& layout;
  uint8_t* cache;
  int64_t block_stride, plane_stride, kv_heads;

  StorePages(const PageLayout& pages, const at::Tensor& given)
      : layout(pages),
        cache(static_cast<uint8_t*>(given.data_ptr())),
        block_stride(given.stride(0)),
        plane_stride(given.stride(1)),
        kv_heads(given.size(1)) {}

  uint8_t* find_plane(int64_t slot, int64_t head) const {
    return cache + slot / layout.block_size * block_stride + head * plane_stride;
  }
};

inline void check_store_call(const PageLayout& pages, const at::Tensor& cache, at::ArrayRef<double> clips) {
  TORCH_CHECK_VALUE(pages.head_dim <= kMaxHeadDim, "head_dim=", pages.head_dim, " is above ", kMaxHeadDim);
  TORCH_CHECK_VALUE(cache.dim() == 4 && cache.scalar_type() == at::kByte && cache.size(2) == pages.block_size &&
                        cache.size(3) == pages.cell_bytes && cache.stride(3) == 1 &&
                        cache.stride(2) == pages.cell_bytes,
                    "cache must be uint8 [blocks, kv heads, ", pages.block_size, ", ", pages.cell_bytes,
                    "] whose planes are contiguous, got ", cache.scalar_type(), " ", cache.sizes(), " with strides ",
                    cache.strides());
  TORCH_CHECK_VALUE(!clips.empty(), "clips must name at least one share of the range");
}

inline const PageLayout& read_store_layout(StoreWorkspace& workspace, at::IntArrayRef layout) {
  TORCH_CHECK_VALUE(layout.size() == kNumLayoutFields, "layout must have ", kNumLayoutFields, " fields, got ",
                    layout.size());
  workspace.layout.read(layout.data());
  return workspace.layout;
}

}  // namespace vllm_ext
