// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"

namespace vllm_ext {

// The table in use: the fastest that this machine runs, or what select_isa chose.
const Kernels& current_kernels();

}  // namespace vllm_ext
