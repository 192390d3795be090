// Runs device code on the host: one host thread per CUDA thread, thread blocks one after another. What CUDA leaves
// undefined shows: shared memory starts as NaN, an asynchronous copy takes place only when it is waited for and leaves
// NaN until then, and ThreadSanitizer sees each missing barrier (see gate.h).
//
// Environment, read at each launch: DYN_EMULATION_WITHOUT=sync_block:2 makes the second sync_block of every thread in
// every thread block do nothing, sync_block:2@7 that of thread 7 only (any name of kWaitNames); slot lets every number
// pass for a slot (any name of kGuardNames);
// DYN_EMULATION_BLOCK_ORDER=reverse runs the last block first.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "emulation/thread_block.h"

namespace dynaprune::cuda::emulation {

// The emulated device: a pool of host threads that outlives launches.
class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  // Runs `kernel` in threads x grid threads. Throws what a kernel threw first, and std::runtime_error on a deadlock.
  void run(std::array<int, 3> grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

  // Passes a gate at which this thread has arrived in `phase`.
  template <Order order>
  void pass(Gate& gate, uint32_t phase) {
    self->asleep_for.store(phase, std::memory_order_relaxed);
    self->asleep_at.store(&gate, std::memory_order_relaxed);
    gate.wait<order>(phase, [this] {
      if (stopped_.load(std::memory_order_relaxed)) throw Stopped{};
    });
    self->asleep_at.store(nullptr, std::memory_order_relaxed);
  }
  template <Order order>
  void arrive_and_wait(Gate& gate) {
    pass<order>(gate, gate.arrive<order>());
  }

  // Counts a wait; true where this is the one that the test leaves out.
  bool left_out(Wait wait) {
    return ++self->waits[wait] == without_[wait] && (without_thread_ < 0 || without_thread_ == self->index);
  }

  bool left_out(Guard guard) const { return without_guard_ == guard; }

  CopyEngine& copy_engine() { return copy_engine_; }

 private:
  struct Stopped {};  // unwinds the other threads after an error

  ~Machine();
  void work(Thread& me);
  void run_blocks(Thread& me);
  void begin_block(int64_t number);
  void end_block();
  void read_environment();
  void stop(std::exception_ptr error);
  using Sleep = std::pair<const Gate*, uint32_t>;  // at a gate, until its phase is over
  std::vector<Sleep> all_asleep() const;
  bool deadlocked();

  std::mutex launching_;  // one launch at a time
  std::deque<Thread> threads_;
  std::vector<std::thread> pool_;
  CopyEngine copy_engine_;

  std::mutex mutex_;  // of what follows: launches, not what happens inside of one
  std::condition_variable begin_, end_;
  uint64_t launches_ = 0;
  int unfinished_ = 0;
  bool quit_ = false;
  std::exception_ptr error_;

  const std::function<void()>* kernel_ = nullptr;
  Block block_;
  Gate round_;  // all threads, before and after each thread block
  bool abandoned_ = false, reverse_ = false;
  std::array<uint32_t, kWaits> without_{};  // which of each kind, counted from 1
  int without_thread_ = -1;                 // all
  int without_guard_ = -1;                  // none
  std::atomic<bool> stopped_{false};
};

inline void Machine::run(std::array<int, 3> grid, int threads, size_t shared_bytes,
                         const std::function<void()>& kernel) {
  if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1) return;
  if (threads < 1 || threads > 1024) throw std::invalid_argument("a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > kLargestShared)
    throw std::invalid_argument(std::to_string(shared_bytes) + " bytes of shared memory");
  std::lock_guard one(launching_);
  read_environment();
  // Exactly as many bytes as asked for, so that AddressSanitizer sees the ends.
  const auto free_shared = [](unsigned char* memory) { ::operator delete(memory, std::align_val_t(1024)); };
  const std::unique_ptr<unsigned char, decltype(free_shared)> shared(
      static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t(1024))), free_shared);
  std::unique_lock lock(mutex_);
  block_.grid = grid;
  block_.threads = threads;
  block_.shared = shared.get();
  block_.shared_bytes = shared_bytes;
  block_.warps.resize(size_t((threads + kLanes - 1) / kLanes));
  round_.open(threads);
  kernel_ = &kernel;
  stopped_ = false;
  unfinished_ = threads;
  ++launches_;
  while (int(pool_.size()) < threads) {
    Thread& next = threads_.emplace_back();
    next.index = int(pool_.size());
    next.block = &block_;
    pool_.emplace_back([this, &next] { work(next); });
  }
  begin_.notify_all();
  while (!end_.wait_for(lock, std::chrono::milliseconds(200), [this] { return unfinished_ == 0; })) {
    if (stopped_ || !deadlocked()) continue;
    lock.unlock();
    stop(std::make_exception_ptr(std::runtime_error("deadlock: every thread waits at a barrier")));
    lock.lock();
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

inline Machine::~Machine() {
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
  }
  begin_.notify_all();
  for (std::thread& thread : pool_) thread.join();
}

