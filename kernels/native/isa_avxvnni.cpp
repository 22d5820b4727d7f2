// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX2 with the dot products of AVX-VNNI.
#include "table.h"
#include "vector_avx2.h"

namespace vllm_ext {

constinit const Kernels kAvxVnniKernels = make_table<Avx2<true>>("avxvnni", kNeedAvx2 | kNeedAvxVnni);

}  // namespace vllm_ext
