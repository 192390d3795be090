// The launchers of the CUDA kernels. Each one enqueues its kernels on target.stream of the current device and returns
// without a wait; outputs are written everywhere, except where said otherwise, and nothing is allocated.
//
// Tensors are contiguous unless a stride is named, and aligned to 16 bytes, bias and outputs of the statistics to their
// elements. `values` and `dvalues` are [capacity, bi, bo]. What a slot without a listed block holds is never read.
#pragma once

#ifdef DYN_EMULATION
#include "core/device.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "core/problem.h"

namespace dynaprune::cuda {

// y [tokens, out] = x W^T + bias; bias may be null.
cudaError_t linear_forward(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                           const void* x, const void* values, const void* bias, void* y);

// dx [tokens, in] = dy W.
cudaError_t linear_dgrad(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                         const void* dy, const void* values, void* dx);

// Bytes of workspace, possibly 0.
size_t linear_wgrad_workspace(Target target, DType dtype, LinearShape shape, Blocks blocks);

// dvalues: x^T dy at listed blocks, 0 elsewhere. With values (else null, and wg too) wg [rows * columns]: sums of
// weight x gradient of listed blocks, 0 elsewhere.
cudaError_t linear_wgrad(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                         const void* dy, const void* x, const void* values, void* dvalues, float* wg, void* workspace);

// squares [rows * columns]: squared norm of the dense gradient at blocks that are not listed, 0 at the others.
// `wanted` lies on the device; where it is false everything is 0 and nothing is multiplied.
cudaError_t linear_probe(Target target, DType dtype, Precision precision, LinearShape shape, Blocks blocks,
                         const void* dy, const void* x, const bool* wanted, float* squares);

// As for linear layers: y is [images, out_h, out_w, out_channels], dx [images, in_h, in_w, in_channels].
cudaError_t conv2d_forward(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                           const void* x, const void* values, const void* bias, void* y);
cudaError_t conv2d_dgrad(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* values, void* dx);
size_t conv2d_wgrad_workspace(Target target, DType dtype, Conv2dShape shape, Blocks blocks);
cudaError_t conv2d_wgrad(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* x, const void* values, void* dvalues, float* wg, void* workspace);
cudaError_t conv2d_probe(Target target, DType dtype, Precision precision, Conv2dShape shape, Blocks blocks,
                         const void* dy, const void* x, const bool* wanted, float* squares);

size_t block_saliency_workspace(Blocks blocks);

// stats [4, rows * columns]: per listed block sum w^2, sum g^2, sum |w g|, sum w g, 0 at the others.
// neuron [rows * bo]: sum of w g over every listed block of an output's row. Blocks are read whole, padding included.
cudaError_t block_saliency(Target target, DType dtype, Blocks blocks, const void* values, const void* gradient,
                           float* stats, float* neuron, void* workspace);

size_t layout_update_workspace(LayoutShape shape);

// Rewrites mask and slot_of_block [rows, columns] and the packed index in place: with `release`, blocks that are not
// in the mask lose their slot; blocks in the mask without a slot get the lowest free ones in row-major order, and leave
// the mask when none is left; the lists are rebuilt.
cudaError_t layout_update(Target target, LayoutShape shape, bool release, bool* mask, int32_t* slot_of_block,
                          int32_t* index, void* workspace);

}  // namespace dynaprune::cuda
