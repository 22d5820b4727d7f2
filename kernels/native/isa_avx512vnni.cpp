// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX-512 with VNNI.
#include "compiled_needs.h"
#include "table.h"
#include "vector_avx512.h"

namespace vllm_ext {

constinit const Kernels kAvx512VnniKernels = make_table<Avx512>("avx512vnni", kCompiledNeeds);

}  // namespace vllm_ext
