// A watchdog over waits for mbarriers, in builds with DYNAPRUNE_WATCHDOG: after about two seconds the kernel ends with an
// error, and the process says where it waited when it exits. For the first contact with a GPU, where a kernel that never
// ends would take the rented time along. No call and no printf in the kernel: either would keep setmaxnreg from working.
#pragma once

#include "core/device.h"

#ifdef DYNAPRUNE_WATCHDOG

#include <cstdio>
#include <cstdlib>

namespace dynaprune::cuda::sm90 {

constexpr long long kPatience = 3'000'000'000;  // cycles

struct Bite {
  int block, thread;
  unsigned barrier, parity;  // byte offset in shared memory, and the phase that did not end
};

static __device__ Bite* bite_of_this_file;  // in the host's memory, which outlives an error of the device

DYN_DEVICE void bite(uint32_t barrier, uint32_t parity) {
  volatile Bite* bite = bite_of_this_file;
  bite->thread = int(threadIdx.x);
  bite->barrier = barrier;
  bite->parity = parity;
  bite->block = int(blockIdx.x);
  __threadfence_system();
  asm volatile("trap;");
}

// Before the first launch of a file's kernels.
static cudaError_t arm_watchdog() {
  static Bite* seen = nullptr;
  if (seen != nullptr) return cudaSuccess;
  cudaError_t error = cudaHostAlloc(reinterpret_cast<void**>(&seen), sizeof(Bite), cudaHostAllocMapped);
  if (error != cudaSuccess) return error;
  *seen = {-1, 0, 0, 0};
  std::atexit([] {
    if (seen->block >= 0)
      std::fprintf(stderr, "watchdog: block %d thread %d waited for parity %u of the barrier at %u\n", seen->block,
                   seen->thread, seen->parity, seen->barrier);
  });
  return cudaMemcpyToSymbol(bite_of_this_file, &seen, sizeof seen);
}

}  // namespace dynaprune::cuda::sm90

#endif
