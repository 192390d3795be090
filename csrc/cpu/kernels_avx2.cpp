#if defined(__x86_64__)
#define DYNAPRUNE_ISA_AVX2
#include "kernel_table.h"
#endif
