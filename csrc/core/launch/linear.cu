// Launchers of the linear kernels.
#include "core/kernels/linear_sm80.h"
#include "core/launch/tiles_sm80.h"
#include "core/launchers.h"
#ifdef DYNAPRUNE_SM90A
#include "core/launchers_sm90.h"
#endif

namespace dynaprune::cuda {
namespace {

template <bool DGRAD>
cudaError_t launch_product(const Target& target, DType dtype, Precision precision, const LinearShape& shape,
                           const Blocks& blocks, const void* a, const void* values, const void* bias, void* y) {
  const int64_t lists = DGRAD ? blocks.lists : blocks.rows;
  const int64_t inner_size = DGRAD ? shape.out : shape.in, outer_size = DGRAD ? shape.in : shape.out;
  if (!fits_int32(inner_size) || !fits_int32(outer_size)) return cudaErrorInvalidValue;
  const auto start = [&](auto tile, int64_t row_tiles, int log_inner) {
    using Tile = decltype(tile);
    using T = typename Tile::Element;
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
    return launch(linear_product_kernel<Tile>, {unsigned(row_tiles * lists)}, Tile::kThreads, Tile::kSharedBytes,
                  target.stream, product);
  };
  return with_product_tile<DGRAD>(target, dtype, precision, blocks, shape.tokens, lists, start);
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
  if (!fits_int32(shape.in) || !fits_int32(shape.out)) return cudaErrorInvalidValue;
  const WeightSizes weight{int(blocks.columns), shape.in, shape.out};
  const GradientTarget to{values, dvalues, wg, workspace};
  const auto start = [&](auto tile, const GradientPlan& plan, int log_bi, const auto& output) {
    using Tile = decltype(tile);
    return launch(linear_wgrad_kernel<Tile>, {unsigned(plan.programs), unsigned(plan.splits)}, Tile::kThreads,
                  Tile::kSharedBytes, target.stream, gradient_of<typename Tile::Element>(shape, blocks, dy, x), log_bi,
                  plan.positions_per_split, output);
  };
  return with_gradient_tile(target, dtype, precision, blocks, shape.tokens, weight, to, start);
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
