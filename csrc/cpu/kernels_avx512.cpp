#if defined(__x86_64__)
#define DYNAPRUNE_ISA_AVX512
#include "kernel_table.h"
#endif
