// The pipeline of asynchronous copies that feeds the products.
#pragma once

#include "core/ptx/sm80.h"

namespace dynaprune::cuda {

// Steps 0 .. steps - 1: copy(step, stage) starts the copies into a stage, consume(stage) uses it; STAGES - 1 steps are
// under way at once. Afterwards other threads may still be reading the last stage.
template <int STAGES, class Copy, class Consume>
DYN_DEVICE void pipeline(int steps, Copy copy, Consume consume) {
  DYN_UNROLL
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) copy(step, step);
    cp_async_commit();
  }
  int stage = 0, free = STAGES - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    sync_block();  // the step has arrived for every thread, and all have left the stage used before it
    if (step + STAGES - 1 < steps) copy(step + STAGES - 1, free);
    cp_async_commit();  // an empty group too: the count of groups is the clock
    consume(stage);
    free = stage;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
}

}  // namespace dynaprune::cuda
