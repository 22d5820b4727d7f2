// SPDX-License-Identifier: Apache-2.0
// `store_kv` on the CPU. reference.py is the specification; codes, scales and lows are the same bits, except where two
// clips of a group have the same error up to its last bits.
#include <torch/library.h>

#include <array>

#include "store_call.h"

namespace vllm_ext {
namespace {

// Rows of one head below which threads take longer to wake than to work.
constexpr int64_t kFewRows = 64;

// K or V of a step's tokens.
struct TokenSide {
  const uint8_t* rows;
  Element element;
  int64_t token_stride, head_stride;  // bytes
  StoreCalibration calibration;
  const Side* side;
};

struct TokenStore {
  const Kernels& kernels;
  StorePages pages;
  const int64_t* slots;
  Clips clips;
  std::array<TokenSide, 2> sides;
  size_t num_sides;

  void store_row(const TokenSide& from, int64_t token, int64_t head) const {
    const Side& side = *from.side;
    const int64_t D = pages.layout.head_dim;
    float x[kMaxHeadDim], ordered[kMaxHeadDim];
    uint8_t codes[kMaxHeadDim], tried[kMaxHeadDim];
    kernels.load_row(from.rows + token * from.token_stride + head * from.head_stride, from.element, D, 1.0f, x);
    const float* values = from.calibration.transform(x, ordered, head, D);
    const int64_t within = slots[token] % pages.layout.block_size;
    uint8_t* plane = pages.find_plane(slots[token], head);
    uint8_t* scales = plane + side.scales_offset + within * side.scale_row_bytes;
    uint8_t* lows = plane + side.lows_offset + within * side.low_row_bytes;
    for (int64_t group = 0; group < side.groups; ++group) {
      const int64_t first = group * side.group_size;
      const float* clip = from.calibration.clip ? from.calibration.clip + head * side.groups + group : nullptr;
      const GroupCode best = code_best(kernels.kv, side, values + first, clip, clips, codes + first, tried);
      write_stored(scales, group, best.scale, side.is_fp8);
      write_stored(lows, group, best.low, side.is_low_fp8);
    }
    pack_row(side, codes, D, plane + side.codes_offset + within * side.row_bytes);
  }

  void store_tokens(int64_t begin, int64_t end) const {
    for (int64_t token = begin; token < end; ++token) {
      if (slots[token] < 0) continue;
      for (size_t side = 0; side < num_sides; ++side) {
        for (int64_t head = 0; head < pages.kv_heads; ++head) store_row(sides[side], token, head);
      }
    }
  }
};

void kv_store(const at::Tensor& key, const at::Tensor& value, const at::Tensor& cache, const at::Tensor& slot_mapping,
              at::IntArrayRef layout, const OptionalTensor& key_order, const OptionalTensor& key_smooth,
              const OptionalTensor& key_shift, const OptionalTensor& key_clip, const OptionalTensor& value_order,
              const OptionalTensor& value_smooth, const OptionalTensor& value_shift, const OptionalTensor& value_clip,
              at::ArrayRef<double> clips) {
  auto workspace = store_pool().acquire();
  const PageLayout& pages = read_store_layout(*workspace, layout);
  check_store_call(pages, cache, clips);
  const int64_t D = pages.head_dim, kv_heads = cache.size(1), tokens = slot_mapping.numel();
  StoreArguments arguments(kv_heads, D);
  TokenStore store{current_kernels(),
                   StorePages(pages, cache),
                   arguments.keep_slots(slot_mapping, cache.size(0) * pages.block_size, cache),
                   {clips.data(), clips.size()},
                   {},
                   0};
  const auto add_side = [&](const at::Tensor& x, const char* name, const Side& side,
                            const StoreCalibration& calibration) {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) >= tokens && x.size(1) == kv_heads && x.size(2) == D, name,
                      " must be float [at least ", tokens, ", ", kv_heads, ", ", D, "], got ", x.scalar_type(), " ",
                      x.sizes());
    const at::Tensor rows = arguments.keep_rows(x);
    const int64_t bytes = rows.element_size();
    store.sides[store.num_sides++] = {static_cast<const uint8_t*>(rows.const_data_ptr()),
                                      find_element(rows.scalar_type()),
                                      rows.stride(0) * bytes,
                                      rows.stride(1) * bytes,
                                      calibration,
                                      &side};
  };
  add_side(value, "value", pages.value,
           arguments.keep_calibration(pages.value, value_order, value_smooth, value_shift, value_clip));
  if (!pages.key.is_per_channel) {
    add_side(key, "key", pages.key, arguments.keep_calibration(pages.key, key_order, key_smooth, key_shift, key_clip));
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
