// SPDX-License-Identifier: Apache-2.0
// Which tables of kernels this machine can run.
#pragma once

#include "kernels.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vllm_ext {

// What this CPU and its system offer. For AMX, asks the kernel for the tiles' state: without that, the first tile
// instruction kills the process.
static inline unsigned find_features() {
  unsigned found = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found |= kNeedAvx2;
  }
#ifdef VLLM_EXT_ISA_AVXVNNI
  if (__builtin_cpu_supports("avxvnni")) found |= kNeedAvxVnni;
#endif
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    found |= kNeedAvx512Vnni;
  }
#if defined(VLLM_EXT_ISA_AMX) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (__builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) {
    found |= kNeedAmxInt8;
  }
#endif
#endif
  return found;
}

// All compiled tables, the fastest first; null at the end.
static const Kernels* const kTables[] = {
#ifdef VLLM_EXT_ISA_AMX
    &kAmxKernels,
#endif
#ifdef VLLM_EXT_ISA_AVX512VNNI
    &kAvx512VnniKernels,
#endif
#ifdef VLLM_EXT_ISA_AVXVNNI
    &kAvxVnniKernels,
#endif
#ifdef VLLM_EXT_ISA_AVX2
    &kAvx2Kernels,
#endif
    &kScalarKernels,
    nullptr,
};

static inline bool can_run(const Kernels& kernels, unsigned features) { return (kernels.needs & ~features) == 0; }

}  // namespace vllm_ext
