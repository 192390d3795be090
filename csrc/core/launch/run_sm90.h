// From a problem to Hopper's kernels, what linear layers and convolutions share: tiles, grids, the weight's maps.
#pragma once

#include "core/kernels/product_sm90.h"
#include "core/kernels/sum_splits.h"
#include "core/kernels/wgrad_sm90.h"
#include "core/launch/tensor_map.h"
#include "core/launch/variants.h"
#include "core/scheduler/splits.h"

namespace dynaprune::cuda::sm90 {

constexpr int kWide = 128, kNarrow = 64;  // columns of a consumer's half of a tile

// What every problem needs of the device, the driver, the type and the blocks.
inline bool runs(const Target& target, DType dtype, const Blocks& blocks) {
  const auto fits = [](int64_t side) { return side == 64 || side == 128; };
  return target.capability == 90 && dtype != DType::f32 && fits(blocks.bi) && fits(blocks.bo) && blocks.capacity > 0 &&
         fits_int32(2 * blocks.capacity + blocks.rows) && has_tensor_maps();
}

// run(T{})
template <class Run>
cudaError_t by_type(DType dtype, const Run& run) {
  return dtype == DType::f16 ? run(Half{}) : run(BFloat16{});
}

inline int persistent_grid(const Target& target, int64_t items) {
  return int(items < target.sm_count ? items : target.sm_count);
}

template <class Rows, int OUTER, int WIDTH, class T, class Fill>
cudaError_t launch_product(const Target& target, DType dtype, const Blocks& blocks, int64_t count, int64_t inner_size,
                           const void* values, const Product<T>& product, const Fill& fill) {
  using Mainloop = Pipeline<T, OUTER, WIDTH, ProductItem>;
  constexpr int kBoxRows = Rows::kDgrad ? OUTER : kDepth;
#ifdef DYNAPRUNE_WATCHDOG
  if (const cudaError_t unarmed = arm_watchdog(); unarmed != cudaSuccess) return unarmed;
#endif
  Rows rows{};
  cudaError_t error = fill(rows, Mainloop::kColumns);
  if (error != cudaSuccess) return error;
  TensorMap values_map, ragged_map;
  Matrices weight{values, blocks.bo, blocks.bi, blocks.capacity, blocks.bo, blocks.bi * blocks.bo};
  error = make_tensor_map(values_map, dtype, weight, kBoxRows);
  if (error != cudaSuccess) return error;
  // Where no block is ragged, none is taken for it.
  const int64_t ragged = inner_size % (Rows::kDgrad ? blocks.bo : blocks.bi);
  if (ragged != 0) (Rows::kDgrad ? weight.width : weight.height) = ragged;
  error = make_tensor_map(ragged_map, dtype, weight, kBoxRows);
  if (error != cudaSuccess) return error;
  const int64_t items = ceil_div(count, int64_t(Mainloop::kColumns)) * (Rows::kDgrad ? blocks.lists : blocks.rows);
  return launch(product_sm90_kernel<T, Rows, OUTER, WIDTH>, {unsigned(persistent_grid(target, items))}, kThreads,
                Mainloop::kSharedBytes, target.stream, rows, values_map, ragged_map, product);
}

// Forward and dgrad. `count` rows in the largest list, `inner_size` summed channels; fill(rows, height) makes the rows'
// maps for tiles of so many.
template <class Rows, class T, class Fill>
cudaError_t run_product(const Target& target, DType dtype, const Blocks& blocks, int64_t count, int64_t inner_size,
                        const void* values, const Product<T>& product, const Fill& fill) {
  const int64_t outer = Rows::kDgrad ? blocks.bi : blocks.bo, lists = Rows::kDgrad ? blocks.lists : blocks.rows;
  // Where there are few wide tiles, narrow ones keep more of the device busy.
  const bool narrow = ceil_div(count, int64_t(kConsumers * kWide)) * lists < target.sm_count;
  const auto run = [&](auto kernel) {
    return kernel(target, dtype, blocks, count, inner_size, values, product, fill);
  };
  if (outer == 128)
    return narrow ? run(launch_product<Rows, 128, kNarrow, T, Fill>) : run(launch_product<Rows, 128, kWide, T, Fill>);
  return narrow ? run(launch_product<Rows, 64, kNarrow, T, Fill>) : run(launch_product<Rows, 64, kWide, T, Fill>);
}

inline GradientPlan plan_wgrad(const Target& target, const Blocks& blocks, int64_t rows) {
  GradientPlan plan = plan_gradient(target, blocks, rows);
  plan.programs = chunk_count(blocks.rows, blocks.capacity, int(kConsumers * kWide / blocks.bi));
  plan.splits = splits_for(target, plan.programs, ceil_div(rows, int64_t(kDepth)));
  return plan;
}

template <int OUTER, class T, class Inputs>
cudaError_t launch_wgrad(const Target& target, const Inputs& x, const TensorMap& dy, const Gradient<T>& gradient) {
  using Mainloop = Pipeline<T, OUTER, kWide, GradientItem>;
#ifdef DYNAPRUNE_WATCHDOG
  if (const cudaError_t unarmed = arm_watchdog(); unarmed != cudaSuccess) return unarmed;
#endif
  return launch(wgrad_sm90_kernel<T, Inputs, OUTER>,
                {unsigned(persistent_grid(target, int64_t(gradient.programs) * gradient.splits))}, kThreads,
                Mainloop::kSharedBytes, target.stream, x, dy, gradient);
}

// Wgrad and its saliency. dy: [rows][outputs]; `tap_columns` block columns of one tap (of a linear layer all of them)
// hold `inner_size` inputs.
template <class T, class Inputs>
cudaError_t run_wgrad(const Target& target, DType dtype, const Blocks& blocks, const Inputs& x, const Matrices& dy,
                      int64_t tap_columns, int64_t inner_size, const T* values, T* dvalues, float* wg,
                      void* workspace) {
  TensorMap dy_map;
  cudaError_t error = make_tensor_map(dy_map, dtype, dy, kDepth);
  if (error != cudaSuccess) return error;
  const GradientPlan plan = plan_wgrad(target, blocks, dy.height);
  float* partial = plan.splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const Gradient<T> gradient{view_of(blocks),
                             int(dy.height),
                             int(dy.width),
                             log_of_width(blocks.bi),
                             int(plan.programs),
                             plan.splits,
                             partial,
                             dvalues,
                             values,
                             wg};
  error = blocks.bo == 128 ? launch_wgrad<128>(target, x, dy_map, gradient)
                           : launch_wgrad<64>(target, x, dy_map, gradient);
  if (error != cudaSuccess || partial == nullptr) return error;
  const SplitSums sums{partial,    plan.splits, int(blocks.bi), int(blocks.bo), int(tap_columns),
                       inner_size, dy.width};
  return sum_splits<T>(target, gradient.view, sums, values, dvalues, wg);
}

}  // namespace dynaprune::cuda::sm90
