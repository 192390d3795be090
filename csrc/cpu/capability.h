// Which instruction set's kernels run here.
#pragma once

namespace dynaprune::cpu {

enum class Capability { generic, avx2, avx512 };

// The best set this CPU has, or the lower one that DYNAPRUNE_CPU_CAPABILITY ("avx512", "avx2", "neon", "generic") names;
// read once. Throws std::runtime_error when the name is unknown or asks for a set that the CPU lacks.
Capability capability();

// "avx512", "avx2", "neon" (the generic kernels' 128-bit vectors on ARM) or "generic".
const char* capability_name();

}  // namespace dynaprune::cpu
