// How sums over tokens or pixels are cut into parts, so that few programs still fill the device.
#pragma once

#include "core/problem.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

// How many parts a sum of so many steps is cut into, so that few programs still fill the device. Depends on nothing
// that changes between runs on one device, and neither do the results.
inline int splits_for(const Target& target, int64_t programs, int64_t steps) {
  int64_t splits = ceil_div(int64_t(2 * target.sm_count), programs > 0 ? programs : 1);
  if (splits > steps / 4) splits = steps / 4;
  return int(splits < 1 ? 1 : splits > 16 ? 16 : splits);
}

// How gradients of blocks are spread over the device.
struct GradientPlan {
  int64_t programs;  // chunks of blocks
  int splits;        // parts of the sum over `positions` tokens or pixels
  int64_t positions_per_split;

  size_t workspace(const Blocks& blocks) const {
    return splits == 1 ? 0 : sizeof(float) * size_t(splits * blocks.capacity * blocks.bi * blocks.bo);
  }
};

inline GradientPlan plan_gradient(const Target& target, const Blocks& blocks, int64_t positions) {
  constexpr int64_t kStep = 64;  // a whole number of steps of every tile
  GradientPlan plan;
  plan.programs = chunk_count(blocks.rows, blocks.capacity, int(128 / blocks.bi));
  if (plan.programs < 1) plan.programs = 1;  // who writes zeros
  const int64_t steps = ceil_div(positions, kStep);
  plan.splits = splits_for(target, plan.programs, steps);
  plan.positions_per_split = ceil_div(steps, int64_t(plan.splits)) * kStep;
  return plan;
}

}  // namespace dynaprune::cuda
