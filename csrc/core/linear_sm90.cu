// Launchers of the Hopper kernels of linear layers: tiles, grids, tensor maps.
#include "core/linear_sm90.h"

#include "core/linear_sm90_launch.h"
#include "core/sum_splits.h"
#include "core/tensor_map.h"
#include "core/variants.h"

namespace dynaprune::cuda {
namespace {

using sm90::make_tensor_map;
using sm90::TensorMap;

constexpr int kWide = 128, kNarrow = 64;  // columns of a consumer's half of a tile

int persistent_grid(const Target& target, int64_t items) {
  return int(items < target.sm_count ? items : target.sm_count);
}

cudaError_t map_activation(TensorMap& map, DType dtype, const void* a, int64_t tokens, int64_t width, int64_t stride,
                           int box_tokens) {
  return make_tensor_map(map, dtype, {a, width, tokens, 1, stride, tokens * stride}, box_tokens);
}

template <class T, int OUTER, int WIDTH, bool DGRAD>
cudaError_t launch_product(const Target& target, DType dtype, const LinearShape& shape, const Blocks& blocks,
                           const void* a, const void* values, const sm90::LinearProduct<T>& product) {
  using Machine = sm90::Pipeline<T, OUTER, WIDTH, sm90::ProductItem>;
  constexpr int kBoxRows = DGRAD ? OUTER : sm90::kDepth;
  TensorMap a_map, values_map, ragged_map;
  cudaError_t error =
      map_activation(a_map, dtype, a, shape.tokens, product.inner_size, shape.a_stride, Machine::kColumns);
  if (error != cudaSuccess) return error;
  sm90::Matrices weight{values, blocks.bo, blocks.bi, blocks.capacity, blocks.bo, blocks.bi * blocks.bo};
  error = make_tensor_map(values_map, dtype, weight, kBoxRows);
  if (error != cudaSuccess) return error;
  const int ragged = product.inner_size % product.inner;  // where there is none, no block is taken for the ragged one
  if (ragged != 0) (DGRAD ? weight.width : weight.height) = ragged;
  error = make_tensor_map(ragged_map, dtype, weight, kBoxRows);
  if (error != cudaSuccess) return error;
  const int64_t items = ceil_div(shape.tokens, int64_t(Machine::kColumns)) * (DGRAD ? blocks.lists : blocks.rows);
  return launch(sm90::linear_product_sm90_kernel<T, OUTER, WIDTH, DGRAD>, {unsigned(persistent_grid(target, items))},
                sm90::kThreads, Machine::kSharedBytes, target.stream, a_map, values_map, ragged_map, product);
}

template <class T, bool DGRAD>
cudaError_t product(const Target& target, DType dtype, const LinearShape& shape, const Blocks& blocks, const void* a,
                    const void* values, const void* bias, void* y) {
  const sm90::LinearProduct<T> product{view_of(blocks),
                                       static_cast<const T*>(bias),
                                       static_cast<T*>(y),
                                       int(shape.tokens),
                                       int(DGRAD ? shape.out : shape.in),
                                       int(DGRAD ? shape.in : shape.out),
                                       int(DGRAD ? blocks.bo : blocks.bi)};
  const int64_t outer = DGRAD ? blocks.bi : blocks.bo, lists = DGRAD ? blocks.lists : blocks.rows;
  // Where there are few wide tiles, narrow ones keep more of the device busy.
  const bool narrow = ceil_div(shape.tokens, int64_t(sm90::kConsumers * kWide)) * lists < target.sm_count;
  const auto run = [&](auto kernel) { return kernel(target, dtype, shape, blocks, a, values, product); };
  if (outer == 128)
    return narrow ? run(launch_product<T, 128, kNarrow, DGRAD>) : run(launch_product<T, 128, kWide, DGRAD>);
  return narrow ? run(launch_product<T, 64, kNarrow, DGRAD>) : run(launch_product<T, 64, kWide, DGRAD>);
}

GradientPlan plan_wgrad(const Target& target, const LinearShape& shape, const Blocks& blocks) {
  GradientPlan plan = plan_gradient(target, blocks, shape.tokens);
  plan.programs = chunk_count(blocks.rows, blocks.capacity, int(sm90::kConsumers * kWide / blocks.bi));
  plan.splits = splits_for(target, plan.programs, ceil_div(shape.tokens, int64_t(sm90::kDepth)));
  return plan;
}

template <class T, int OUTER>
cudaError_t wgrad(const Target& target, DType dtype, const LinearShape& shape, const Blocks& blocks, const void* dy,
                  const void* x, const T* values, T* dvalues, float* wg, void* workspace) {
  using Machine = sm90::Pipeline<T, OUTER, kWide, sm90::GradientItem>;
  TensorMap x_map, dy_map;
  cudaError_t error = map_activation(x_map, dtype, x, shape.tokens, shape.in, shape.a_stride, sm90::kDepth);
  if (error != cudaSuccess) return error;
  error = map_activation(dy_map, dtype, dy, shape.tokens, shape.out, shape.b_stride, sm90::kDepth);
  if (error != cudaSuccess) return error;
  const GradientPlan plan = plan_wgrad(target, shape, blocks);
  const LayoutView view = view_of(blocks);
  float* partial = plan.splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const sm90::LinearGradient<T> gradient{view,
                                         int(shape.tokens),
                                         int(shape.in),
                                         int(shape.out),
                                         log_of_width(blocks.bi),
                                         int(plan.programs),
                                         plan.splits,
                                         partial,
                                         dvalues,
                                         values,
                                         wg};
  error = launch(sm90::linear_wgrad_sm90_kernel<T, OUTER>,
                 {unsigned(persistent_grid(target, plan.programs * plan.splits))}, sm90::kThreads,
                 Machine::kSharedBytes, target.stream, x_map, dy_map, gradient);
  if (error != cudaSuccess || partial == nullptr) return error;
  const SplitSums sums{partial,  plan.splits, int(blocks.bi), int(blocks.bo), int(blocks.columns),
                       shape.in, shape.out};
  return sum_splits<T>(target, view, sums, values, dvalues, wg);
}

template <class Run>
cudaError_t by_type(DType dtype, const Run& run) {
  return dtype == DType::f16 ? run(Half{}) : run(BFloat16{});
}

}  // namespace

bool runs_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks) {
  const auto fits = [](int64_t side) { return side == 64 || side == 128; };
  return target.capability == 90 && dtype != DType::f32 && fits(blocks.bi) && fits(blocks.bo) && shape.tokens > 0 &&
         shape.in > 0 && shape.out > 0 && blocks.capacity > 0 && fits_int32(shape.tokens) && fits_int32(shape.in) &&
         fits_int32(shape.out) && fits_int32(2 * blocks.capacity + blocks.rows) && sm90::has_tensor_maps();
}

cudaError_t linear_forward_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* x,
                                const void* values, const void* bias, void* y) {
  return by_type(dtype, [&](auto zero) {
    return product<decltype(zero), false>(target, dtype, shape, blocks, x, values, bias, y);
  });
}

cudaError_t linear_dgrad_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* dy,
                              const void* values, void* dx) {
  return by_type(dtype, [&](auto zero) {
    return product<decltype(zero), true>(target, dtype, shape, blocks, dy, values, nullptr, dx);
  });
}

size_t linear_wgrad_workspace_sm90(Target target, DType, LinearShape shape, Blocks blocks) {
  return plan_wgrad(target, shape, blocks).workspace(blocks);
}

cudaError_t linear_wgrad_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* dy,
                              const void* x, const void* values, void* dvalues, float* wg, void* workspace) {
  return by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel) {
      return kernel(target, dtype, shape, blocks, dy, x, static_cast<const T*>(values), static_cast<T*>(dvalues), wg,
                    workspace);
    };
    return blocks.bo == 128 ? run(wgrad<T, 128>) : run(wgrad<T, 64>);
  });
}

}  // namespace dynaprune::cuda
