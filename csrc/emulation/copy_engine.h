// Copies that a thread starts and an mbarrier announces (TMA). A thread of its own carries them out, and only when
// somebody waits for that mbarrier: who forgets to wait finds the poison that was there before.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "emulation/gate.h"

namespace dynaprune::cuda::emulation {

struct MBarrier {
  Gate gate;
  std::atomic<uint32_t> wanted{0};  // 1 + the phase that a thread waits for the end of

  void open(int arrivals) {
    gate.open(arrivals);
    wanted.store(0, std::memory_order_relaxed);
  }
};

class CopyEngine {
 public:
  CopyEngine() {
    news_.open(1);
    worker_ = std::thread([this] { work(); });
  }
  ~CopyEngine() {
    {
      std::lock_guard lock(mutex_);
      quit_ = true;
    }
    news_.arrive<Order::none>();
    worker_.join();
  }

  // `copy` will run, then `bytes` of the mbarrier's present phase are there.
  void issue(MBarrier& mbarrier, int bytes, std::function<void()> copy) {
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back({&mbarrier, bytes, std::move(copy)});
    }
    news_.arrive<Order::none>();
  }

  void want(MBarrier& mbarrier, uint32_t phase) {
    // A thread that is slow to say what it wants must not hide the next phase, which others may already wait for.
    const auto is_older = [phase](uint32_t wanted) {
      return wanted == 0 || (wanted - (phase + 1)) % Gate::kPhases > Gate::kPhases / 2;
    };
    uint32_t seen = mbarrier.wanted.load(std::memory_order_relaxed);
    while (is_older(seen) &&
           !mbarrier.wanted.compare_exchange_weak(seen, phase + 1, std::memory_order_relaxed)) {
    }
    news_.arrive<Order::none>();
  }

  // Whether nothing is being copied and nothing that waits is due.
  bool idle() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return false;  // held while it copies
    for (const Job& job : jobs_)
      if (due(job)) return false;
    return true;
  }

  // At the end of a thread block: forgets the copies that nobody waited for and says how many there were.
  size_t abandon() {
    std::lock_guard lock(mutex_);
    const size_t left = jobs_.size();
    jobs_.clear();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return left;
  }

 private:
  struct Job {
    MBarrier* mbarrier;
    int bytes;
    std::function<void()> copy;
  };

  static bool due(const Job& job) {
    return job.mbarrier->wanted.load(std::memory_order_relaxed) == job.mbarrier->gate.state().phase + 1;
  }

  void work() {
    for (;;) {
      const uint32_t news = news_.state().phase;
      bool worked = false;
      {
        std::lock_guard lock(mutex_);
        if (quit_) return;
        for (auto job = jobs_.begin(); job != jobs_.end();) {
          if (!due(*job)) {
            ++job;
            continue;
          }
          worked = true;
          try {
            job->copy();
          } catch (...) {
            error_ = std::current_exception();
          }
          const int bytes = job->bytes;
          job->mbarrier->gate.change<Order::memory>([bytes](Gate::State& state) { state.bytes -= bytes; });
          job = jobs_.erase(job);
        }
      }
      if (!worked) news_.wait<Order::none>(news, [] {});
    }
  }

  std::mutex mutex_;  // orders the threads that start copies behind the engine, nobody else
  std::deque<Job> jobs_;
  std::exception_ptr error_;
  bool quit_ = false;
  Gate news_;
  std::thread worker_;
};

}  // namespace dynaprune::cuda::emulation
