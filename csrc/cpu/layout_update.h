// The live mask to slots and indices, on the CPU.
#pragma once

#include <cstdint>

namespace dynaprune::cpu {

struct LayoutShape {
  int64_t rows, columns;  // of blocks; columns = kernel_h * kernel_w * channel blocks
  int64_t capacity;
  int64_t groups, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;  // all 1 for a linear layer
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t phases() const { return stride_h * stride_w; }
  int64_t lists() const { return groups * (columns / taps()) * phases(); }
};

// Rewrites mask [rows, columns] (bytes other than 0 count as 1), slot_of_block [rows, columns] and the packed index in
// place: (1) with `release`, blocks that are not in the mask lose their slot; (2) blocks in the mask without a slot get the
// lowest free ones in row-major order, and leave the mask when none is left; (3) index lists are rebuilt.
// O(rows * columns + capacity + groups * columns * phases). Throws std::runtime_error, with nothing written,
// when slot_of_block holds a number below -1, a slot outside the capacity, or one slot twice.
void layout_update(const LayoutShape& shape, bool release, unsigned char* mask, int32_t* slot_of_block,
                   int32_t* index);

}  // namespace dynaprune::cpu
