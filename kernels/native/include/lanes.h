// SPDX-License-Identifier: Apache-2.0
// Tasks of unequal size, in stages, on the threads of torch's pool: one parallel region for all stages, for to wake the
// threads of a pool can take longer than the work on one token.
//
// Each lane begins a stage with a slice of consecutive tasks: it reads weights that lie one after the other, and what
// it loads ahead is what it needs next. A lane that is done takes tasks from the end of another's slice, backwards.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <type_traits>

#include "blocks.h"

namespace vllm_ext {

// function(task, lane) or function(task, next, lane) for the tasks [0, count), fewer than 2**32. `next` is what the lane
// is likely to do after it: a neighbour, or the task itself where that has none.
template <class Function>
struct Stage {
  int64_t count;
  Function function;
  const int64_t* ends = nullptr;  // of the slices of count_slices(lanes) lanes; null: slices of equal length
};
template <class Function>
Stage(int64_t, Function, const int64_t* = nullptr) -> Stage<Function>;

// More lanes share slices.
constexpr int64_t kMaxSlices = 64;

static inline int64_t count_slices(int lanes) { return std::min<int64_t>(lanes, kMaxSlices); }

// Tasks [begin, end) that nobody has taken, in one word: both ends change at once.
class alignas(64) Slice {
 public:
  void fill(int64_t begin, int64_t end) { range_.store(join(begin, end), std::memory_order_relaxed); }

  // A task of the slice, or -1 where none is left.
  int64_t take(bool from_end) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = static_cast<uint32_t>(range), end = static_cast<int64_t>(range >> 32);
      if (begin >= end) return -1;
      const uint64_t rest = from_end ? join(begin, end - 1) : join(begin + 1, end);
      if (range_.compare_exchange_weak(range, rest, std::memory_order_relaxed)) return from_end ? end - 1 : begin;
    }
  }

 private:
  static uint64_t join(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(end) << 32 | static_cast<uint32_t>(begin);
  }

  std::atomic<uint64_t> range_{0};
};

// The tasks of a stage: which are taken, how many are done.
class StageQueue {
 public:
  void fill(int64_t count, int lanes, const int64_t* ends) {
    count_ = count;
    slices_ = count_slices(lanes);
    for (int64_t i = 0, begin = 0; i < slices_; ++i) {
      const int64_t end = ends ? ends[i] : count * (i + 1) / slices_;
      left_[static_cast<size_t>(i)].fill(begin, end);
      begin = end;
    }
  }

  // Returns when all tasks of the stage are done. Waits for tasks only that a running thread has taken: where torch
  // runs all lanes on one thread, the first does everything.
  template <class Function>
  void work(int lane, const Function& function) {
    for (int64_t i = 0; i < slices_; ++i) {
      Slice& slice = left_[static_cast<size_t>((lane + i) % slices_)];
      for (int64_t task; (task = slice.take(/*from_end=*/i > 0)) >= 0;) {
        const CountDone done(*this);
        if constexpr (std::is_invocable_v<const Function&, int64_t, int64_t, int>) {
          function(task, std::clamp<int64_t>(i > 0 ? task - 1 : task + 1, 0, count_ - 1), lane);
        } else {
          function(task, lane);
        }
      }
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < count_; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  // Some tens of microseconds: as long as most tasks.
  static constexpr int kSpins = 2000;

  // Also of a task that throws, or other lanes would wait for ever.
  class CountDone {
   public:
    explicit CountDone(StageQueue& queue) : queue_(queue) {}
    CountDone(const CountDone&) = delete;
    CountDone& operator=(const CountDone&) = delete;
    ~CountDone() { queue_.done_.fetch_add(1, std::memory_order_release); }

   private:
    StageQueue& queue_;
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::array<Slice, kMaxSlices> left_;
  int64_t count_ = 0, slices_ = 0;
  alignas(64) std::atomic<int64_t> done_{0};
};

// Runs the stages one after the other, each lane (below `lanes`) on a thread of its own where torch has one.
template <class... Functions>
void run_stages(const Kernels& kernels, int lanes, const Stage<Functions>&... stages) {
  std::array<StageQueue, sizeof...(stages)> queues;
  size_t filled = 0;
  (queues[filled++].fill(stages.count, lanes, stages.ends), ...);
  at::parallel_for(0, lanes, 1, [&](int64_t first_lane, int64_t last_lane) {
    const ThreadScope scope(kernels);
    for (int64_t lane = first_lane; lane < last_lane; ++lane) {
      size_t stage = 0;
      (queues[stage++].work(static_cast<int>(lane), stages.function), ...);
    }
  });
}

}  // namespace vllm_ext
