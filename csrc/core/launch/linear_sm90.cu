// Launchers of the Hopper kernels of linear layers.
#include "core/gather/tokens_sm90.h"

#include "core/launchers_sm90.h"
#include "core/launch/run_sm90.h"

namespace dynaprune::cuda {
namespace {

sm90::Matrices tokens_of(const void* a, int64_t tokens, int64_t width, int64_t stride) {
  return {a, width, tokens, 1, stride, tokens * stride};
}

template <class T, bool DGRAD>
cudaError_t product(const Target& target, DType dtype, const LinearShape& shape, const Blocks& blocks, const void* a,
                    const void* values, const void* bias, void* y) {
  const int64_t inner_size = DGRAD ? shape.out : shape.in, inner = DGRAD ? blocks.bo : blocks.bi;
  const auto fill = [&](sm90::Tokens<DGRAD>& rows, int height) {
    rows.tokens = int(shape.tokens);
    rows.outer_size = int(DGRAD ? shape.in : shape.out);
    rows.inner_width = int(inner);
    rows.ragged = int(inner_size / inner);
    return make_tensor_map(rows.a, dtype, tokens_of(a, shape.tokens, inner_size, shape.a_stride), height);
  };
  const sm90::Product<T> product{view_of(blocks), static_cast<const T*>(bias), static_cast<T*>(y)};
  return sm90::run_product<sm90::Tokens<DGRAD>>(target, dtype, blocks, shape.tokens, inner_size, values, product,
                                                fill);
}

}  // namespace

bool runs_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks) {
  return sm90::runs(target, dtype, blocks) && shape.tokens > 0 && shape.in > 0 && shape.out > 0 &&
         fits_int32(shape.tokens) && fits_int32(shape.in) && fits_int32(shape.out);
}

cudaError_t linear_forward_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* x,
                                const void* values, const void* bias, void* y) {
  return sm90::by_type(dtype, [&](auto zero) {
    return product<decltype(zero), false>(target, dtype, shape, blocks, x, values, bias, y);
  });
}

cudaError_t linear_dgrad_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* dy,
                              const void* values, void* dx) {
  return sm90::by_type(dtype, [&](auto zero) {
    return product<decltype(zero), true>(target, dtype, shape, blocks, dy, values, nullptr, dx);
  });
}

size_t linear_wgrad_workspace_sm90(Target target, DType, LinearShape shape, Blocks blocks) {
  return sm90::plan_wgrad(target, blocks, shape.tokens).workspace(blocks);
}

cudaError_t linear_wgrad_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* dy,
                              const void* x, const void* values, void* dvalues, float* wg, void* workspace) {
  sm90::TokenInputs inputs{{}, int(shape.in), log_of_width(blocks.bi)};
  const cudaError_t error =
      make_tensor_map(inputs.x, dtype, tokens_of(x, shape.tokens, shape.in, shape.a_stride), sm90::kDepth);
  if (error != cudaSuccess) return error;
  return sm90::by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return sm90::run_wgrad(target, dtype, blocks, inputs, tokens_of(dy, shape.tokens, shape.out, shape.b_stride),
                           blocks.columns, shape.in, static_cast<const T*>(values), static_cast<T*>(dvalues), wg,
                           workspace);
  });
}

}  // namespace dynaprune::cuda
