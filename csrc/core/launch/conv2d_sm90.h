// What conv2d_sm90.cu has for conv2d.cu: launchers of Hopper's kernels, compiled for sm_90a alone.
#pragma once

#ifdef DYN_EMULATION
#include "core/device.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "core/problem.h"

namespace dynaprune::cuda {

// Whether the launchers below can run the problem: type, blocks, device and driver as for linear layers
// (linear_sm90.h); padding and kernels within the bounds of im2col maps; at most four stride phases, because
// dgrad takes a map for each; groups of whole blocks of inputs, because a copy brings 64 channels, and those of the
// next group times the zeros of a block's padding may be NaN; pixels, and elements of an image, that 32 bits can count.
bool runs_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks);

// As the launchers without the suffix (launchers.h), where runs_sm90().
cudaError_t conv2d_forward_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* x,
                                const void* values, const void* bias, void* y);
cudaError_t conv2d_dgrad_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* dy,
                              const void* values, void* dx);
size_t conv2d_wgrad_workspace_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks);
cudaError_t conv2d_wgrad_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* dy,
                              const void* x, const void* values, void* dvalues, float* wg, void* workspace);

}  // namespace dynaprune::cuda
