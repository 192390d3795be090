// Launchers of the linear kernels.
#include "core/kernels/linear_sm80.h"
#include "core/kernels/sum_splits.h"
#include "core/launch/variants.h"
#include "core/launchers.h"
#include "core/scheduler/splits.h"
#ifdef DYNAPRUNE_SM90A
#include "core/launch/linear_sm90.h"
#endif

namespace dynaprune::cuda {
namespace {

template <bool DGRAD>
cudaError_t launch_product(const Target& target, DType dtype, Precision precision, const LinearShape& shape,
                           const Blocks& blocks, const void* a, const void* values, const void* bias, void* y) {
  const int64_t lists = DGRAD ? blocks.lists : blocks.rows;
  const int64_t inner_size = DGRAD ? shape.out : shape.in, outer_size = DGRAD ? shape.in : shape.out;
  const int log_inner = log_of_width(DGRAD ? blocks.bo : blocks.bi);
  // Where there are few tiles, smaller ones keep more of the device busy.
  const bool small = shape.tokens <= 64 || ceil_div(shape.tokens, int64_t(128)) * lists < 2 * target.sm_count;
  const int64_t programs = ceil_div(shape.tokens, int64_t(small ? 64 : 128)) * lists;
  if (log_inner < 0 || !fits_int32(inner_size) || !fits_int32(outer_size) || !fits_int32(programs) ||
      !fits_int32(blocks.capacity << log_inner))  // a wrong index may make a list so long
    return cudaErrorInvalidValue;
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    return with_width(DGRAD ? blocks.bi : blocks.bo, [&](auto width) {
      using T = typename decltype(arithmetic)::Element;
      const LinearProduct<T> product{view_of(blocks),
                                     static_cast<const T*>(a),
                                     static_cast<const T*>(values),
                                     static_cast<const T*>(bias),
                                     static_cast<T*>(y),
                                     shape.tokens,
                                     shape.a_stride,
                                     int(inner_size),
                                     int(outer_size),
                                     log_inner};
      const auto start = [&](auto rows) {
        constexpr int kProducts = decltype(arithmetic)::kProducts;
        using Tile = ProductTile<T, decltype(rows)::value, decltype(width)::value, kProducts, DGRAD>;
        return launch(linear_product_kernel<Tile>, {unsigned(programs)}, Tile::kThreads, Tile::kSharedBytes,
                      target.stream, product);
      };
      return small ? start(std::integral_constant<int, 64>{}) : start(std::integral_constant<int, 128>{});
    });
  });
}

template <class T>
LinearGradient<T> gradient_of(const LinearShape& shape, const Blocks& blocks, const void* dy, const void* x) {
  return {view_of(blocks), static_cast<const T*>(x), static_cast<const T*>(dy), shape.tokens,
          shape.a_stride,  shape.b_stride,           int(shape.in),             int(shape.out),
          int(blocks.bi),  int(blocks.bo)};
}

}  // namespace

cudaError_t linear_forward(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                           const void* x, const void* values, const void* bias, void* y) {
  if (shape.tokens == 0 || shape.out == 0) return cudaSuccess;
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks))
    return linear_forward_sm90(target, dtype, shape, blocks, x, values, bias, y);
#endif
  return launch_product<false>(target, dtype, precision, shape, blocks, x, values, bias, y);
}

cudaError_t linear_dgrad(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                         const void* dy, const void* values, void* dx) {
  if (shape.tokens == 0 || shape.in == 0) return cudaSuccess;
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks)) return linear_dgrad_sm90(target, dtype, shape, blocks, dy, values, dx);
#endif
  return launch_product<true>(target, dtype, precision, shape, blocks, dy, values, nullptr, dx);
}

size_t linear_wgrad_workspace(Target target, [[maybe_unused]] DType dtype, LinearShape shape, Blocks blocks) {
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks)) return linear_wgrad_workspace_sm90(target, dtype, shape, blocks);
#endif
  return plan_gradient(target, blocks, shape.tokens).workspace(blocks);
}

cudaError_t linear_wgrad(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                         const void* dy, const void* x, const void* values, void* dvalues, float* wg, void* workspace) {
  if (blocks.capacity == 0 && (wg == nullptr || blocks.rows * blocks.columns == 0)) return cudaSuccess;
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks))
    return linear_wgrad_sm90(target, dtype, shape, blocks, dy, x, values, dvalues, wg, workspace);
#endif
  const int log_bi = log_of_width(blocks.bi);
  if (log_bi < 0) return cudaErrorInvalidValue;
  const GradientPlan plan = plan_gradient(target, blocks, shape.tokens);
  if (!fits_int32(shape.in) || !fits_int32(shape.out) || !fits_int32(plan.programs)) return cudaErrorInvalidValue;
  float* partial = plan.splits == 1 ? nullptr : static_cast<float*>(workspace);
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    return with_width(blocks.bo, [&](auto width) {
      using T = typename decltype(arithmetic)::Element;
      using Tile = GradientTile<T, decltype(width)::value, decltype(arithmetic)::kProducts>;
      const LinearGradient<T> gradient = gradient_of<T>(shape, blocks, dy, x);
      const GradientOutput<T> output{partial, static_cast<T*>(dvalues), static_cast<const T*>(values), wg};
      const cudaError_t started =
          launch(linear_wgrad_kernel<Tile>, {unsigned(plan.programs), unsigned(plan.splits)}, Tile::kThreads,
                 Tile::kSharedBytes, target.stream, gradient, log_bi, plan.positions_per_split, output);
      if (started != cudaSuccess || plan.splits == 1) return started;
      const SplitSums sums{partial,        plan.splits, int(blocks.bi), int(blocks.bo), int(blocks.columns),
                           shape.in, shape.out};
      return sum_splits(target, gradient.view, sums, output.values, output.dvalues, wg);
    });
  });
}

cudaError_t linear_probe(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                         const void* dy, const void* x, const bool* wanted, float* squares) {
  if (blocks.rows * blocks.columns == 0) return cudaSuccess;
  if (log_of_width(blocks.bi) < 0 || log_of_width(blocks.bo) < 0) return cudaErrorInvalidValue;
  const int64_t tiles = ceil_div(blocks.rows, 128 / blocks.bo) * ceil_div(blocks.columns, 128 / blocks.bi);
  if (!fits_int32(shape.in) || !fits_int32(shape.out) || !fits_int32(tiles)) return cudaErrorInvalidValue;
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    using T = typename decltype(arithmetic)::Element;
    using Tile = GradientTile<T, 128, decltype(arithmetic)::kProducts>;
    return launch(linear_probe_kernel<Tile>, {unsigned(tiles)}, Tile::kThreads, Tile::kSharedBytes, target.stream,
                  gradient_of<T>(shape, blocks, dy, x), wanted, squares);
  });
}

}  // namespace dynaprune::cuda
