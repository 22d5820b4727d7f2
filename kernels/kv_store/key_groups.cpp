// SPDX-License-Identifier: Apache-2.0
// `store_key_groups` on the CPU: keys coded per channel over a group of tokens (KIVI). As cpu.cpp, of reference.py.
#include <torch/library.h>

#include "store_call.h"

namespace vllm_ext {
namespace {

// Keys of whole groups, coded per channel: [group, token, head, channel] to columns of a channel's tokens, and the
// codes of these back to rows.
struct GroupStore {
  const Kernels& kernels;
  StorePages pages;
  const int64_t* slots;
  Clips clips;
  const uint8_t* keys;
  Element element;
  int64_t group_stride, token_stride, head_stride;  // bytes
  StoreCalibration calibration;

  void store(int64_t group, int64_t head) const {
    const int64_t slot = slots[group];
    if (slot < 0) return;
    const Side& side = pages.layout.key;
    const int64_t D = pages.layout.head_dim, tokens = side.group_size, within = slot % pages.layout.block_size;
    float x[kMaxHeadDim], ordered[kMaxHeadDim];
    uint8_t row[kMaxHeadDim];
    // Of this thread: a group may be longer than a stack is deep.
    static thread_local std::vector<float> columns;
    static thread_local std::vector<uint8_t> codes;
    columns.resize(static_cast<size_t>(D * tokens));
    codes.resize(static_cast<size_t>((D + 1) * tokens));
    const uint8_t* from = keys + group * group_stride + head * head_stride;
    for (int64_t token = 0; token < tokens; ++token) {
      kernels.load_row(from + token * token_stride, element, D, 1.0f, x);
      const float* values = calibration.transform(x, ordered, head, D);
      for (int64_t i = 0; i < D; ++i) columns[static_cast<size_t>(i * tokens + token)] = values[i];
    }
    uint8_t* plane = pages.find_plane(slot, head);
    uint8_t* scales = plane + side.scales_offset + within / tokens * side.scale_row_bytes;
    uint8_t* lows = plane + side.lows_offset + within / tokens * side.low_row_bytes;
    for (int64_t i = 0; i < D; ++i) {
      const float* clip = calibration.clip ? calibration.clip + head * D + i : nullptr;
      const GroupCode best = code_best(kernels.kv, side, columns.data() + i * tokens, clip, clips,
                                       codes.data() + i * tokens, codes.data() + D * tokens);
      write_stored(scales, i, best.scale, side.is_fp8);
      write_stored(lows, i, best.low, side.is_low_fp8);
    }
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t i = 0; i < D; ++i) row[i] = codes[static_cast<size_t>(i * tokens + token)];
      pack_row(side, row, D, plane + side.codes_offset + (within + token) * side.row_bytes);
    }
  }
};

void kv_store_key_groups(const at::Tensor& keys, const at::Tensor& cache, const at::Tensor& first_slots,
                         at::IntArrayRef layout, const OptionalTensor& order, const OptionalTensor& smooth,
                         const OptionalTensor& shift, const OptionalTensor& clip, at::ArrayRef<double> clips) {
  auto workspace = store_pool().acquire();
  const PageLayout& pages = read_store_layout(*workspace, layout);
  check_store_call(pages, cache, clips);
  const Side& side = pages.key;
  const int64_t kv_heads = cache.size(1), groups = first_slots.numel();
  TORCH_CHECK_VALUE(side.is_per_channel, "kv_store_key_groups needs keys coded per channel");
  TORCH_CHECK_VALUE(keys.dim() == 4 && keys.size(0) == groups && keys.size(1) == side.group_size &&
                        keys.size(2) == kv_heads && keys.size(3) == pages.head_dim,
                    "keys must be [", groups, ", ", side.group_size, ", ", kv_heads, ", ", pages.head_dim, "], got ",
                    keys.sizes());
  StoreArguments arguments(kv_heads, pages.head_dim);
  const int64_t* slots = arguments.keep_slots(first_slots, cache.size(0) * pages.block_size, cache);
  for (int64_t i = 0; i < groups; ++i) {
    TORCH_CHECK_VALUE(slots[i] < 0 || slots[i] % side.group_size == 0, "slot ", slots[i],
                      " must be a multiple of the group of ", side.group_size, " tokens");
  }
  const at::Tensor rows = arguments.keep_rows(keys);
  const int64_t bytes = rows.element_size();
  const GroupStore store{current_kernels(),
                         StorePages(pages, cache),
                         slots,
                         {clips.data(), clips.size()},
                         static_cast<const uint8_t*>(rows.const_data_ptr()),
                         find_element(rows.scalar_type()),
                         rows.stride(0) * bytes,
                         rows.stride(1) * bytes,
                         rows.stride(2) * bytes,
                         arguments.keep_calibration(side, order, smooth, shift, clip)};
  run_stages(store.kernels, at::get_num_threads(), Stage{groups * kv_heads, [&](int64_t task, int64_t, int) {
    store.store(task / kv_heads, task % kv_heads);
  }});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_ext_cpu, library) {
  library.def(
      "kv_store_key_groups(Tensor keys, Tensor(a!) cache, Tensor first_slots, int[] layout, Tensor? order, "
      "Tensor? smooth, Tensor? shift, Tensor? clip, float[] clips) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_ext_cpu, CPU, library) { library.impl("kv_store_key_groups", &kv_store_key_groups); }

}  // namespace vllm_ext
