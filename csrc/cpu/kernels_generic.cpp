#define DYNAPRUNE_ISA_GENERIC
#include "kernel_table.h"
