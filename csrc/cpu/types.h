// Plain types shared by every instruction set. Nothing here may emit code: a weak inline function compiled with
// AVX-512 encodings could be the copy that the linker keeps for every CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynaprune::cpu {

// bfloat16 by its bits; conversions live in simd.h, once per instruction set.
struct bf16 {
  uint16_t bits;
};

enum class DType { float32, bfloat16, float64 };

// Runs body(context, item, worker) once for every item in [0, items). Items are handed out dynamically, so an item
// must own its outputs and its result must not depend on `worker` (0 <= worker < count), which only selects scratch.
struct Workers {
  int64_t count;
  void (*run)(int64_t items, void (*body)(void* context, int64_t item, int64_t worker), void* context);
};

}  // namespace dynaprune::cpu
