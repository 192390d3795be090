// torch.ops.dynaprune_cpu.conv2d_*: checks the tensors, copies those that are neither contiguous nor channels-last, and
// calls the kernels. Forward and dgrad answer in channels-last memory or, where that argument is false, contiguous.
//
// conv = [kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups].
#include "bindings/common.h"
#include "cpu/kernels.h"

namespace dynaprune::bindings {
namespace {

using cpu::ConvShape;
using cpu::Lists;
using torch::headeronly::MemoryFormat;

// The sizes of a convolution of an [images, in, height, width] input to `out` channels in bi x bo blocks.
ConvShape conv_shape(const char* op, const int64_t* input, int64_t out, int64_t bi, int64_t bo,
                     const Ints& conv) {
  check_conv(op, conv);
  ConvShape s;
  s.images = input[0];
  s.in = input[1];
  s.height = input[2];
  s.width = input[3];
  s.out = out;
  s.kernel_h = conv[0];
  s.kernel_w = conv[1];
  s.stride_h = conv[2];
  s.stride_w = conv[3];
  s.padding_h = conv[4];
  s.padding_w = conv[5];
  s.dilation_h = conv[6];
  s.dilation_w = conv[7];
  s.groups = conv[8];
  s.bi = bi;
  s.bo = bo;
  s.x_channels_last = s.y_channels_last = true;
  check_block_sizes(op, bi, bo);
  STD_TORCH_CHECK(s.images >= 0 && s.in >= 1 && s.height >= 1 && s.width >= 1 && out >= 1, op,
                  ": expected sizes of at least 1 (0 images are allowed), got input [", s.images, ", ", s.in, ", ",
                  s.height, ", ", s.width, "] and ", out, " output channels");
  for (const int64_t size : {s.in, s.height, s.width, out}) check_size(op, "sizes", size);
  check_conv_channels(op, s.in, out, s.groups, bo);
  s.out_h = output_length(op, s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  s.out_w = output_length(op, s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  return s;
}

struct ConvGrid {
  int64_t rows, channel_blocks, columns, lists;
};
ConvGrid conv_grid(const char* op, const ConvShape& s) {
  const int64_t channel_blocks = ceil_div(s.in / s.groups, s.bi);
  return {ceil_div(s.out, s.bo), channel_blocks,
          checked_product(op, "block columns", {s.kernel_h, s.kernel_w, channel_blocks}),
          checked_product(op, "column lists", {s.groups, channel_blocks, s.stride_h, s.stride_w})};
}

LayoutView view_conv(const char* op, const Tensor& index, const ConvShape& s, int64_t capacity, Lists direction) {
  const ConvGrid grid = conv_grid(op, s);
  const cpu::ListGeometry geometry{s.groups,   grid.channel_blocks, s.kernel_w,  s.stride_h,
                                   s.stride_w, s.dilation_h,        s.dilation_w};
  return view_index(op, index, grid.rows, grid.columns, grid.lists, capacity, direction, &geometry);
}

// A tensor in one of the two formats that the kernels read; where it is in both, channels-last.
struct Image {
  Tensor tensor;
  bool channels_last;
};
Image dense_image(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dim(op, name, t, 4, "[N, C, H, W]");
  check_storage(op, name, t);
  const bool one_channel_or_pixel = t.size(1) == 1 || t.size(2) * t.size(3) == 1;
  if (t.is_contiguous() && !one_channel_or_pixel) return {t, false};
  return {torch::stable::contiguous(t, MemoryFormat::ChannelsLast), true};
}

Tensor new_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

void check_output_gradient(const char* op, const Tensor& dy, const ConvShape& s) {
  STD_TORCH_CHECK(dy.size(0) == s.images && dy.size(2) == s.out_h && dy.size(3) == s.out_w, op, ": expected dy [",
                  s.images, ", ", s.out, ", ", s.out_h, ", ", s.out_w, "], got shape ", shape_of(dy));
}

// Both operands of a weight gradient, with the sizes of their convolution.
struct Gradients {
  Tensor dy, x;
  ConvShape shape;
  DType dtype;
};
Gradients gradients(const char* op, const Tensor& dy, const Tensor& x, int64_t bi, int64_t bo,
                    const Ints& conv) {
  const Image gradient = dense_image(op, "dy", dy), input = dense_image(op, "x", x);
  Gradients g{gradient.tensor, input.tensor, {}, kernel_dtype(op, "x", x)};
  check_same_dtype(op, "dy", dy, "x", x);
  g.shape = conv_shape(op, x.sizes().data(), dy.size(1), bi, bo, conv);
  g.shape.x_channels_last = input.channels_last;
  g.shape.y_channels_last = gradient.channels_last;
  check_output_gradient(op, dy, g.shape);
  return g;
}

void run_wgrad(const Gradients& g, const LayoutView& layout, const void* values, void* dvalues, void* sums) {
  const void *dy = g.dy.const_data_ptr(), *x = g.x.const_data_ptr();
  cpu::kernels().conv2d_wgrad(g.dtype, g.shape, layout, TorchWorkers(), dy, x, values, dvalues, sums);
}

Tensor conv2d_forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& index,
                      int64_t out_channels, const Ints& conv, bool channels_last) {
  const char* op = "conv2d_forward";
  const Image input = dense_image(op, "x", x);
  const DType dtype = kernel_dtype(op, "x", x);
  check_values(op, "values", values, "x", x);
  ConvShape s = conv_shape(op, x.sizes().data(), out_channels, values.size(1), values.size(2), conv);
  s.x_channels_last = input.channels_last;
  s.y_channels_last = channels_last || s.out == 1 || s.out_h * s.out_w == 1;
  const LayoutView layout = view_conv(op, index, s, values.size(0), Lists::rows);
  std::optional<Tensor> dense_bias;
  if (bias) {
    check_cpu(op, "bias", *bias);
    check_bias(op, *bias, out_channels, x);
    dense_bias = torch::stable::contiguous(*bias);
  }
  Tensor y = new_image(x, s.images, s.out, s.out_h, s.out_w, channels_last);
  const void* offsets = dense_bias ? dense_bias->const_data_ptr() : nullptr;
  cpu::kernels().conv2d_forward(dtype, s, layout, TorchWorkers(), input.tensor.const_data_ptr(),
                                values.const_data_ptr(), offsets, y.mutable_data_ptr());
  return y;
}

Tensor conv2d_dgrad(const Tensor& dy, const Tensor& values, const Tensor& index,
                    const Ints& input_size, const Ints& conv, bool channels_last) {
  const char* op = "conv2d_dgrad";
  STD_TORCH_CHECK(input_size.size() == 4, op, ": expected input_size [N, C, H, W], got ", input_size.size(),
                  " numbers");
  const Image gradient = dense_image(op, "dy", dy);
  const DType dtype = kernel_dtype(op, "dy", dy);
  check_values(op, "values", values, "dy", dy);
  ConvShape s = conv_shape(op, input_size.data(), dy.size(1), values.size(1), values.size(2), conv);
  s.x_channels_last = channels_last || s.in == 1 || s.height * s.width == 1;
  s.y_channels_last = gradient.channels_last;
  check_output_gradient(op, dy, s);
  const LayoutView layout = view_conv(op, index, s, values.size(0), Lists::columns);
  Tensor dx = new_image(dy, s.images, s.in, s.height, s.width, channels_last);
  cpu::kernels().conv2d_dgrad(dtype, s, layout, TorchWorkers(), gradient.tensor.const_data_ptr(),
                              values.const_data_ptr(), dx.mutable_data_ptr());
  return dx;
}

Tensor conv2d_wgrad(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo,
                    const Ints& conv) {
  const char* op = "conv2d_wgrad";
  const Gradients g = gradients(op, dy, x, bi, bo, conv);
  const LayoutView layout = view_conv(op, index, g.shape, capacity, Lists::rows);
  Tensor dvalues = torch::stable::new_empty(x, {capacity, bi, bo});
  run_wgrad(g, layout, nullptr, dvalues.mutable_data_ptr(), nullptr);
  return dvalues;
}

std::tuple<Tensor, Tensor> conv2d_wgrad_saliency(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                 const Tensor& index, const Ints& conv) {
  const char* op = "conv2d_wgrad_saliency";
  check_values(op, "values", values, "x", x);
  const Gradients g = gradients(op, dy, x, values.size(1), values.size(2), conv);
  const LayoutView layout = view_conv(op, index, g.shape, values.size(0), Lists::rows);
  Tensor dvalues = torch::stable::new_empty(x, {values.size(0), values.size(1), values.size(2)});
  Tensor sums = torch::stable::new_empty(x, {layout.rows * layout.columns}, sum_dtype(g.dtype));
  run_wgrad(g, layout, values.const_data_ptr(), dvalues.mutable_data_ptr(), sums.mutable_data_ptr());
  return {dvalues, sums};
}

Tensor conv2d_probe(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo,
                    const Ints& conv) {
  const char* op = "conv2d_probe";
  const Gradients g = gradients(op, dy, x, bi, bo, conv);
  const LayoutView layout = view_conv(op, index, g.shape, capacity, Lists::rows);
  Tensor norms = torch::stable::new_empty(x, {layout.rows * layout.columns}, sum_dtype(g.dtype));
  const void *gradient = g.dy.const_data_ptr(), *input = g.x.const_data_ptr();
  cpu::kernels().conv2d_probe(g.dtype, g.shape, layout, TorchWorkers(), gradient, input, norms.mutable_data_ptr());
  return norms;
}

}  // namespace
}  // namespace dynaprune::bindings

STABLE_TORCH_LIBRARY_IMPL(dynaprune_cpu, CPU, m) {
  m.impl("conv2d_forward", TORCH_BOX(&dynaprune::bindings::conv2d_forward));
  m.impl("conv2d_dgrad", TORCH_BOX(&dynaprune::bindings::conv2d_dgrad));
  m.impl("conv2d_wgrad", TORCH_BOX(&dynaprune::bindings::conv2d_wgrad));
  m.impl("conv2d_wgrad_saliency", TORCH_BOX(&dynaprune::bindings::conv2d_wgrad_saliency));
  m.impl("conv2d_probe", TORCH_BOX(&dynaprune::bindings::conv2d_probe));
}
