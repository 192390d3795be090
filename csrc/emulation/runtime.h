// What device code calls where it runs on host threads: barriers, exchanges between the lanes of a warp, asynchronous
// copies, and the types that CUDA's headers would define.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/machine.h"
#include "emulation/number_types.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
typedef struct CUstream_st* cudaStream_t;

namespace dynaprune::cuda::emulation {

inline void sync_block() {
  Machine& machine = Machine::instance();
  if (!machine.left_out(kSyncBlock)) machine.arrive_and_wait<Order::memory>(self->block->barrier);
}

inline void sync_warp() {
  Machine& machine = Machine::instance();
  if (!machine.left_out(kSyncWarp)) machine.arrive_and_wait<Order::memory>(self->warp().gate);
}

inline bool left_out(Guard guard) { return Machine::instance().left_out(guard); }

// What the lanes of a warp showed each other, until this lane's next exchange.
template <class T>
class Exchanged {
 public:
  static constexpr size_t kWords = (sizeof(T) + 3) / 4;
  static_assert(std::is_trivially_copyable_v<T> && kWords <= Warp::kWords);
  Exchanged(Warp& warp, int side) : shown_(warp.shown[side].data()) {}
  T operator[](int lane) const {
    uint32_t words[kWords];
    for (size_t w = 0; w < kWords; ++w) words[w] = shown_[lane][w].load(std::memory_order_relaxed);
    T value;
    std::memcpy(&value, words, sizeof value);
    return value;
  }

 private:
  const std::array<std::atomic<uint32_t>, Warp::kWords>* shown_;
};

// Every lane of the warp shows `mine` and can read the others': what shuffles and matrix instructions are made of.
template <class T>
inline Exchanged<T> exchange(const T& mine) {
  Warp& warp = self->warp();
  const int side = int(self->exchanges++ % 2);  // nobody gets two exchanges ahead of a lane that still reads
  uint32_t words[Exchanged<T>::kWords] = {};
  std::memcpy(words, &mine, sizeof mine);
  for (size_t w = 0; w < Exchanged<T>::kWords; ++w)
    warp.shown[side][size_t(self->index % kLanes)][w].store(words[w], std::memory_order_relaxed);
  Machine::instance().arrive_and_wait<Order::none>(warp.gate);
  return Exchanged<T>(warp, side);
}

inline uint32_t ballot(bool vote) {
  struct Vote {
    uint32_t run, exchange, vote;  // where it was cast: a lane that has returned shows an older one
  } const mine{self->block->run, self->exchanges, vote};
  const Exchanged<Vote> votes = exchange(mine);
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Vote other = votes[lane];
    if (other.run == mine.run && other.exchange == mine.exchange) result |= other.vote << lane;
  }
  return result;
}

// Throws unless `bytes` from `address` on are shared memory of this block, and aligned.
inline void check_shared(const void* address, size_t bytes, size_t alignment) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(self->block->shared), at = reinterpret_cast<uintptr_t>(address);
  if (at < begin || at + bytes > begin + self->block->shared_bytes)
    fail(__FILE__, __LINE__, "an address outside shared memory");
  if (at % alignment != 0) fail(__FILE__, __LINE__, "a misaligned address in shared memory");
}

// cp.async: `bytes` to shared memory; those from `valid` on arrive as zeros and are not read.
inline void copy_async(void* shared, const void* global, size_t bytes, size_t valid) {
  check_shared(shared, bytes, bytes);
  if (valid > bytes) fail(__FILE__, __LINE__, "more bytes to read than to write");
  if (valid > 0 && reinterpret_cast<uintptr_t>(global) % bytes != 0) fail(__FILE__, __LINE__, "a misaligned address");
  std::memset(shared, 0xff, bytes);  // from now on nobody may use what was there
  self->copies.add([=] {
    if (valid > 0) std::memcpy(shared, global, valid);
    std::memset(static_cast<char*>(shared) + valid, 0, bytes - valid);
  });
}
inline void commit_copies() { self->copies.commit(); }
inline void wait_copies(int pending) {
  if (!Machine::instance().left_out(kWaitCopies)) self->copies.wait(size_t(pending));
}

}  // namespace dynaprune::cuda::emulation
