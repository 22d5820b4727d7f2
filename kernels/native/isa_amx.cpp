// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX-512 with VNNI and AMX: tiles above four rows.
#include "amx.h"
#include "table.h"

namespace vllm_ext {
namespace {

constexpr Kernels make_amx_table() {
  Kernels table = make_table<Avx512>("amx", kNeedAvx512Vnni | kNeedAmxInt8);
  table.enter = enter_with_tiles;
  table.leave = leave_with_tiles;
  table.multiply_records = multiply_records_amx;
  return table;
}

}  // namespace

constinit const Kernels kAmxKernels = make_amx_table();

}  // namespace vllm_ext
