// SPDX-License-Identifier: Apache-2.0
// flags: -march=x86-64-v4 -mavx512vnni
// Kernels for AVX-512 with VNNI.
#include "compiled_needs.h"
#include "table.h"
#include "vector_avx512.h"

namespace vllm_ext {

constinit const Kernels kAvx512VnniKernels = make_table<Avx512>("avx512vnni", kCompiledNeeds);

}  // namespace vllm_ext
