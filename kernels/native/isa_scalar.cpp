// SPDX-License-Identifier: Apache-2.0
// Kernels for any machine.
#include "table.h"
#include "vector_scalar.h"

namespace vllm_ext {

constinit const Kernels kScalarKernels = make_table<Scalar>("scalar", 0);

}  // namespace vllm_ext
