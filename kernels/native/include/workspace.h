// SPDX-License-Identifier: Apache-2.0
// Scratch memory that is kept from call to call: it only grows, so a steady state allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace vllm_ext {

// One growing buffer, handed out in 64-byte aligned parts. A call plans all its parts, then takes them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Forget all parts and have room for `num_bytes`.
  void reserve(int64_t num_bytes) {
    used_ = 0;
    if (num_bytes <= size_) return;
    std::free(data_);
    data_ = nullptr;
    // A quarter more: batches that grow by a token at a time shall not allocate each time.
    size_ = (num_bytes + num_bytes / 4 + 4095) / 4096 * 4096;
    data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<std::size_t>(size_)));
    if (!data_) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }

  template <class T>
  static constexpr int64_t part_bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(data_ + used_);
    used_ += part_bytes<T>(count);
    return part;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

// What one call works in. Two calls at once, from two threads, have one each.
struct Workspace {
  Scratch shared;
  std::vector<std::unique_ptr<Scratch>> lanes;

  void grow_lanes(int count) {
    while (static_cast<int>(lanes.size()) < count) lanes.push_back(std::make_unique<Scratch>());
  }
};

// Workspaces that no call holds. `Kind` derives from Workspace, or is it.
template <class Kind>
class WorkspacePool {
 public:
  class Lease {
   public:
    Lease(WorkspacePool& pool, std::unique_ptr<Kind> held) : pool_(pool), held_(std::move(held)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { pool_.give_back(std::move(held_)); }
    Kind& operator*() { return *held_; }
    Kind* operator->() { return held_.get(); }

   private:
    WorkspacePool& pool_;
    std::unique_ptr<Kind> held_;
  };

  Lease acquire() {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!free_.empty()) {
        // The one used last: its memory is still in the cache.
        std::unique_ptr<Kind> last = std::move(free_.back());
        free_.pop_back();
        return Lease(*this, std::move(last));
      }
    }
    return Lease(*this, std::make_unique<Kind>());
  }

 private:
  void give_back(std::unique_ptr<Kind> held) noexcept {
    const std::lock_guard<std::mutex> guard(mutex_);
    try {
      free_.push_back(std::move(held));
    } catch (const std::bad_alloc&) {
      // No room to remember it: it is freed here instead.
    }
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Kind>> free_;
};

}  // namespace vllm_ext
