// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX2 with FMA and F16C.
#include "table.h"
#include "vector_avx2.h"

namespace vllm_ext {

constinit const Kernels kAvx2Kernels = make_table<Avx2<false>>("avx2", kNeedAvx2);

}  // namespace vllm_ext