inline void Machine::work(Thread& me) {
  self = &me;
  for (uint64_t seen = 0;;) {
    {
      std::unique_lock lock(mutex_);
      begin_.wait(lock, [&] { return quit_ || (seen != launches_ && me.index < block_.threads); });
      if (quit_) return;
      seen = launches_;
    }
    run_blocks(me);
    std::lock_guard lock(mutex_);
    if (--unfinished_ == 0) end_.notify_all();
  }
}

inline void Machine::run_blocks(Thread& me) {
  const auto meet_all = [this] { round_.wait<Order::memory>(round_.arrive<Order::memory>(), [] {}); };
  const int64_t blocks = int64_t(block_.grid[0]) * block_.grid[1] * block_.grid[2];
  for (int64_t number = 0; number < blocks; ++number) {
    if (me.index == 0) begin_block(reverse_ ? blocks - 1 - number : number);
    meet_all();
    if (abandoned_) return;
    me.begin_block();
    try {
      (*kernel_)();
    } catch (const Stopped&) {
    } catch (...) {
      stop(std::current_exception());
    }
    me.asleep_at.store(nullptr, std::memory_order_relaxed);
    block_.barrier.leave();
    me.warp().gate.leave();
    meet_all();
    if (me.index == 0) end_block();
  }
}

inline void Machine::begin_block(int64_t number) {
  abandoned_ = stopped_;
  const int64_t x = block_.grid[0], y = block_.grid[1];
  ++block_.run;
  block_.position = {int(number % x), int(number / x % y), int(number / x / y)};
  std::memset(block_.shared, 0xff, block_.shared_bytes);
  block_.barrier.open(block_.threads);
  for (size_t w = 0; w < block_.warps.size(); ++w)
    block_.warps[w].gate.open(std::min(kLanes, block_.threads - int(w) * kLanes));
  for (Gate& gate : block_.named) gate.open(0);
  block_.mbarriers_used = 0;
}

inline void Machine::end_block() try {
  if (copy_engine_.abandon() > 0 && !stopped_)
    throw std::logic_error("a block ended before its copies to shared memory");
} catch (...) {
  stop(std::current_exception());
}

inline void Machine::read_environment() {
  const char* order = std::getenv("DYN_EMULATION_BLOCK_ORDER");
  reverse_ = order && std::string(order) == "reverse";
  without_ = {};
  without_guard_ = -1;
  const char* without = std::getenv("DYN_EMULATION_WITHOUT");
  if (!without || !*without) return;
  const std::string text = without;
  for (int guard = 0; guard < kGuards; ++guard)
    if (text == kGuardNames[guard]) {
      without_guard_ = guard;
      return;
    }
  const size_t colon = text.find(':'), at = text.find('@');
  without_thread_ = at == std::string::npos ? -1 : std::stoi(text.substr(at + 1));
  for (int wait = 0; wait < kWaits && colon != std::string::npos; ++wait)
    if (text.substr(0, colon) == kWaitNames[wait]) {
      without_[size_t(wait)] = uint32_t(std::stoul(text.substr(colon + 1)));
      return;
    }
  throw std::invalid_argument("DYN_EMULATION_WITHOUT=" + text);
}

inline void Machine::stop(std::exception_ptr error) {
  std::lock_guard lock(mutex_);
  if (!error_) error_ = error;
  stopped_.store(true, std::memory_order_relaxed);
}

// Where the threads inside the kernel sleep if all of them do, at gates that are still closed; else nothing.
inline std::vector<Machine::Sleep> Machine::all_asleep() const {
  std::vector<Sleep> asleep;
  for (int index = 0; index < block_.threads; ++index) {
    const Thread& thread = threads_[size_t(index)];
    const Gate* gate = thread.asleep_at.load(std::memory_order_relaxed);
    if (!gate) continue;
    asleep.emplace_back(gate, thread.asleep_for.load(std::memory_order_relaxed));
    if (gate->state().phase != asleep.back().second) return {};
  }
  const int arrived = block_.threads - int(round_.state().pending);  // at the end of the block, or its beginning
  if (int(asleep.size()) + arrived != block_.threads) return {};
  return asleep;
}

// Whether nobody can go on. One look is not enough, since threads move and copies are carried out while it looks: but
// who sleeps in the same phase before and after has not moved. Called with the mutex held.
inline bool Machine::deadlocked() {
  const std::vector<Sleep> before = all_asleep();
  return !before.empty() && copy_engine_.idle() && before == all_asleep();
}

}  // namespace dynaprune::cuda::emulation
