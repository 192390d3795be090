// Launchers of the Hopper kernels of convolutions: which pixels copies walk through.
#include "core/gather/pixels_sm90.h"

#include "core/launchers_sm90.h"
#include "core/launch/run_sm90.h"

namespace dynaprune::cuda {
namespace {

using sm90::Images;
using sm90::Walk;

// One axis of a convolution.
struct Axis {
  int64_t in, out;
  int kernel, stride, pad, dilation;

  // The taps' largest shift: of the pixels of x, and of those of dy that a phase reads.
  int reach() const { return dilation * (kernel - 1); }
  int phase_reach() const { return reach() / stride; }

  // The pixels of x that the first tap sees from the output pixels.
  Walk input() const { return {-pad, out, stride}; }
  // The pixels of dy that the last tap gives to a phase's input pixels. Where there are none, nothing is copied, but a
  // map wants one.
  Walk output(int phase) const {
    const int first = ((phase - pad) % stride + stride) % stride;
    const int64_t count = ceil_div(in - first, int64_t(stride));
    return {(first + pad) / stride - phase_reach(), count > 0 ? count : 1, 1};
  }

  bool runs() const {
    bool fits = input().fits(in, reach());
    for (int phase = 0; phase < stride; ++phase) fits = fits && output(phase).fits(out, phase_reach());
    return fits;
  }
};

Axis axis_h(const Conv2dShape& s) { return {s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h}; }
Axis axis_w(const Conv2dShape& s) { return {s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w}; }

cudaError_t map_inputs(sm90::Im2colMap& map, DType dtype, const Conv2dShape& s, const void* x, int pixels) {
  const Images images{x, s.x_channels, s.in_h, s.in_w, s.images, s.x_channels};
  return make_im2col_map(map, dtype, images, axis_h(s).input(), axis_w(s).input(), pixels);
}

int64_t output_positions(const Conv2dShape& s) { return s.images * s.out_h * s.out_w; }

template <class T>
cudaError_t dgrad(const Target& target, DType dtype, const Conv2dShape& s, const Blocks& blocks, const void* dy,
                  const void* values, void* dx) {
  const Axis h = axis_h(s), w = axis_w(s);
  const int64_t largest = s.images * ceil_div(s.in_h, int64_t(s.stride_h)) * ceil_div(s.in_w, int64_t(s.stride_w));
  const auto fill = [&](sm90::InputPixels& rows, int pixels) {
    rows.s = sizes_of(s, blocks);
    rows.largest_phase = int(largest);
    rows.reach_h = h.phase_reach();
    rows.reach_w = w.phase_reach();
    rows.ragged = int(s.out_channels / blocks.bo);
    const Images images{dy, s.dy_channels, s.out_h, s.out_w, s.images, s.dy_channels};
    for (int phase = 0; phase < s.stride_h * s.stride_w; ++phase) {
      const cudaError_t error = make_im2col_map(rows.dy[phase], dtype, images, h.output(phase / s.stride_w),
                                                w.output(phase % s.stride_w), pixels);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  };
  const sm90::Product<T> product{view_of(blocks), nullptr, static_cast<T*>(dx)};
  return sm90::run_product<sm90::InputPixels>(target, dtype, blocks, largest, s.out_channels, values, product, fill);
}

}  // namespace

bool runs_sm90(Target target, DType dtype, Conv2dShape s, Blocks blocks) {
  return sm90::runs(target, dtype, blocks) && s.images > 0 && fits(s) && fits_int32(s.in_h * s.in_w * s.x_channels) &&
         fits_int32(s.out_h * s.out_w * s.dy_channels) && int64_t(s.stride_h) * s.stride_w <= sm90::kMostPhases &&
         axis_h(s).runs() && axis_w(s).runs() && (s.groups == 1 || s.in_channels / s.groups % blocks.bi == 0);
}

cudaError_t conv2d_forward_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* x,
                                const void* values, const void* bias, void* y) {
  const int64_t positions = output_positions(shape), group_channels = shape.in_channels / shape.groups;
  const auto fill = [&](sm90::OutputPixels& rows, int pixels) {
    rows.s = sizes_of(shape, blocks);
    rows.positions = int(positions);
    rows.ragged = int(group_channels / blocks.bi);
    return map_inputs(rows.x, dtype, shape, x, pixels);
  };
  return sm90::by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const sm90::Product<T> product{view_of(blocks), static_cast<const T*>(bias), static_cast<T*>(y)};
    return sm90::run_product<sm90::OutputPixels>(target, dtype, blocks, positions, group_channels, values, product,
                                                 fill);
  });
}

cudaError_t conv2d_dgrad_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* dy,
                              const void* values, void* dx) {
  return sm90::by_type(dtype, [&](auto zero) {
    return dgrad<decltype(zero)>(target, dtype, shape, blocks, dy, values, dx);
  });
}

size_t conv2d_wgrad_workspace_sm90(Target target, DType, Conv2dShape shape, Blocks blocks) {
  return sm90::plan_wgrad(target, blocks, output_positions(shape)).workspace(blocks);
}

cudaError_t conv2d_wgrad_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* dy,
                              const void* x, const void* values, void* dvalues, float* wg, void* workspace) {
  sm90::SeenInputs inputs{{}, sizes_of(shape, blocks)};
  const cudaError_t error = map_inputs(inputs.x, dtype, shape, x, sm90::kDepth);
  if (error != cudaSuccess) return error;
  const int64_t positions = output_positions(shape), stride = shape.dy_channels;
  const sm90::Matrices gradient{dy, shape.out_channels, positions, 1, stride, positions * stride};
  return sm90::by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return sm90::run_wgrad(target, dtype, blocks, inputs, gradient, inputs.s.channel_blocks.value,
                           shape.in_channels / shape.groups, static_cast<const T*>(values), static_cast<T*>(dvalues),
                           wg, workspace);
  });
}

}  // namespace dynaprune::cuda
