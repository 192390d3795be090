#if defined(__x86_64__)
#define DYNAPRUNE_ISA_AVX2
#include "linear_table.inc"
#endif
