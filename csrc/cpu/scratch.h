// Scratch memory, aligned to cache lines. Compiled for every CPU, unlike the kernels that ask for it.
#pragma once

#include <cstdint>

namespace dynaprune::cpu {

// At least `bytes` of memory with unspecified contents, to be given back to free_scratch() with the same `bytes`.
// Throws std::runtime_error where there is not enough memory.
void* allocate_scratch(int64_t bytes);
void free_scratch(void* data, int64_t bytes);

// Bytes of scratch memory that all threads hold, and the most that they held since the last restart of the count.
struct ScratchBytes {
  int64_t held, most;
};

// What was counted so far; with `restart` the most begins anew at what is held.
ScratchBytes scratch_bytes(bool restart);

// What a convolution keeps in the calling thread's scratch memory.
enum ConvScratch { kTables, kPanels, kWorkers, kSums, kScratchKinds };

// The same, valid until the calling thread asks for the same kind again. Kept between calls, because fresh pages cost
// more than the kernels of a small layer.
void* conv_scratch(ConvScratch kind, int64_t bytes);

}  // namespace dynaprune::cpu
