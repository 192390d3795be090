#if defined(__x86_64__)
#define DYNAPRUNE_ISA_AVX2
#include "simd.h"

#include "conv2d_kernels.inc"

namespace dynaprune::cpu::avx2 {

const ConvKernels conv_kernels = {conv_forward, conv_dgrad, conv_wgrad, conv_probe};

}  // namespace dynaprune::cpu::avx2
#endif
