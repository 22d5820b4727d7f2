// SPDX-License-Identifier: Apache-2.0
// `act_quant` on the CPU. reference.py is the specification.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "blocks.h"
#include "dispatch.h"

namespace vllm_ext {
namespace {

std::tuple<at::Tensor, at::Tensor> act_quant(const at::Tensor& x, int64_t group_size) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be [tokens, K], got ", x.sizes());
  const Element element = find_element(x.scalar_type());
  const int64_t tokens = x.size(0), K = x.size(1);
  check_groups(K, group_size);
  const int64_t columns = group_size == -1 ? K : group_size, groups = group_size == -1 ? 1 : K / group_size;
  const at::Tensor rows = x.contiguous();
  at::Tensor codes = at::empty({tokens, K}, x.options().dtype(at::kChar));
  at::Tensor scales = at::empty({tokens, groups}, x.options().dtype(at::kFloat));
  const auto* in = static_cast<const uint8_t*>(rows.const_data_ptr());
  auto* code = codes.data_ptr<int8_t>();
  auto* scale = scales.data_ptr<float>();
  const Kernels& kernels = current_kernels();
  at::parallel_for(0, tokens, std::max<int64_t>(1, 8192 / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    // No flushing of denormals here: it is an operator of its own, whose result is the reference's to the bit.
    static thread_local Scratch scratch;
    scratch.reserve(Scratch::part_bytes<float>(K));
    auto* row = scratch.take<float>(K);
    for (int64_t token = begin; token < end; ++token) {
      kernels.load_row(in + token * K * element_bytes(element), element, K, 1.0f, row);
      for (int64_t group = 0; group < groups; ++group) {
        const float* values = row + group * columns;
        scale[token * groups + group] = kernels.round_group(values, columns, kernels.find_largest(values, columns),
                                                            code + token * K + group * columns);
      }
    }
  });
  return {codes, scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(vllm_ext_cpu, CPU, library) { library.impl("act_quant", &act_quant); }

}  // namespace vllm_ext
