// Block-sparse linear ops of the library `dynaprune_cuda`.
#include "bindings/cuda_common.h"

namespace dynaprune::bindings {
namespace {

using cuda::LinearShape;

// Rows of `width` elements, followed by zeros up to a multiple of 16, at multiples of 16.
void check_activation(const char* op, const char* name, const Tensor& t, int64_t width) {
  check_cuda(op, name, t);
  check_dim(op, name, t, 2, "[tokens, features]");
  STD_TORCH_CHECK(t.size(1) == whole_16(width), op, ": expected ", name, " of width ", whole_16(width), " (", width,
                  " in whole 16s), got shape ", shape_of(t));
  STD_TORCH_CHECK(t.stride(1) == 1 && t.stride(0) % 16 == 0 && aligned(t), op, ": expected rows of ", name,
                  " at multiples of 16 elements and 16 bytes, got strides ", t.stride(0), " and ", t.stride(1));
  STD_TORCH_CHECK(t.stride(0) >= 0 && t.stride(0) <= kLargestSize, op, ": expected rows of ", name,
                  " fewer than 2^31 elements apart, got ", t.stride(0));
  check_storage(op, name, t);
  check_count(op, "tokens", {t.size(0)});
}

Blocks linear_blocks(const char* op, const Tensor& index, const Tensor& beside, int64_t in, int64_t out,
                     int64_t capacity, int64_t bi, int64_t bo) {
  check_block(op, bi, bo);
  check_size(op, "inputs", in, 1);
  check_size(op, "outputs", out, 1);
  const int64_t columns = ceil_div(in, bi);
  return blocks_of(op, index, beside, ceil_div(out, bo), columns, columns, capacity, bi, bo);
}

Tensor linear_forward(const Tensor& x, const Tensor& values, std::optional<Tensor> bias, const Tensor& index,
                      int64_t in_features, int64_t out_features, bool tf32) {
  const char* op = "linear_forward";
  check_activation(op, "x", x, in_features);
  check_values(op, values, "x", x);
  const Blocks blocks =
      linear_blocks(op, index, x, in_features, out_features, values.size(0), values.size(1), values.size(2));
  const std::optional<Tensor> offsets = checked_bias(op, bias, out_features, x);
  const DType dtype = kernel_dtype(op, "x", x);
  const OnDevice device(x);
  const LinearShape shape{x.size(0), in_features, out_features, x.stride(0), 0};
  Tensor y = torch::stable::new_empty(x, {shape.tokens, out_features});
  check_success(op, cuda::linear_forward(device.target, dtype, precision_of(tf32), shape, blocks, x.const_data_ptr(),
                                         values.const_data_ptr(), offsets ? offsets->const_data_ptr() : nullptr,
                                         y.mutable_data_ptr()));
  return y;
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& values, const Tensor& index, int64_t in_features,
                    int64_t out_features, bool tf32) {
  const char* op = "linear_dgrad";
  check_activation(op, "dy", dy, out_features);
  check_values(op, values, "dy", dy);
  const Blocks blocks =
      linear_blocks(op, index, dy, in_features, out_features, values.size(0), values.size(1), values.size(2));
  const DType dtype = kernel_dtype(op, "dy", dy);
  const OnDevice device(dy);
  const LinearShape shape{dy.size(0), in_features, out_features, dy.stride(0), 0};
  Tensor dx = torch::stable::new_empty(dy, {shape.tokens, in_features});
  check_success(op, cuda::linear_dgrad(device.target, dtype, precision_of(tf32), shape, blocks, dy.const_data_ptr(),
                                       values.const_data_ptr(), dx.mutable_data_ptr()));
  return dx;
}

// The sizes of a weight gradient from both activations.
LinearShape gradient_shape(const char* op, const Tensor& dy, const Tensor& x, int64_t in, int64_t out) {
  check_activation(op, "x", x, in);
  check_activation(op, "dy", dy, out);
  check_beside(op, "dy", dy, x);
  check_same_dtype(op, "dy", dy, "x", x);
  STD_TORCH_CHECK(dy.size(0) == x.size(0), op, ": expected as many rows in dy as in x (", x.size(0), "), got ",
                  dy.size(0));
  return {x.size(0), in, out, x.stride(0), dy.stride(0)};
}

void run_wgrad(const char* op, const Tensor& dy, const Tensor& x, const LinearShape& shape, const Blocks& blocks,
               bool tf32, const void* values, const Tensor& dvalues, float* wg) {
  const DType dtype = kernel_dtype(op, "x", x);
  const OnDevice device(x);
  const Tensor scratch = workspace(x, cuda::linear_wgrad_workspace(device.target, dtype, shape, blocks));
  check_success(
      op, cuda::linear_wgrad(device.target, dtype, precision_of(tf32), shape, blocks, dy.const_data_ptr(),
                             x.const_data_ptr(), values, dvalues.mutable_data_ptr(), wg, scratch.mutable_data_ptr()));
}

Tensor linear_wgrad(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo,
                    int64_t in_features, int64_t out_features, bool tf32) {
  const char* op = "linear_wgrad";
  const LinearShape shape = gradient_shape(op, dy, x, in_features, out_features);
  const Blocks blocks = linear_blocks(op, index, x, in_features, out_features, capacity, bi, bo);
  Tensor dvalues = torch::stable::new_empty(x, {capacity, bi, bo});
  run_wgrad(op, dy, x, shape, blocks, tf32, nullptr, dvalues, nullptr);
  return dvalues;
}

std::tuple<Tensor, Tensor> linear_wgrad_saliency(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                 const Tensor& index, int64_t in_features, int64_t out_features,
                                                 bool tf32) {
  const char* op = "linear_wgrad_saliency";
  const LinearShape shape = gradient_shape(op, dy, x, in_features, out_features);
  check_values(op, values, "x", x);
  const Blocks blocks =
      linear_blocks(op, index, x, in_features, out_features, values.size(0), values.size(1), values.size(2));
  Tensor dvalues = torch::stable::new_empty(x, {blocks.capacity, blocks.bi, blocks.bo});
  Tensor wg = new_sums(x, blocks.rows * blocks.columns);
  run_wgrad(op, dy, x, shape, blocks, tf32, values.const_data_ptr(), dvalues, floats(wg));
  return {dvalues, wg};
}

Tensor linear_probe(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo,
                    int64_t in_features, int64_t out_features, const Tensor& probe, bool tf32) {
  const char* op = "linear_probe";
  const LinearShape shape = gradient_shape(op, dy, x, in_features, out_features);
  const Blocks blocks = linear_blocks(op, index, x, in_features, out_features, capacity, bi, bo);
  const bool* wanted = checked_flag(op, probe, x);
  const DType dtype = kernel_dtype(op, "x", x);
  const OnDevice device(x);
  Tensor squares = new_sums(x, blocks.rows * blocks.columns);
  check_success(op, cuda::linear_probe(device.target, dtype, precision_of(tf32), shape, blocks, dy.const_data_ptr(),
                                       x.const_data_ptr(), wanted, floats(squares)));
  return squares;
}

}  // namespace
}  // namespace dynaprune::bindings

DYN_IMPLEMENT(m) {
  using namespace dynaprune::bindings;
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_dgrad", TORCH_BOX(&linear_dgrad));
  m.impl("linear_wgrad", TORCH_BOX(&linear_wgrad));
  m.impl("linear_wgrad_saliency", TORCH_BOX(&linear_wgrad_saliency));
  m.impl("linear_probe", TORCH_BOX(&linear_probe));
}
