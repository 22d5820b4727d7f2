// SPDX-License-Identifier: Apache-2.0
// Whether two tables give the same bits: asked before AMX is used, whose failures under hypervisors are silent.
#pragma once

#include <vector>

#include "kernels.h"

namespace vllm_ext {

static inline bool agree(const Kernels& kernels, const Kernels& trusted) {
  constexpr int kTokens = 37, kChunks = 2;
  uint32_t state = 1;
  const auto draw = [&state] {
    state = state * 1664525u + 1013904223u;
    return static_cast<uint8_t>(state >> 24);
  };
  for (int bits : {2, 3, 4, 5, 6, 8}) {
    for (int headers : {1, 2, 4}) {
      const auto size = static_cast<std::size_t>(record_bytes(bits, headers));
      std::vector<uint8_t> weight(2 * kChunks * size);
      for (uint8_t& byte : weight) byte = draw();
      for (std::size_t record = 0; record < weight.size(); record += size) {
        for (int i = 0; i < headers * kRows; ++i) {
          // fp16: scales in [1, 2), zero points 0 or 1.
          uint8_t* header = &weight[record + static_cast<std::size_t>(kLine * (i / kRows) + 2 * (i % kRows))];
          header[1] = 0x3c;
          header[kLine / 2] = 0;
          header[kLine / 2 + 1] = i % 3 ? 0x3c : 0;
        }
      }
      for (int planes : {1, 2}) {
        // 16 more rows: tiles are loaded whole.
        std::vector<int8_t> codes(static_cast<std::size_t>((kChunks * kTokens * planes + 16) * kDepth));
        for (int8_t& code : codes) code = static_cast<int8_t>(draw() % 255 - 127);
        const std::vector<float> factors(static_cast<std::size_t>(kChunks * headers * kTokens), 0.5f);
        std::vector<float> out[2];
        for (int i = 0; i < 2; ++i) {
          out[i].resize(kTokens * 2 * kRows);
          const Kernels& table = i ? trusted : kernels;
          const Activations x{codes.data(), factors.data(), factors.data(), kTokens * planes * kDepth,
                              kTokens,      kTokens,        planes};
          const ThreadState saved = table.enter();
          table.multiply_records(
              {{weight.data(), weight.data() + kChunks * size}, weight.data(), bits, headers, kChunks, x, out[i].data()});
          table.leave(saved);
        }
        if (out[0] != out[1]) return false;
      }
    }
  }
  return true;
}

}  // namespace vllm_ext
