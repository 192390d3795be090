// Who does what: thread blocks find their share of a packed index, whose counts only the device knows.
#pragma once

#include "core/device.h"
#include "layout_view.h"

namespace dynaprune::cuda {

constexpr int kTilesPerGroup = 8;  // row tiles that share a list's blocks in L2

struct TileOfProgram {
  int64_t tile;  // of rows
  int rank;      // of the list, longest first
};

DYN_DEVICE TileOfProgram tile_of_program(int64_t program, int64_t tiles, int64_t lists) {
  const int64_t first = program / (kTilesPerGroup * lists) * kTilesPerGroup;
  const int64_t left = tiles - first, group = left < kTilesPerGroup ? left : kTilesPerGroup;
  const int64_t within = program % (kTilesPerGroup * lists);
  return {first + within % group, int(within / group)};
}

// Entries begin .. end of the list of `row`; none where begin >= end.
struct Chunk {
  int row, begin, end;
};

// Thread blocks that cover every chunk of `merge` live blocks of a row, whatever the mask.
DYN_HOST_DEVICE int64_t chunk_count(int64_t rows, int64_t capacity, int merge) {
  return merge == 1 ? capacity : capacity / merge + rows;
}

// The program-th chunk of at most `merge` live blocks of one row. Row r owns the chunks from row_ptr[r] / merge + r on:
// that leaves it enough of them and grows with r, so that the row is found by bisection.
DYN_DEVICE Chunk chunk_of_program(const LayoutView& view, int program, int merge) {
  if (view.rows == 0) return {0, 0, 0};
  if (merge == 1) {
    if (program >= view.header[0]) return {0, 0, 0};
    return {int(view.block_of_slot[view.row_slots[program]] / view.columns), program, program + 1};
  }
  int low = 0, high = int(view.rows) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (view.row_ptr[middle] / merge + middle <= program)
      low = middle;
    else
      high = middle - 1;
  }
  const int begin = view.row_ptr[low], end = view.row_ptr[low + 1];
  const int first = begin + (program - begin / merge - low) * merge;
  return {low, first, end < first + merge ? end : first + merge};
}

// Whether the block is listed: bisection among the ascending columns of its row.
DYN_DEVICE bool is_live(const LayoutView& view, int64_t row, int64_t column) {
  int low = view.row_ptr[row], high = view.row_ptr[row + 1];
  const int end = high;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (view.row_cols[middle] < column)
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && view.row_cols[low] == column;
}

// Whether the slot belongs to a listed block. Slots of suspended blocks exist only where more slots are used than
// listed.
DYN_DEVICE bool is_listed(const LayoutView& view, int64_t slot) {
  const int64_t block = view.block_of_slot[slot];
  if (block < 0) return false;
  return view.header[0] == view.header[2] || is_live(view, block / view.columns, block % view.columns);
}

// The program's share of what no live block writes: zeros in unlisted slots of dvalues [capacity, elements], elements a
// multiple of 256, and, unless null, in wg [rows * columns].
template <class T>
DYN_DEVICE void zero_unlisted(const LayoutView& view, int64_t program, int64_t programs, int64_t elements, T* dvalues,
                              float* wg) {
  for (int64_t slot = program; slot < view.capacity; slot += programs) {
    if (is_listed(view, slot)) continue;
    for (int64_t e = int64_t(thread()) * Vector16<T>::kSize; e < elements; e += int64_t(threads()) * Vector16<T>::kSize)
      store16(dvalues + slot * elements + e, Vector16<T>{});
  }
  if (wg == nullptr) return;
  const int64_t blocks = view.rows * view.columns;
  for (int64_t b = program * threads() + thread(); b < blocks; b += programs * threads())
    if (!is_live(view, b / view.columns, b % view.columns)) wg[b] = 0.0f;
}

}  // namespace dynaprune::cuda
