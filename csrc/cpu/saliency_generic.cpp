#define DYNAPRUNE_ISA_GENERIC
#include "saliency_kernels.inc"
