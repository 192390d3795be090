#if defined(__x86_64__)
#define DYNAPRUNE_ISA_AVX2
#include "saliency_kernels.inc"
#endif
