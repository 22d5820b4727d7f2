// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX-512 with VNNI.
#include "table.h"
#include "vector_avx512.h"

namespace vllm_ext {

constinit const Kernels kAvx512VnniKernels = make_table<Avx512>("avx512vnni", kNeedAvx512Vnni);

}  // namespace vllm_ext
