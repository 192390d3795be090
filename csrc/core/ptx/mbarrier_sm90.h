// Hopper's barriers under names: mbarriers, named barriers and register reallocation. The PTX needs sm_90a; the other
// branch is what the host emulation runs.
#pragma once

#include <cstdint>

#include "core/ptx/watchdog_sm90.h"

#ifdef DYN_EMULATION
#include "emulation/barriers.h"
#endif

namespace dynaprune::cuda::sm90 {

constexpr int kWarpgroup = 128;        // threads; warpgroups start at multiples of four warps

// mbarriers: a phase ends when all arrivals came and all expected bytes were copied. wait(parity) returns when the
// phase of that parity has ended; on a fresh barrier, wait(1) returns at once.

#ifdef DYN_EMULATION

DYN_DEVICE uint32_t shared_address(const void* shared) {
  emulation::check_shared(shared, 1, 1);
  return uint32_t(static_cast<const unsigned char*>(shared) - shared_memory());
}

DYN_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) { emulation::mbarrier_init(barrier, arrivals); }
DYN_DEVICE void mbarrier_init_fence() {}
DYN_DEVICE void mbarrier_arrive(uint64_t* barrier) { emulation::mbarrier_arrive(barrier); }
DYN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  emulation::mbarrier_arrive_expect_tx(barrier, bytes);
}
DYN_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulation::mbarrier_wait(barrier, parity); }

// Among `threads` threads that name the same barrier, 1 .. 15.
DYN_DEVICE void named_barrier_sync(int name, int threads) { emulation::named_barrier_sync(name, threads); }

template <int REGISTERS>
DYN_DEVICE void warpgroup_reg_alloc() {}
template <int REGISTERS>
DYN_DEVICE void warpgroup_reg_dealloc() {}

#else

DYN_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

DYN_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers known to the copy engine; sync_block() follows.
DYN_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DYN_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DYN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

DYN_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
#ifdef DYNAPRUNE_WATCHDOG
  const long long began = clock64();
#endif
  do {  // try_wait sleeps for a while before it answers no
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#ifdef DYNAPRUNE_WATCHDOG
    if (ended == 0 && clock64() - began > kPatience) bite(shared_address(barrier), parity);
#endif
  } while (ended == 0);
}

DYN_DEVICE void named_barrier_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Registers per thread of the calling warpgroup, a multiple of 8 ("setmaxnreg"): more, and fewer.
template <int REGISTERS>
DYN_DEVICE void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DYN_DEVICE void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

}  // namespace dynaprune::cuda::sm90
