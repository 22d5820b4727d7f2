// SPDX-License-Identifier: Apache-2.0
// Which tables of kernels this machine can run.
#pragma once

#include "kernels.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vllm_ext {

// What this CPU and its system offer, but for AMX.
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
#endif
  return found;
}

// Whether there is AMX, and the system lets this process use it: without asking, the first tile instruction kills the
// process. Not asked for other tables: then every thread's state would have room for tiles that nobody uses.
static inline bool request_tiles() {
#if defined(VLLM_EXT_ISA_AMX) && defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
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

static inline bool can_run(const Kernels& kernels, unsigned features) {
  const unsigned missing = kernels.needs & ~features;
  return missing == 0 || (missing == kNeedAmxInt8 && request_tiles());
}

}  // namespace vllm_ext
