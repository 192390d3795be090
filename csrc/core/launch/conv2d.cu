// Launchers of the convolution kernels.
#include "core/kernels/conv2d_sm80.h"
#include "core/launch/tiles_sm80.h"
#include "core/launchers.h"
#ifdef DYNAPRUNE_SM90A
#include "core/launchers_sm90.h"
#endif

namespace dynaprune::cuda {
namespace {

int64_t output_positions(const Conv2dShape& s) { return s.images * s.out_h * s.out_w; }

// `positions` of the largest grid, for each of `lists`.
template <bool DGRAD>
cudaError_t launch_product(const Target& target, DType dtype, Precision precision, const Conv2dShape& shape,
                           const Blocks& blocks, int64_t positions, int64_t lists, const void* a, const void* values,
                           const void* bias, void* y) {
  if (!fits(shape)) return cudaErrorInvalidValue;
  const auto start = [&](auto tile, int64_t row_tiles, int log_inner) {
    using Tile = decltype(tile);
    using T = typename Tile::Element;
    const Conv2dProduct<T> product{view_of(blocks),
                                   sizes_of(shape, blocks),
                                   static_cast<const T*>(a),
                                   static_cast<const T*>(values),
                                   static_cast<const T*>(bias),
                                   static_cast<T*>(y),
                                   row_tiles,
                                   log_inner};
    void (*kernel)(Conv2dProduct<T>) = nullptr;
    if constexpr (DGRAD)
      kernel = conv2d_dgrad_kernel<Tile>;
    else
      kernel = conv2d_forward_kernel<Tile>;
    return launch(kernel, {unsigned(row_tiles * lists)}, Tile::kThreads, Tile::kSharedBytes, target.stream, product);
  };
  return with_product_tile<DGRAD>(target, dtype, precision, blocks, positions, lists, start);
}

template <class T>
Conv2dGradient<T> gradient_of(const Conv2dShape& shape, const Blocks& blocks, const void* dy, const void* x) {
  return {view_of(blocks), sizes_of(shape, blocks), static_cast<const T*>(x), static_cast<const T*>(dy)};
}

}  // namespace

cudaError_t conv2d_forward(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                           const void* x, const void* values, const void* bias, void* y) {
  const int64_t positions = output_positions(shape);
  if (positions == 0) return cudaSuccess;
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks))
    return conv2d_forward_sm90(target, dtype, shape, blocks, x, values, bias, y);
#endif
  return launch_product<false>(target, dtype, precision, shape, blocks, positions, blocks.rows, x, values, bias, y);
}

cudaError_t conv2d_dgrad(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* values, void* dx) {
  const int64_t positions = shape.images * ceil_div(shape.in_h, int64_t(shape.stride_h)) *
                            ceil_div(shape.in_w, int64_t(shape.stride_w));
  if (positions == 0) return cudaSuccess;
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks)) return conv2d_dgrad_sm90(target, dtype, shape, blocks, dy, values, dx);
#endif
  return launch_product<true>(target, dtype, precision, shape, blocks, positions, blocks.lists, dy, values, nullptr,
                              dx);
}

size_t conv2d_wgrad_workspace(Target target, DType dtype, Conv2dShape shape, Blocks blocks) {
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks)) return conv2d_wgrad_workspace_sm90(target, dtype, shape, blocks);
#endif
  return plan_gradient(target, blocks, output_positions(shape)).workspace(blocks);
}

cudaError_t conv2d_wgrad(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* x, const void* values, void* dvalues, float* wg, void* workspace) {
  if (blocks.capacity == 0 && wg == nullptr) return cudaSuccess;
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks))
    return conv2d_wgrad_sm90(target, dtype, shape, blocks, dy, x, values, dvalues, wg, workspace);
#endif
  if (!fits(shape)) return cudaErrorInvalidValue;
  const Conv2dSizes sizes = sizes_of(shape, blocks);
  const WeightSizes weight{sizes.channel_blocks.value, sizes.group_channels, shape.out_channels};
  const GradientTarget to{values, dvalues, wg, workspace};
  const auto start = [&](auto tile, const GradientPlan& plan, int log_bi, const auto& output) {
    using Tile = decltype(tile);
    return launch(conv2d_wgrad_kernel<Tile>, {unsigned(plan.programs), unsigned(plan.splits)}, Tile::kThreads,
                  Tile::kSharedBytes, target.stream, gradient_of<typename Tile::Element>(shape, blocks, dy, x), log_bi,
                  plan.positions_per_split, output);
  };
  return with_gradient_tile(target, dtype, precision, blocks, output_positions(shape), weight, to, start);
}

cudaError_t conv2d_probe(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* x, const bool* wanted, float* squares) {
  if (log_of_width(blocks.bi) < 0 || log_of_width(blocks.bo) < 0) return cudaErrorInvalidValue;
  const int64_t channel_blocks = ceil_div(shape.in_channels / shape.groups, blocks.bi);
  const int64_t tiles = ceil_div(blocks.rows / shape.groups, 128 / blocks.bo) * shape.groups *
                        ceil_div(channel_blocks, 128 / blocks.bi) * shape.kernel_h * shape.kernel_w;
  if (!fits(shape) || !fits_int32(tiles)) return cudaErrorInvalidValue;
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    using T = typename decltype(arithmetic)::Element;
    using Tile = GradientTile<T, 128, decltype(arithmetic)::kProducts>;
    return launch(conv2d_probe_kernel<Tile>, {unsigned(tiles)}, Tile::kThreads, Tile::kSharedBytes, target.stream,
                  gradient_of<T>(shape, blocks, dy, x), wanted, squares);
  });
}

}  // namespace dynaprune::cuda
