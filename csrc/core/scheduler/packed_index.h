// Who does what: thread blocks find their share of a packed index, whose counts only the device knows.
//
// Nothing in an index is trusted, since anything may have written to it. A number is compared with its bound, unsigned,
// between being read and being used, so that no access leaves the index or a tensor and no loop is longer than the
// capacity. What such a number spoils counts as absent: a block, or all of a list whose pointers are wrong. Results of
// an index that is wrong are not defined, and may be what their memory held before.
#pragma once

#include "core/device.h"
#include "layout_view.h"

namespace dynaprune::cuda {

// A comparison that keeps accesses inside of memory; a test of the emulation can leave it out (emulation/left_out.h).
#ifdef DYN_EMULATION
#define DYN_GUARD(guard, condition) (emulation::left_out(emulation::guard) || (condition))
#else
#define DYN_GUARD(guard, condition) (condition)
#endif

// capacity, rows and columns: those of the view, each below 2^31.
DYN_DEVICE bool is_slot(int slot, int64_t capacity) {
  return DYN_GUARD(kGuardSlot, uint32_t(slot) < uint32_t(capacity));
}
DYN_DEVICE bool is_row(int row, int64_t rows) { return DYN_GUARD(kGuardRow, uint32_t(row) < uint32_t(rows)); }
DYN_DEVICE bool is_column(int column, int64_t columns) {
  return DYN_GUARD(kGuardColumn, uint32_t(column) < uint32_t(columns));
}
DYN_DEVICE bool is_block(int block, const LayoutView& view) {
  return DYN_GUARD(kGuardBlock, uint32_t(block) < uint32_t(view.rows * view.columns));
}

// Entries begin .. end of a list, all below the capacity.
struct Entries {
  int begin, end;
};

DYN_DEVICE Entries entries_of(const LayoutView& view, const int32_t* pointers, int64_t list) {
  const uint32_t begin = uint32_t(pointers[list]), end = uint32_t(pointers[list + 1]);
  const bool right = DYN_GUARD(kGuardPointers, begin <= end && end <= uint32_t(view.capacity));
  return right ? Entries{int(begin), int(end)} : Entries{0, 0};
}

// The list at a rank; where the order names none, one of the same number, so that outputs are likelier to be written.
DYN_DEVICE int list_at(const int32_t* order, int rank, int64_t lists) {
  const int list = order[rank];
  return DYN_GUARD(kGuardOrder, uint32_t(list) < uint32_t(lists)) ? list : rank;
}

// Whether a number is that of an entry in use.
DYN_DEVICE bool is_entry(const LayoutView& view, int64_t entry) {
  return entry < view.header[0] && DYN_GUARD(kGuardEntry, entry < view.capacity);
}

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
    if (!is_entry(view, program)) return {0, 0, 0};
    const int slot = view.row_slots[program];
    if (!is_slot(slot, view.capacity)) return {0, 0, 0};
    const int block = view.block_of_slot[slot];
    return is_block(block, view) ? Chunk{int(block / view.columns), program, program + 1} : Chunk{0, 0, 0};
  }
  int low = 0, high = int(view.rows) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (view.row_ptr[middle] / merge + middle <= program)
      low = middle;
    else
      high = middle - 1;
  }
  const auto [begin, end] = entries_of(view, view.row_ptr, low);
  // Wrong pointers may have led the bisection past the program's row: no entry before the row is taken.
  const int counted = begin + (program - begin / merge - low) * merge;
  const int first = counted < begin ? begin : counted;
  return {low, first, end < first + merge ? end : first + merge};
}

// Whether the block is listed: bisection among the ascending columns of its row.
DYN_DEVICE bool is_live(const LayoutView& view, int64_t row, int64_t column) {
  auto [low, high] = entries_of(view, view.row_ptr, row);
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
  const int block = view.block_of_slot[slot];
  if (!is_block(block, view)) return false;
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
