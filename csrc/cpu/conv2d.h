// Block-sparse 2-D convolution on the CPU: forward, input gradient, weight gradient, saliency and probe.
//
// Tensors are dense, in channels-last memory (x [images, height, width, in], y and dy [images, out_h, out_w, out]) or
// in contiguous memory (x [images, in, height, width], y and dy [images, out, out_h, out_w]).
// values and dvalues [capacity, bi, bo]: W[row * bo + o, group_in index c * bi + i, tap] = values[slot, i, o]
// for the entry with column tap * channel_blocks + c. Sums are kept in float (double for f64).
#pragma once

#include "layout_view.h"
#include "types.h"

namespace dynaprune::cpu {

struct ConvShape {
  int64_t images, in, height, width, out, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
  int64_t bi, bo;
  bool x_channels_last;  // of x and dx
  bool y_channels_last;  // of y and dy
};

// One instruction set's kernels. `bias` may be null. conv wgrad: `values` and `block_sums` (one float, double for
// f64, per block: sum of weight x gradient) are both given or both null. All outputs are written everywhere.
struct ConvKernels {
  void (*forward)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* x, const void* values,
                  const void* bias, void* y);
  void (*dgrad)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* dy, const void* values,
                void* dx);
  void (*wgrad)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* dy, const void* x,
                const void* values, void* dvalues, void* block_sums);
  void (*probe)(DType, const ConvShape&, const LayoutView&, const Workers&, const void* dy, const void* x,
                void* norms);
};

namespace avx512 {
extern const ConvKernels conv_kernels;
}
namespace avx2 {
extern const ConvKernels conv_kernels;
}
namespace generic {
extern const ConvKernels conv_kernels;
}

// What a call keeps in the calling thread's scratch memory.
enum ConvScratch { kTables, kPanels, kWorkers, kSums, kScratchKinds };

// At least `bytes` of 64-byte aligned memory with unspecified contents, valid until the calling thread asks for the
// same kind again. Kept between calls, because fresh pages cost more than the kernels of a small layer.
// Throws std::bad_alloc when there is not enough memory.
void* conv_scratch(ConvScratch kind, int64_t bytes);

}  // namespace dynaprune::cpu
