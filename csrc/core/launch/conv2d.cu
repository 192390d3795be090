// Launchers of the convolution kernels. A pointwise convolution is a linear layer over pixels, packed index included.
#include "core/kernels/conv2d_sm80.h"
#include "core/kernels/sum_splits.h"
#include "core/launch/variants.h"
#include "core/launchers.h"
#include "core/scheduler/splits.h"
#ifdef DYNAPRUNE_SM90A
#include "core/launch/conv2d_sm90.h"
#endif

namespace dynaprune::cuda {
namespace {

bool is_linear(const Conv2dShape& s) {
  return s.kernel_h * s.kernel_w * s.stride_h * s.stride_w * s.groups == 1 && s.pad_h == 0 && s.pad_w == 0;
}

LinearShape linear_shape(const Conv2dShape& s, int64_t a_stride, int64_t b_stride) {
  return {s.images * s.in_h * s.in_w, s.in_channels, s.out_channels, a_stride, b_stride};
}

int64_t output_positions(const Conv2dShape& s) { return s.images * s.out_h * s.out_w; }

// `positions` of the largest grid, for each of `lists`.
template <bool DGRAD>
cudaError_t launch_product(const Target& target, DType dtype, Precision precision, const Conv2dShape& shape,
                           const Blocks& blocks, int64_t positions, int64_t lists, const void* a, const void* values,
                           const void* bias, void* y) {
  const int log_inner = log_of_width(DGRAD ? blocks.bo : blocks.bi);
  // Where there are few tiles, smaller ones keep more of the device busy.
  const bool small = positions <= 64 || ceil_div(positions, int64_t(128)) * lists < 2 * target.sm_count;
  const int64_t row_tiles = ceil_div(positions, int64_t(small ? 64 : 128));
  if (log_inner < 0 || !fits(shape) || !fits_int32(row_tiles * lists) ||
      !fits_int32(blocks.capacity << log_inner))  // a wrong index may make a list so long
    return cudaErrorInvalidValue;
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    return with_width(DGRAD ? blocks.bi : blocks.bo, [&](auto width) {
      using T = typename decltype(arithmetic)::Element;
      const Conv2dProduct<T> product{view_of(blocks),
                                     sizes_of(shape, blocks),
                                     static_cast<const T*>(a),
                                     static_cast<const T*>(values),
                                     static_cast<const T*>(bias),
                                     static_cast<T*>(y),
                                     row_tiles,
                                     log_inner};
      const auto start = [&](auto rows) {
        constexpr int kProducts = decltype(arithmetic)::kProducts;
        using Tile = ProductTile<T, decltype(rows)::value, decltype(width)::value, kProducts, DGRAD>;
        void (*kernel)(Conv2dProduct<T>) = nullptr;
        if constexpr (DGRAD)
          kernel = conv2d_dgrad_kernel<Tile>;
        else
          kernel = conv2d_forward_kernel<Tile>;
        return launch(kernel, {unsigned(row_tiles * lists)}, Tile::kThreads, Tile::kSharedBytes, target.stream,
                      product);
      };
      return small ? start(std::integral_constant<int, 64>{}) : start(std::integral_constant<int, 128>{});
    });
  });
}

template <class T>
Conv2dGradient<T> gradient_of(const Conv2dShape& shape, const Blocks& blocks, const void* dy, const void* x) {
  return {view_of(blocks), sizes_of(shape, blocks), static_cast<const T*>(x), static_cast<const T*>(dy)};
}

}  // namespace

cudaError_t conv2d_forward(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                           const void* x, const void* values, const void* bias, void* y) {
  if (is_linear(shape))
    return linear_forward(target, dtype, precision, linear_shape(shape, shape.x_channels, 0), blocks, x, values, bias,
                          y);
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
  if (is_linear(shape))
    return linear_dgrad(target, dtype, precision, linear_shape(shape, shape.dy_channels, 0), blocks, dy, values, dx);
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
  if (is_linear(shape))
    return linear_wgrad_workspace(target, dtype, linear_shape(shape, shape.x_channels, shape.dy_channels), blocks);
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks)) return conv2d_wgrad_workspace_sm90(target, dtype, shape, blocks);
#endif
  return plan_gradient(target, blocks, output_positions(shape)).workspace(blocks);
}

cudaError_t conv2d_wgrad(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* x, const void* values, void* dvalues, float* wg, void* workspace) {
  if (is_linear(shape))
    return linear_wgrad(target, dtype, precision, linear_shape(shape, shape.x_channels, shape.dy_channels), blocks, dy,
                        x, values, dvalues, wg, workspace);
  if (blocks.capacity == 0 && wg == nullptr) return cudaSuccess;
#ifdef DYNAPRUNE_SM90A
  if (runs_sm90(target, dtype, shape, blocks))
    return conv2d_wgrad_sm90(target, dtype, shape, blocks, dy, x, values, dvalues, wg, workspace);
#endif
  const int log_bi = log_of_width(blocks.bi);
  if (log_bi < 0) return cudaErrorInvalidValue;
  const GradientPlan plan = plan_gradient(target, blocks, output_positions(shape));
  if (!fits(shape) || !fits_int32(plan.programs)) return cudaErrorInvalidValue;
  float* partial = plan.splits == 1 ? nullptr : static_cast<float*>(workspace);
  return with_arithmetic(dtype, precision, [&](auto arithmetic) {
    return with_width(blocks.bo, [&](auto width) {
      using T = typename decltype(arithmetic)::Element;
      using Tile = GradientTile<T, decltype(width)::value, decltype(arithmetic)::kProducts>;
      const Conv2dGradient<T> gradient = gradient_of<T>(shape, blocks, dy, x);
      const GradientOutput<T> output{partial, static_cast<T*>(dvalues), static_cast<const T*>(values), wg};
      const cudaError_t started =
          launch(conv2d_wgrad_kernel<Tile>, {unsigned(plan.programs), unsigned(plan.splits)}, Tile::kThreads,
                 Tile::kSharedBytes, target.stream, gradient, log_bi, plan.positions_per_split, output);
      if (started != cudaSuccess || plan.splits == 1) return started;
      const SplitSums sums{partial,
                           plan.splits,
                           int(blocks.bi),
                           int(blocks.bo),
                           gradient.sizes.channel_blocks.value,
                           gradient.sizes.group_channels,
                           shape.out_channels};
      return sum_splits(target, gradient.view, sums, output.values, output.dvalues, wg);
    });
  });
}

cudaError_t conv2d_probe(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* x, const bool* wanted, float* squares) {
  if (is_linear(shape))
    return linear_probe(target, dtype, precision, linear_shape(shape, shape.x_channels, shape.dy_channels), blocks, dy,
                        x, wanted, squares);
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
