// A gate opens for everybody who waits there once enough threads have arrived and enough bytes have been copied: block
// barriers, warp barriers, named barriers and mbarriers are gates.
//
// ThreadSanitizer must see the order between threads that CUDA promises and no more, or it would overlook a missing
// barrier. So threads sleep in the futex system call, which orders nothing (a mutex would also order threads that only
// arrive), and a phase has an atomic of its own that arriving releases and passing acquires: with the gate's state in
// that role, a thread that wakes late would also be ordered behind what the others did up to their next arrival.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <stdexcept>

namespace dynaprune::cuda::emulation {

enum class Order {
  memory,  // who passes sees what was written before the others arrived
  none,    // as for shuffles: threads meet, their writes stay unordered
};

class Gate {
 public:
  static constexpr uint32_t kPhases = 1024;  // the phase is counted modulo this

  struct State {
    uint32_t phase = 0, pending = 0, expected = 0;  // arrivals
    int32_t bytes = 0;                              // still to be copied
  };

  void open(int arrivals) { word_.store(pack({0, uint32_t(arrivals), uint32_t(arrivals), 0}), relaxed); }

  // Applies `edit` to the state, then begins the next phase if nothing is missing. Returns the phase before.
  template <Order order, class Edit>
  uint32_t change(const Edit& edit) {
    compiler_fence<order>();
    uint64_t seen = word_.load(relaxed), next;
    // The phase lasts at least until this arrival or these bytes are counted.
    if (kExact && order == Order::memory) arrived_[unpack(seen).phase % 2].fetch_add(1, std::memory_order_release);
    State before, after;
    do {
      before = after = unpack(seen);
      edit(after);
      if (after.pending == 0 && after.bytes == 0) {
        after.phase = (after.phase + 1) % kPhases;
        after.pending = after.expected;
      }
      next = pack(after);
    } while (!word_.compare_exchange_weak(seen, next, kReleasing, relaxed));
    if (after.phase != before.phase) wake_all();
    return before.phase;
  }

  template <Order order>
  uint32_t arrive() {
    return change<order>([](State& state) {
      if (state.pending == 0) throw std::logic_error("more threads arrived at a barrier than it expects");
      --state.pending;
    });
  }
  void leave() {  // a thread that returns from the kernel is not waited for any longer
    change<Order::none>([](State& state) { --state.pending, --state.expected; });
  }

  State state() const { return unpack(word_.load(relaxed)); }

  // Returns when `phase` is over; `pause` runs before each time the thread sleeps and may throw.
  template <Order order, class Pause>
  void wait(uint32_t phase, const Pause& pause) {
    for (uint64_t seen; unpack(seen = word_.load(kAcquiring)).phase == phase;) {
      pause();
      const timespec longest{0, 50'000'000};  // so that `pause` can notice that the launch is over
      futex(FUTEX_WAIT_PRIVATE, int(uint32_t(seen)), &longest);
    }
    if (kExact && order == Order::memory) arrived_[phase % 2].load(std::memory_order_acquire);
    compiler_fence<order>();
  }

 private:
  static constexpr std::memory_order relaxed = std::memory_order_relaxed;

  // The state orders nothing only where ThreadSanitizer looks; elsewhere the C++ memory model must hold too.
#ifdef __SANITIZE_THREAD__
  static constexpr bool kExact = true;
#else
  static constexpr bool kExact = false;
#endif
  static constexpr std::memory_order kReleasing = kExact ? relaxed : std::memory_order_release;
  static constexpr std::memory_order kAcquiring = kExact ? relaxed : std::memory_order_acquire;
  template <Order order>
  static void compiler_fence() {
    if (order == Order::none) std::atomic_signal_fence(std::memory_order_seq_cst);
  }

  // phase 10 bits, pending 11, expected 11 (what a sleeper watches), bytes 32
  static uint64_t pack(const State& s) {
    return uint64_t(uint32_t(s.bytes)) << 32 | s.expected << 21 | s.pending << 10 | s.phase;
  }
  static State unpack(uint64_t word) {
    return {uint32_t(word) & 1023, uint32_t(word) >> 10 & 2047, uint32_t(word) >> 21, int32_t(word >> 32)};
  }

  void wake_all() { futex(FUTEX_WAKE_PRIVATE, INT_MAX, nullptr); }
  void futex(int operation, int value, const timespec* longest) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && sizeof(word_) == 8, "the low half comes first");
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word_), operation, value, longest, nullptr, 0);
  }

  std::atomic<uint64_t> word_{0};
  std::atomic<uint32_t> arrived_[2] = {};  // by parity of the phase; nobody arrives two phases ahead of who still waits
};

}  // namespace dynaprune::cuda::emulation
