// The block-sparse kernels of the CPU: plain pointers, no torch. dynaprune_kernels/reference.py says what each computes.
//
// One table of functions for each instruction set. All take (dtype, sizes, index, workers, inputs, outputs). Tensors
// are dense and of one dtype; sums and statistics are float, or double for float64. Every element of an output is written.
// Results are bitwise the same for any number of workers. Where there is no scratch memory a function throws
// std::runtime_error, on the thread that called it; what is an output then has unspecified contents.
#pragma once

#include "layout_view.h"
#include "types.h"

namespace dynaprune::cpu {

struct LinearShape {
  int64_t m;    // rows of x and dy
  int64_t in;   // columns of x
  int64_t out;  // columns of dy and y
  int64_t bi;   // inputs of a block
  int64_t bo;   // outputs of a block
};

// Tensors are in channels-last memory (x [images, height, width, in], y and dy [images, out_h, out_w, out]) or in
// contiguous memory (x [images, in, height, width], y and dy [images, out, out_h, out_w]).
// values and dvalues [capacity, bi, bo]: W[row * bo + o, group_in index c * bi + i, tap] = values[slot, i, o]
// for the entry with column tap * channel_blocks + c.
struct ConvShape {
  int64_t images, in, height, width, out, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
  int64_t bi, bo;
  bool x_channels_last;  // of x and dx
  bool y_channels_last;  // of y and dy
};

struct Kernels {
  // y [m, out] = x [m, in] W^T + bias [out], which may be null
  void (*linear_forward)(DType, const LinearShape&, const LayoutView&, const Workers&, const void* x,
                         const void* values, const void* bias, void* y);
  // dx [m, in] = dy [m, out] W
  void (*linear_dgrad)(DType, const LinearShape&, const LayoutView&, const Workers&, const void* dy,
                       const void* values, void* dx);
  // dvalues [capacity, bi, bo] = blocks of dy^T x at live blocks, zeros in every other slot. `values` and
  // block_sums [R * C] are both given or both null: sum over each live block of value * gradient, zero elsewhere.
  void (*linear_wgrad)(DType, const LinearShape&, const LayoutView&, const Workers&, const void* dy, const void* x,
                       const void* values, void* dvalues, void* block_sums);
  // squares [R * C] = sum of squares of dy^T x over each block that is not live, zero at live ones
  void (*linear_probe)(DType, const LinearShape&, const LayoutView&, const Workers&, const void* dy, const void* x,
                       void* squares);

  // The same of a convolution.
  void (*conv2d_forward)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* x,
                         const void* values, const void* bias, void* y);
  void (*conv2d_dgrad)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* dy,
                       const void* values, void* dx);
  void (*conv2d_wgrad)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* dy, const void* x,
                       const void* values, void* dvalues, void* block_sums);
  void (*conv2d_probe)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* dy, const void* x,
                       void* squares);

  // stats [4, R * C]: per live block sum w^2, sum g^2, sum |w g|, sum w g, zero elsewhere. neuron [R * bo]: sum of w g
  // over every live block of an output's row. Blocks of bi x bo are read whole, padding included.
  void (*block_saliency)(DType, int64_t bi, int64_t bo, const LayoutView&, const Workers&, const void* values,
                         const void* grad, void* stats, void* neuron);
};

namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// Those of the set that capability() chose.
const Kernels& kernels();

}  // namespace dynaprune::cpu
