// The launchers of Hopper's kernels, compiled for sm_90a alone; arguments as in launchers.h.
#pragma once

#ifdef DYN_EMULATION
#include "core/device.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "core/problem.h"

namespace dynaprune::cuda {

// Whether the launchers below can run the problem: 16-bit types; blocks of 64 or 128, because a row of a panel that
// wgmma reads is 64 elements (smaller blocks run on the sm_80 kernels, which run on every later device); a device of
// capability 9.0 and a driver that makes tensor maps; coordinates of 32 bits; something to do.
bool runs_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks);

// The same of convolutions, besides: padding and kernels within the bounds of im2col maps; at most four stride phases,
// because dgrad takes a map for each; groups of whole blocks of inputs, because a copy brings 64 channels, and those of
// the next group times the zeros of a block's padding may be NaN; pixels, and elements of an image, that 32 bits can
// count.
bool runs_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks);

cudaError_t linear_forward_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* x,
                                const void* values, const void* bias, void* y);
cudaError_t linear_dgrad_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* dy,
                              const void* values, void* dx);
size_t linear_wgrad_workspace_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks);
cudaError_t linear_wgrad_sm90(Target target, DType dtype, LinearShape shape, Blocks blocks, const void* dy,
                              const void* x, const void* values, void* dvalues, float* wg, void* workspace);

cudaError_t conv2d_forward_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* x,
                                const void* values, const void* bias, void* y);
cudaError_t conv2d_dgrad_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* dy,
                              const void* values, void* dx);
size_t conv2d_wgrad_workspace_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks);
cudaError_t conv2d_wgrad_sm90(Target target, DType dtype, Conv2dShape shape, Blocks blocks, const void* dy,
                              const void* x, const void* values, void* dvalues, float* wg, void* workspace);

}  // namespace dynaprune::cuda
