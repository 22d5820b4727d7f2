// SPDX-License-Identifier: Apache-2.0
// Tasks of unequal size on the threads of torch's pool.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>

#include "blocks.h"

namespace vllm_ext {

// Calls function(task, lane) for all tasks [0, count), each lane taking the next when it is done with its last. Lane
// is below `lanes`; where torch runs the region on one thread, that thread takes all tasks.
template <class Function>
void run_tasks(const Kernels& kernels, int64_t count, int lanes, const Function& function) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(lanes, count), 1, [&](int64_t begin, int64_t end) {
    const ThreadScope scope(kernels);
    for (int64_t lane = begin; lane < end; ++lane) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        function(task, static_cast<int>(lane));
      }
    }
  });
}

}  // namespace vllm_ext
