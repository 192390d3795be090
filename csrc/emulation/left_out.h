// What a test can leave out of a kernel, by name: one wait, or the comparison of one kind of number.
#pragma once

namespace dynaprune::cuda::emulation {

enum Wait { kSyncBlock, kSyncWarp, kWaitCopies, kWaitStores, kWaitProducts, kNamedBarrier, kMBarrierWait, kWaits };
constexpr const char* kWaitNames[kWaits] = {"sync_block",    "sync_warp",     "wait_copies",  "wait_stores",
                                            "wait_products", "named_barrier", "mbarrier_wait"};

// What is compared before it is used (core/scheduler/packed_index.h).
enum Guard {
  kGuardOrder,
  kGuardPointers,
  kGuardEntry,
  kGuardSlot,
  kGuardBlock,
  kGuardRow,
  kGuardColumn,
  kGuardPlace,
  kGuards
};
constexpr const char* kGuardNames[kGuards] = {"order", "pointers", "entry", "slot", "block", "row", "column", "place"};

}  // namespace dynaprune::cuda::emulation
