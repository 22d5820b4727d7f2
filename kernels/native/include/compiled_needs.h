// SPDX-License-Identifier: Apache-2.0
// What an AVX-512 object needs of a CPU: the compiler may use all that its flags allow, asked for or not.
#pragma once

#include "kernels.h"

namespace vllm_ext {

constexpr unsigned kCompiledNeeds = kNeedAvx512Vnni
#ifdef __AVX512VBMI__
                                    | kNeedAvx512Vbmi
#endif
#ifdef __AVX512BF16__
                                    | kNeedAvx512Bf16
#endif
    ;

}  // namespace vllm_ext
