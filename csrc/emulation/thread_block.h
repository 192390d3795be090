// A thread block on the host: its threads, their warps, its shared memory and its barriers.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation/copy_engine.h"
#include "emulation/gate.h"
#include "emulation/left_out.h"

namespace dynaprune::cuda::emulation {

constexpr int kLanes = 32, kNamedBarriers = 16, kMBarriers = 256;
constexpr size_t kLargestShared = 227 * 1024;

// Actions that a thread starts now and that take place when it waits for them, in groups.
class AsyncGroups {
 public:
  void add(std::function<void()> action) { open_.push_back(std::move(action)); }
  void commit() { groups_.push_back(std::exchange(open_, {})); }
  void wait(size_t pending) {  // until at most that many groups are pending
    for (; groups_.size() > pending; groups_.pop_front())
      for (const auto& action : groups_.front()) action();
  }
  void clear() { open_.clear(), groups_.clear(); }

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};

struct Warp {
  static constexpr int kWords = 64;  // that a lane can show the others
  Gate gate;
  std::array<std::array<std::atomic<uint32_t>, kWords>, kLanes> shown[2];  // by turns
};

struct Block {
  int threads = 0;
  std::array<int, 3> grid{}, position{};
  uint32_t run = 0;  // thread blocks so far, over all launches
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Gate barrier;
  std::deque<Warp> warps;
  std::array<Gate, kNamedBarriers> named;
  std::array<MBarrier, kMBarriers> mbarriers;
  std::atomic<uint32_t> mbarriers_used{0};
};

struct Thread {
  int index = 0;
  Block* block = nullptr;
  uint32_t exchanges = 0;
  std::array<uint32_t, kWaits> waits{};  // how often it has waited so far
  AsyncGroups copies, stores, products;
  std::atomic<const Gate*> asleep_at{nullptr};
  std::atomic<uint32_t> asleep_for{0};  // the phase that it waits for the end of

  void begin_block() {
    exchanges = 0;
    waits = {};
    copies.clear(), stores.clear(), products.clear();
  }
  Warp& warp() const { return block->warps[size_t(index / kLanes)]; }
};

inline thread_local Thread* self = nullptr;

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  if (!self) throw std::logic_error(what);
  const auto& at = self->block->position;
  throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": " + what + " (thread " +
                         std::to_string(self->index) + " of block " + std::to_string(at[0]) + ", " +
                         std::to_string(at[1]) + ", " + std::to_string(at[2]) + ")");
}

}  // namespace dynaprune::cuda::emulation
