// Scratch memory, aligned to cache lines. Compiled for every CPU, unlike the kernels that ask for it.
#pragma once

#include <cstdint>

namespace dynaprune::cpu {

// At least `bytes` of memory with unspecified contents, to be given back to free().
// Throws std::runtime_error where there is not enough memory.
void* allocate_scratch(int64_t bytes);

// What a convolution keeps in the calling thread's scratch memory.
enum ConvScratch { kTables, kPanels, kWorkers, kSums, kScratchKinds };

// The same, valid until the calling thread asks for the same kind again. Kept between calls, because fresh pages cost
// more than the kernels of a small layer.
void* conv_scratch(ConvScratch kind, int64_t bytes);

}  // namespace dynaprune::cpu
