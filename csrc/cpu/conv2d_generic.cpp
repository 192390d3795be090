#define DYNAPRUNE_ISA_GENERIC
#include "simd.h"

#include "conv2d_kernels.inc"

namespace dynaprune::cpu::generic {

const ConvKernels conv_kernels = {conv_forward, conv_dgrad, conv_wgrad, conv_probe};

}  // namespace dynaprune::cpu::generic
