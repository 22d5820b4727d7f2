// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time; declares the operators of the library.
#include "dispatch.h"

#include <torch/library.h>

#include <string>

#include "choice.h"
#include "detect.h"
#include "self_test.h"

namespace vllm_ext {
namespace {

bool works(const Kernels& kernels) {
  static const unsigned features = find_features();
  if (!can_run(kernels, features)) return false;
#if defined(VLLM_EXT_ISA_AMX) && defined(VLLM_EXT_ISA_AVX512VNNI)
  if (&kernels == &kAmxKernels) {
    static const bool is_right = [] {
      const bool agrees = agree_in_child(kAmxKernels, kAvx512VnniKernels);
      if (!agrees) TORCH_WARN("this machine offers AMX, but the kernels for it fail their self-test: they are not used");
      return agrees;
    }();
    return is_right;
  }
#endif
  return true;
}

constinit Choice choice(kTables, works);

std::string isa() { return current_kernels().name; }

void select_isa(const std::string& name) {
  std::string known;
  for (const Kernels* const* table = kTables; *table; ++table) {
    if (name == (*table)->name) {
      TORCH_CHECK_VALUE(works(**table), "this machine cannot run the kernels for ", name);
      choice.set(**table);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string((*table)->name);
  }
  TORCH_CHECK_VALUE(false, "instruction set '", name, "' is not compiled in; there are: ", known);
}

}  // namespace

const Kernels& current_kernels() { return choice.current(); }

TORCH_LIBRARY(vllm_ext_cpu, library) {
  library.def("isa() -> str", &isa);
  library.def("select_isa(str name) -> ()", &select_isa);
  library.def("empty_huge(int num_bytes) -> Tensor");
  library.def(
      "repack_block(Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size, bool gate_up, Tensor(a!) out)"
      " -> ()");
  library.def(
      "dequantize_block(Tensor arena, int offset, int bits, int group_size, int N, int K, bool gate_up) -> Tensor");
  library.def("act_quant(Tensor x, int group_size) -> (Tensor, Tensor)");
  // These two return no tensor where the weights are not theirs: no row of the table is CPU_RECORD.
  library.def("mixed_linear(Tensor x, Tensor arena, Tensor table, int out_features, Tensor? bias) -> Tensor?");
  library.def(
      "mixed_moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor arena, Tensor table, Tensor? expert_map, "
      "int intermediate_size, bool weight_on_input) -> (Tensor?, int)");
}

}  // namespace vllm_ext
