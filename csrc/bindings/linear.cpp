// Block-sparse linear ops of the library `dynaprune_cpu`.
#include "bindings/common.h"
#include "bindings/huge_pages.h"
#include "cpu/kernels.h"

namespace dynaprune::bindings {
namespace {

using cpu::Lists;

void check_activation(const char* op, const char* name, const Tensor& t, const char* shape) {
  check_cpu(op, name, t);
  check_dim(op, name, t, 2, shape);
  check_storage(op, name, t);
}

// Sizes of a layer from the activations on both sides.
cpu::LinearShape shape_of_gradients(const char* op, const Tensor& dy, const Tensor& x, int64_t bi, int64_t bo) {
  check_activation(op, "dy", dy, "[M, out]");
  check_activation(op, "x", x, "[M, in]");
  check_same_dtype(op, "dy", dy, "x", x);
  STD_TORCH_CHECK(dy.size(0) == x.size(0), op, ": expected as many rows in dy as in x (", x.size(0), "), got ",
                  dy.size(0));
  check_block_sizes(op, bi, bo);
  return {x.size(0), x.size(1), dy.size(1), bi, bo};
}

LayoutView view_linear(const char* op, const Tensor& index, const cpu::LinearShape& s, int64_t capacity,
                       cpu::Lists direction) {
  check_size(op, "inputs", s.in);
  check_size(op, "outputs", s.out);
  const int64_t columns = ceil_div(s.in, s.bi);
  const cpu::ListGeometry geometry{1, columns, 1, 1, 1, 1, 1};
  return view_index(op, index, ceil_div(s.out, s.bo), columns, columns, capacity, direction, &geometry);
}

Tensor linear_forward(const Tensor& x, const Tensor& values, std::optional<Tensor> bias, const Tensor& index,
                      int64_t out_features) {
  const char* op = "linear_forward";
  check_activation(op, "x", x, "[M, in]");
  const DType dtype = kernel_dtype(op, "x", x);
  check_values(op, "values", values, "x", x);
  const cpu::LinearShape shape{x.size(0), x.size(1), out_features, values.size(1), values.size(2)};
  const LayoutView layout = view_linear(op, index, shape, values.size(0), Lists::rows);
  std::optional<Tensor> dense_bias;
  if (bias) {
    check_cpu(op, "bias", *bias);
    check_bias(op, *bias, out_features, x);
    dense_bias = torch::stable::contiguous(*bias);
  }
  const Tensor input = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, {shape.m, shape.out});
  advise_huge_pages(y);
  cpu::kernels().linear_forward(dtype, shape, layout, TorchWorkers(), input.const_data_ptr(), values.const_data_ptr(),
                                dense_bias ? dense_bias->const_data_ptr() : nullptr, y.mutable_data_ptr());
  return y;
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& values, const Tensor& index, int64_t in_features) {
  const char* op = "linear_dgrad";
  check_activation(op, "dy", dy, "[M, out]");
  const DType dtype = kernel_dtype(op, "dy", dy);
  check_values(op, "values", values, "dy", dy);
  const cpu::LinearShape shape{dy.size(0), in_features, dy.size(1), values.size(1), values.size(2)};
  const LayoutView layout = view_linear(op, index, shape, values.size(0), Lists::columns);
  const Tensor gradient = torch::stable::contiguous(dy);
  Tensor dx = torch::stable::new_empty(dy, {shape.m, shape.in});
  advise_huge_pages(dx);
  cpu::kernels().linear_dgrad(dtype, shape, layout, TorchWorkers(), gradient.const_data_ptr(), values.const_data_ptr(),
                              dx.mutable_data_ptr());
  return dx;
}

Tensor linear_wgrad(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo) {
  const char* op = "linear_wgrad";
  const cpu::LinearShape shape = shape_of_gradients(op, dy, x, bi, bo);
  const DType dtype = kernel_dtype(op, "x", x);
  const LayoutView layout = view_linear(op, index, shape, capacity, Lists::rows);
  const Tensor gradient = torch::stable::contiguous(dy), input = torch::stable::contiguous(x);
  Tensor dvalues = torch::stable::new_empty(x, {capacity, bi, bo});
  advise_huge_pages(dvalues);
  cpu::kernels().linear_wgrad(dtype, shape, layout, TorchWorkers(), gradient.const_data_ptr(), input.const_data_ptr(),
                              nullptr, dvalues.mutable_data_ptr(), nullptr);
  return dvalues;
}

std::tuple<Tensor, Tensor> linear_wgrad_saliency(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                 const Tensor& index) {
  const char* op = "linear_wgrad_saliency";
  check_values(op, "values", values, "x", x);
  const cpu::LinearShape shape = shape_of_gradients(op, dy, x, values.size(1), values.size(2));
  const DType dtype = kernel_dtype(op, "x", x);
  const LayoutView layout = view_linear(op, index, shape, values.size(0), Lists::rows);
  const Tensor gradient = torch::stable::contiguous(dy), input = torch::stable::contiguous(x);
  Tensor dvalues = torch::stable::new_empty(x, {values.size(0), shape.bi, shape.bo});
  advise_huge_pages(dvalues);
  Tensor wg = torch::stable::new_empty(x, {layout.rows * layout.columns}, sum_dtype(dtype));
  cpu::kernels().linear_wgrad(dtype, shape, layout, TorchWorkers(), gradient.const_data_ptr(), input.const_data_ptr(),
                              values.const_data_ptr(), dvalues.mutable_data_ptr(), wg.mutable_data_ptr());
  return {dvalues, wg};
}

Tensor linear_probe(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo) {
  const char* op = "linear_probe";
  const cpu::LinearShape shape = shape_of_gradients(op, dy, x, bi, bo);
  const DType dtype = kernel_dtype(op, "x", x);
  const LayoutView layout = view_linear(op, index, shape, capacity, Lists::rows);
  const Tensor gradient = torch::stable::contiguous(dy), input = torch::stable::contiguous(x);
  Tensor squares = torch::stable::new_empty(x, {layout.rows * layout.columns}, sum_dtype(dtype));
  cpu::kernels().linear_probe(dtype, shape, layout, TorchWorkers(), gradient.const_data_ptr(), input.const_data_ptr(),
                              squares.mutable_data_ptr());
  return squares;
}

}  // namespace
}  // namespace dynaprune::bindings

STABLE_TORCH_LIBRARY_IMPL(dynaprune_cpu, CPU, m) {
  using namespace dynaprune::bindings;
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_dgrad", TORCH_BOX(&linear_dgrad));
  m.impl("linear_wgrad", TORCH_BOX(&linear_wgrad));
  m.impl("linear_wgrad_saliency", TORCH_BOX(&linear_wgrad_saliency));
  m.impl("linear_probe", TORCH_BOX(&linear_probe));
}
