// Block-sparse convolutions of the library `dynaprune_cuda`, over images in NHWC memory.
#include "bindings/cuda_common.h"

namespace dynaprune::bindings {
namespace {

using cuda::Conv2dShape;

// Images [N, H, W, channels], each of `groups` groups of channels followed by zeros up to a multiple of 16.
void check_images(const char* op, const char* name, const Tensor& t, int64_t channels, int64_t groups) {
  check_cuda(op, name, t);
  check_dim(op, name, t, 4, "[N, H, W, C]");
  const int64_t expected = groups * whole_16(channels / groups);
  STD_TORCH_CHECK(t.size(3) == expected, op, ": expected ", name, " with ", expected, " channels (", channels, " in ",
                  groups, " groups of whole 16s), got shape ", shape_of(t));
  check_contiguous(op, name, t);
  check_storage(op, name, t);
  STD_TORCH_CHECK(aligned(t), op, ": expected ", name, " aligned to 16 bytes");
  check_count(op, "pixels", {t.size(0), t.size(1), t.size(2)});
  check_count(op, "elements per image", {t.size(1), t.size(2), t.size(3)});
}

// The sizes of a convolution from those of its input [N, C, H, W].
Conv2dShape conv_shape(const char* op, const Ints& input, int64_t out, int64_t bi, int64_t bo, const Ints& conv) {
  check_block(op, bi, bo);
  check_conv(op, conv);
  STD_TORCH_CHECK(input.size() == 4, op, ": expected an input size [N, C, H, W], got ", input.size(), " numbers");
  STD_TORCH_CHECK(input[0] >= 0 && input[1] >= 1 && input[2] >= 1 && input[3] >= 1 && out >= 1, op,
                  ": expected sizes of at least 1 (0 images are allowed), got input [", input[0], ", ", input[1], ", ",
                  input[2], ", ", input[3], "] and ", out, " output channels");
  for (const int64_t size : {input[0], input[1], input[2], input[3], out}) check_size(op, "sizes", size);
  const int64_t groups = conv[8];
  check_conv_channels(op, input[1], out, groups, bo);
  const int64_t out_h = output_length(op, input[2], conv[0], conv[2], conv[4], conv[6]);
  const int64_t out_w = output_length(op, input[3], conv[1], conv[3], conv[5], conv[7]);
  const int64_t padded_h = input[2] + 2 * conv[4], padded_w = input[3] + 2 * conv[5];
  check_size(op, "padded height", padded_h);
  check_size(op, "padded width", padded_w);
  checked_product(op, "padded pixels", {input[0], padded_h, padded_w});
  const auto at = [&](int i) { return static_cast<int>(conv[i]); };
  return {input[0],
          input[1],
          input[2],
          input[3],
          out,
          out_h,
          out_w,
          at(0),
          at(1),
          at(2),
          at(3),
          at(4),
          at(5),
          at(6),
          at(7),
          at(8),
          groups * whole_16(input[1] / groups),
          whole_16(out)};
}

Blocks conv_blocks(const char* op, const Tensor& index, const Tensor& beside, const Conv2dShape& s, int64_t capacity,
                   int64_t bi, int64_t bo) {
  const int64_t channel_blocks = ceil_div(s.in_channels / s.groups, bi);
  const int64_t columns = checked_product(op, "block columns", {s.kernel_h, s.kernel_w, channel_blocks});
  const int64_t lists = checked_product(op, "column lists", {s.groups, channel_blocks, s.stride_h, s.stride_w});
  return blocks_of(op, index, beside, ceil_div(s.out_channels, bo), columns, lists, capacity, bi, bo);
}

void check_output_gradient(const char* op, const Tensor& dy, const Conv2dShape& s) {
  check_images(op, "dy", dy, s.out_channels, 1);
  STD_TORCH_CHECK(dy.size(0) == s.images && dy.size(1) == s.out_h && dy.size(2) == s.out_w, op, ": expected dy [",
                  s.images, ", ", s.out_h, ", ", s.out_w, ", channels], got shape ", shape_of(dy));
}

Tensor conv2d_forward(const Tensor& x, const Tensor& values, std::optional<Tensor> bias, const Tensor& index,
                      int64_t in_channels, int64_t out_channels, const Ints& conv, bool tf32) {
  const char* op = "conv2d_forward";
  check_dim(op, "x", x, 4, "[N, H, W, C]");
  check_values(op, values, "x", x);
  const Conv2dShape shape = conv_shape(op, {x.size(0), in_channels, x.size(1), x.size(2)}, out_channels, values.size(1),
                                       values.size(2), conv);
  check_images(op, "x", x, in_channels, shape.groups);
  check_count(op, "output pixels", {shape.images, shape.out_h, shape.out_w});
  const Blocks blocks = conv_blocks(op, index, x, shape, values.size(0), values.size(1), values.size(2));
  const std::optional<Tensor> offsets = checked_bias(op, bias, out_channels, x);
  const DType dtype = kernel_dtype(op, "x", x);
  const OnDevice device(x);
  Tensor y = torch::stable::new_empty(x, {shape.images, shape.out_h, shape.out_w, out_channels});
  check_success(op, cuda::conv2d_forward(device.target, dtype, precision_of(tf32), shape, blocks, x.const_data_ptr(),
                                         values.const_data_ptr(), offsets ? offsets->const_data_ptr() : nullptr,
                                         y.mutable_data_ptr()));
  return y;
}

Tensor conv2d_dgrad(const Tensor& dy, const Tensor& values, const Tensor& index, int64_t out_channels,
                    const Ints& input_size, const Ints& conv, bool tf32) {
  const char* op = "conv2d_dgrad";
  check_values(op, values, "dy", dy);
  const Conv2dShape shape = conv_shape(op, input_size, out_channels, values.size(1), values.size(2), conv);
  check_output_gradient(op, dy, shape);
  check_count(op, "input pixels", {shape.images, shape.in_h, shape.in_w});
  const Blocks blocks = conv_blocks(op, index, dy, shape, values.size(0), values.size(1), values.size(2));
  const DType dtype = kernel_dtype(op, "dy", dy);
  const OnDevice device(dy);
  Tensor dx = torch::stable::new_empty(dy, {shape.images, shape.in_h, shape.in_w, shape.in_channels});
  check_success(op, cuda::conv2d_dgrad(device.target, dtype, precision_of(tf32), shape, blocks, dy.const_data_ptr(),
                                       values.const_data_ptr(), dx.mutable_data_ptr()));
  return dx;
}

// The sizes of a weight gradient from both activations.
Conv2dShape gradient_shape(const char* op, const Tensor& dy, const Tensor& x, int64_t in, int64_t out, int64_t bi,
                           int64_t bo, const Ints& conv) {
  check_dim(op, "x", x, 4, "[N, H, W, C]");
  const Conv2dShape shape = conv_shape(op, {x.size(0), in, x.size(1), x.size(2)}, out, bi, bo, conv);
  check_images(op, "x", x, in, shape.groups);
  check_output_gradient(op, dy, shape);
  check_beside(op, "dy", dy, x);
  check_same_dtype(op, "dy", dy, "x", x);
  return shape;
}

void run_wgrad(const char* op, const Tensor& dy, const Tensor& x, const Conv2dShape& shape, const Blocks& blocks,
               bool tf32, const void* values, const Tensor& dvalues, float* wg) {
  const DType dtype = kernel_dtype(op, "x", x);
  const OnDevice device(x);
  const Tensor scratch = workspace(x, cuda::conv2d_wgrad_workspace(device.target, dtype, shape, blocks));
  check_success(
      op, cuda::conv2d_wgrad(device.target, dtype, precision_of(tf32), shape, blocks, dy.const_data_ptr(),
                             x.const_data_ptr(), values, dvalues.mutable_data_ptr(), wg, scratch.mutable_data_ptr()));
}

Tensor conv2d_wgrad(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo,
                    int64_t in_channels, int64_t out_channels, const Ints& conv, bool tf32) {
  const char* op = "conv2d_wgrad";
  const Conv2dShape shape = gradient_shape(op, dy, x, in_channels, out_channels, bi, bo, conv);
  const Blocks blocks = conv_blocks(op, index, x, shape, capacity, bi, bo);
  Tensor dvalues = torch::stable::new_empty(x, {capacity, bi, bo});
  run_wgrad(op, dy, x, shape, blocks, tf32, nullptr, dvalues, nullptr);
  return dvalues;
}

std::tuple<Tensor, Tensor> conv2d_wgrad_saliency(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                 const Tensor& index, int64_t in_channels, int64_t out_channels,
                                                 const Ints& conv, bool tf32) {
  const char* op = "conv2d_wgrad_saliency";
  check_values(op, values, "x", x);
  const Conv2dShape shape = gradient_shape(op, dy, x, in_channels, out_channels, values.size(1), values.size(2), conv);
  const Blocks blocks = conv_blocks(op, index, x, shape, values.size(0), values.size(1), values.size(2));
  Tensor dvalues = torch::stable::new_empty(x, {blocks.capacity, blocks.bi, blocks.bo});
  Tensor wg = new_sums(x, blocks.rows * blocks.columns);
  run_wgrad(op, dy, x, shape, blocks, tf32, values.const_data_ptr(), dvalues, floats(wg));
  return {dvalues, wg};
}

Tensor conv2d_probe(const Tensor& dy, const Tensor& x, const Tensor& index, int64_t capacity, int64_t bi, int64_t bo,
                    int64_t in_channels, int64_t out_channels, const Ints& conv, const Tensor& probe, bool tf32) {
  const char* op = "conv2d_probe";
  const Conv2dShape shape = gradient_shape(op, dy, x, in_channels, out_channels, bi, bo, conv);
  const Blocks blocks = conv_blocks(op, index, x, shape, capacity, bi, bo);
  const bool* wanted = checked_flag(op, probe, x);
  const DType dtype = kernel_dtype(op, "x", x);
  const OnDevice device(x);
  Tensor squares = new_sums(x, blocks.rows * blocks.columns);
  check_success(op, cuda::conv2d_probe(device.target, dtype, precision_of(tf32), shape, blocks, dy.const_data_ptr(),
                                       x.const_data_ptr(), wanted, floats(squares)));
  return squares;
}

}  // namespace
}  // namespace dynaprune::bindings

DYN_IMPLEMENT(m) {
  using namespace dynaprune::bindings;
  m.impl("conv2d_forward", TORCH_BOX(&conv2d_forward));
  m.impl("conv2d_dgrad", TORCH_BOX(&conv2d_dgrad));
  m.impl("conv2d_wgrad", TORCH_BOX(&conv2d_wgrad));
  m.impl("conv2d_wgrad_saliency", TORCH_BOX(&conv2d_wgrad_saliency));
  m.impl("conv2d_probe", TORCH_BOX(&conv2d_probe));
}
