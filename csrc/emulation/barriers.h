// Named barriers and mbarriers with byte counts, for kernels whose warps have different roles.
#pragma once

#include "emulation/runtime.h"

namespace dynaprune::cuda::emulation {

// bar.sync and bar.arrive: `threads` threads arrive at barrier `name` (1 to 15), some of them without waiting.
inline uint32_t arrive_named(int name, int threads) {
  if (name < 1 || name >= kNamedBarriers) fail(__FILE__, __LINE__, "no barrier " + std::to_string(name));
  return self->block->named[size_t(name)].change<Order::memory>([=](Gate::State& state) {
    if (state.pending == state.expected) state.pending = state.expected = uint32_t(threads);
    if (state.expected != uint32_t(threads)) fail(__FILE__, __LINE__, "threads disagree on the size of a barrier");
    --state.pending;
  });
}
inline void named_barrier_arrive(int name, int threads) { arrive_named(name, threads); }
inline void named_barrier_sync(int name, int threads) {
  Machine& machine = Machine::instance();
  if (machine.left_out(kNamedBarrier)) return named_barrier_arrive(name, threads);
  machine.pass<Order::memory>(self->block->named[size_t(name)], arrive_named(name, threads));
}

// An mbarrier is 8 bytes of shared memory that name one of the block's gates. Reading the name is an ordinary read:
// using an mbarrier before its initialisation is ordered is a race, as on the device.
constexpr uint64_t kMBarrierTag = uint64_t(0x6d626172) << 32;

inline void mbarrier_init(uint64_t* mbarrier, int arrivals) {
  check_shared(mbarrier, 8, 8);
  const uint32_t slot = self->block->mbarriers_used.fetch_add(1, std::memory_order_relaxed);
  if (slot >= uint32_t(kMBarriers)) fail(__FILE__, __LINE__, "too many mbarriers");
  self->block->mbarriers[slot].open(arrivals);
  *mbarrier = kMBarrierTag | slot;
}

inline MBarrier& mbarrier_at(const uint64_t* mbarrier) {
  check_shared(mbarrier, 8, 8);
  const uint64_t name = *mbarrier;
  if (name >> 32 != kMBarrierTag >> 32 || uint32_t(name) >= uint32_t(kMBarriers))
    fail(__FILE__, __LINE__, "not an mbarrier, or not yet initialised");
  return self->block->mbarriers[uint32_t(name)];
}

inline void mbarrier_arrive(uint64_t* mbarrier) { mbarrier_at(mbarrier).gate.arrive<Order::memory>(); }

// The present phase ends only after `bytes` more have been copied.
inline void mbarrier_expect_tx(uint64_t* mbarrier, int bytes) {
  mbarrier_at(mbarrier).gate.change<Order::memory>([=](Gate::State& state) { state.bytes += bytes; });
}
inline void mbarrier_arrive_expect_tx(uint64_t* mbarrier, int bytes) {
  mbarrier_at(mbarrier).gate.change<Order::memory>([=](Gate::State& state) {
    if (state.pending == 0) fail(__FILE__, __LINE__, "more threads arrived at an mbarrier than it expects");
    state.bytes += bytes;
    --state.pending;
  });
}

// Returns when the phase of that parity is over; the first phase has parity 0.
inline void mbarrier_wait(uint64_t* mbarrier, uint32_t parity) {
  Machine& machine = Machine::instance();
  if (machine.left_out(kMBarrierWait)) return;
  MBarrier& at = mbarrier_at(mbarrier);
  const uint32_t phase = at.gate.state().phase;
  if (phase % 2 == (parity & 1)) {
    machine.copy_engine().want(at, phase);
    machine.pass<Order::memory>(at.gate, phase);
  } else {
    machine.pass<Order::memory>(at.gate, (phase + Gate::kPhases - 1) % Gate::kPhases);
  }
}

// Starts copying `bytes` to shared memory; `copy` does it, once a thread waits for the mbarrier.
inline void copy_bulk(void* shared, int bytes, uint64_t* mbarrier, std::function<void()> copy) {
  check_shared(shared, size_t(bytes), 16);
  std::memset(shared, 0xff, size_t(bytes));  // from now on nobody may use what was there
  Machine::instance().copy_engine().issue(mbarrier_at(mbarrier), bytes, std::move(copy));
}

}  // namespace dynaprune::cuda::emulation
