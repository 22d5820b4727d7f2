// SPDX-License-Identifier: Apache-2.0
// The table in use: the first that works, or a given one.
#pragma once

#include <atomic>

#include "kernels.h"

namespace vllm_ext {

class Choice {
 public:
  using Check = bool (*)(const Kernels&);

  // tables: the fastest first, null at the end; the last works on any machine.
  constexpr Choice(const Kernels* const* tables, Check works) : tables_(tables), works_(works) {}

  // Tables are tried at the first call, unless one was set before: who asks for a lesser set may do so because a better
  // one fails on the machine.
  const Kernels& current() {
    const Kernels* table = chosen_.load(std::memory_order_relaxed);
    if (!table) {
      const Kernels* const* best = tables_;
      while (best[1] && !works_(**best)) ++best;
      // Another thread may have set one meanwhile: that stays.
      if (chosen_.compare_exchange_strong(table, *best, std::memory_order_relaxed)) table = *best;
    }
    return *table;
  }

  void set(const Kernels& table) { chosen_.store(&table, std::memory_order_relaxed); }

 private:
  const Kernels* const* tables_;
  Check works_;
  std::atomic<const Kernels*> chosen_{nullptr};
};

}  // namespace vllm_ext
