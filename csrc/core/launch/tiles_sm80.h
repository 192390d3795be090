// What the sm_80 launchers of linear layers and convolutions share: the tile of a thread block, and sums in parts.
#pragma once

#include "core/kernels/sum_splits.h"
#include "core/launch/variants.h"
#include "core/mainloop/product_sm80.h"
#include "core/mainloop/wgrad_sm80.h"
#include "core/scheduler/splits.h"

namespace dynaprune::cuda {

// start(ProductTile{}, row tiles, log_inner) of a product of `positions` tokens or pixels with each of `lists`; its
// grid has one thread block per row tile and list.
template <bool DGRAD, class Start>
cudaError_t with_product_tile(const Target& target, DType dtype, Precision precision, const Blocks& blocks,
                              int64_t positions, int64_t lists, const Start& start) {
  const int log_inner = log_of_width(DGRAD ? blocks.bo : blocks.bi);
  // Where there are few tiles, smaller ones keep more of the device busy.
  const bool small = positions <= 64 || ceil_div(positions, int64_t(128)) * lists < 2 * target.sm_count;
  const int64_t row_tiles = ceil_div(positions, int64_t(small ? 64 : 128));
  if (log_inner < 0 || !fits_int32(row_tiles * lists) ||
      !fits_int32(blocks.capacity << log_inner))  // a wrong index may make a list so long
    return cudaErrorInvalidValue;
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    return with_width(DGRAD ? blocks.bi : blocks.bo, [&](auto width) {
      using T = typename decltype(arithmetic)::Element;
      constexpr int kProducts = decltype(arithmetic)::kProducts, kWidth = decltype(width)::value;
      return small ? start(ProductTile<T, 64, kWidth, kProducts, DGRAD>{}, row_tiles, log_inner)
                   : start(ProductTile<T, 128, kWidth, kProducts, DGRAD>{}, row_tiles, log_inner);
    });
  });
}

// Where a weight gradient goes: wgrad's arguments of launchers.h.
struct GradientTarget {
  const void* values;
  void* dvalues;
  float* wg;
  void* workspace;
};

// Sizes of a weight, as SplitSums has them.
struct WeightSizes {
  int channel_blocks;
  int64_t inner_size, outer_size;
};

// start(GradientTile{}, plan, log_bi, output), and the sum of the parts where the plan cuts the sum over `positions`.
template <class Start>
cudaError_t with_gradient_tile(const Target& target, DType dtype, Precision precision, const Blocks& blocks,
                               int64_t positions, const WeightSizes& weight, const GradientTarget& to,
                               const Start& start) {
  const int log_bi = log_of_width(blocks.bi);
  const GradientPlan plan = log_bi < 0 ? GradientPlan{} : plan_gradient(target, blocks, positions);
  if (log_bi < 0 || !fits_int32(plan.programs)) return cudaErrorInvalidValue;
  float* partial = plan.splits == 1 ? nullptr : static_cast<float*>(to.workspace);
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    return with_width(blocks.bo, [&](auto width) {
      using T = typename decltype(arithmetic)::Element;
      using Tile = GradientTile<T, decltype(width)::value, decltype(arithmetic)::kProducts>;
      const GradientOutput<T> output{partial, static_cast<T*>(to.dvalues), static_cast<const T*>(to.values), to.wg};
      const cudaError_t started = start(Tile{}, plan, log_bi, output);
      if (started != cudaSuccess || plan.splits == 1) return started;
      const SplitSums sums{partial,           plan.splits, int(blocks.bi), int(blocks.bo), weight.channel_blocks,
                           weight.inner_size, weight.outer_size};
      return sum_splits(target, view_of(blocks), sums, output.values, output.dvalues, to.wg);
    });
  });
}

}  // namespace dynaprune::cuda
