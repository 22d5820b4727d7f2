// SPDX-License-Identifier: Apache-2.0
// Flush denormals to zero while a thread works: one costs as much as a hundred normal products.
#pragma once

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace vllm_ext {

static ThreadState enter_flushing() {
#if defined(__x86_64__) || defined(_M_X64)
  // Results (bit 15) and operands (bit 6).
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040u);
  return {saved};
#else
  return {0};
#endif
}

static void leave_flushing([[maybe_unused]] ThreadState state) {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_setcsr(state.control);
#endif
}

}  // namespace vllm_ext
