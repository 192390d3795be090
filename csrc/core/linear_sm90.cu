// Launchers of the Hopper kernels of linear layers: tiles, grids, tensor maps.
#include "core/linear_sm90.h"

#include "core/linear_sm90_launch.h"
#include "core/sum_splits.h"
#include "core/tensor_map.h"
#include "core/variants.h"

namespace dynaprune::cuda {
namespace {

using sm90::TensorMap;

constexpr int kNarrow = 64;  // tokens per tile where wide tiles would leave multiprocessors idle

constexpr int wide(int outer) { return 128 * 128 / outer; }  // columns of a tile: 128 accumulators per thread

sm90::Matrix values_matrix(const Blocks& blocks, const void* values) {
  return {values, blocks.capacity * blocks.bi, blocks.bo, blocks.bo};
}

int persistent_grid(const Target& target, int64_t items) {
  return int(items < target.sm_count ? items : target.sm_count);
}

template <class T, int OUTER, int WIDTH, bool DGRAD>
cudaError_t launch_product(const Target& target, DType dtype, const LinearShape& shape, const Blocks& blocks,
                           const void* a, const void* values, const sm90::LinearProduct<T>& product) {
  using Machine = sm90::Pipeline<T, OUTER, WIDTH, sm90::ProductItem>;
  TensorMap a_map, values_map;
  cudaError_t error = make_tensor_map(a_map, dtype, {a, shape.tokens, product.inner_size, shape.a_stride}, WIDTH);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(values_map, dtype, values_matrix(blocks, values), DGRAD ? OUTER : sm90::kDepth);
  if (error != cudaSuccess) return error;
  const int64_t items = ceil_div(shape.tokens, int64_t(WIDTH)) * (DGRAD ? blocks.lists : blocks.rows);
  return launch(sm90::linear_product_sm90_kernel<T, OUTER, WIDTH, DGRAD>, {unsigned(persistent_grid(target, items))},
                sm90::kThreads, Machine::kSharedBytes, target.stream, a_map, values_map, product);
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
                                       int(blocks.bi),
                                       int(blocks.bo)};
  const int64_t outer = DGRAD ? blocks.bi : blocks.bo, lists = DGRAD ? blocks.lists : blocks.rows;
  const bool narrow = ceil_div(shape.tokens, int64_t(wide(int(outer)))) * lists < target.sm_count;
  const auto run = [&](auto kernel) { return kernel(target, dtype, shape, blocks, a, values, product); };
  if (outer == 128)
    return narrow ? run(launch_product<T, 128, kNarrow, DGRAD>) : run(launch_product<T, 128, wide(128), DGRAD>);
  return narrow ? run(launch_product<T, 64, kNarrow, DGRAD>) : run(launch_product<T, 64, wide(64), DGRAD>);
}

struct Parts {
  int64_t programs;
  int splits;
};

Parts wgrad_parts(const Target& target, const LinearShape& shape, const Blocks& blocks) {
  const int64_t programs = chunk_count(blocks.rows, blocks.capacity, wide(int(blocks.bo)) / int(blocks.bi));
  return {programs, splits_for(target, programs, ceil_div(shape.tokens, int64_t(sm90::kDepth)))};
}

template <class T, int OUTER>
cudaError_t wgrad(const Target& target, DType dtype, const LinearShape& shape, const Blocks& blocks, const void* dy,
                  const void* x, const T* values, T* dvalues, float* wg, void* workspace) {
  constexpr int kWidth = wide(OUTER);
  using Machine = sm90::Pipeline<T, OUTER, kWidth, sm90::GradientItem<kWidth>>;
  TensorMap x_map, dy_map;
  cudaError_t error = make_tensor_map(x_map, dtype, {x, shape.tokens, shape.in, shape.a_stride}, sm90::kDepth);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(dy_map, dtype, {dy, shape.tokens, shape.out, shape.b_stride}, sm90::kDepth);
  if (error != cudaSuccess) return error;
  const Parts parts = wgrad_parts(target, shape, blocks);
  const LayoutView view = view_of(blocks);
  float* partial = parts.splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const sm90::LinearGradient<T> gradient{view,
                                         int(shape.tokens),
                                         int(shape.in),
                                         int(shape.out),
                                         blocks.bi == 128 ? 7 : 6,
                                         int(parts.programs),
                                         parts.splits,
                                         partial,
                                         dvalues,
                                         values,
                                         wg};
  error = launch(sm90::linear_wgrad_sm90_kernel<T, OUTER, kWidth>,
                 {unsigned(persistent_grid(target, parts.programs * parts.splits))}, sm90::kThreads,
                 Machine::kSharedBytes, target.stream, x_map, dy_map, gradient);
  if (error != cudaSuccess || partial == nullptr) return error;
  const SplitSums sums{partial,          parts.splits, int(blocks.bi), int(blocks.bo), int(blocks.columns),
                       shape.in, shape.out};
  return sum_splits<T>(target, view, sums, values, dvalues, wg);
}

template <class Run>
cudaError_t by_type(DType dtype, const Run& run) {
  return dtype == DType::f16 ? run(Half{}) : run(BFloat16{});
}

}  // namespace

bool runs_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks) {
  constexpr int64_t kInt32 = int64_t(1) << 31;
  const auto fits = [](int64_t side) { return side == 64 || side == 128; };
  const int64_t elements = blocks.capacity * 128;  // rows of the values' matrix, entries of a list times its depth
  return target.capability == 90 && dtype != DType::f32 && fits(blocks.bi) && fits(blocks.bo) &&
         shape.tokens > 0 && shape.in > 0 && shape.out > 0 && blocks.capacity > 0 && elements < kInt32 &&
         shape.tokens + 256 < kInt32 && shape.in + 128 < kInt32 && shape.out + 128 < kInt32 &&
         sm90::has_tensor_maps();
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
  const Parts parts = wgrad_parts(target, shape, blocks);
  return parts.splits == 1 ? 0 : size_t(parts.splits) * blocks.capacity * blocks.bi * blocks.bo * sizeof(float);
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
