#define DYNAPRUNE_ISA_GENERIC
#include "linear_table.inc"
