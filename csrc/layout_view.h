// The packed index of a live mask, seen as raw pointers (see BlockLayout for the meaning of each section).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DYN_LAYOUT_INLINE static inline __host__ __device__
#else
#define DYN_LAYOUT_INLINE static inline  // never a weak symbol: see cpu/types.h
#endif

namespace dynaprune {

struct LayoutView {
  int64_t rows;      // R, block rows
  int64_t columns;   // C, block columns (conv: taps * channel blocks)
  int64_t lists;     // P, column lists (linear: C; conv: groups * channel blocks * stride phases)
  int64_t capacity;  // slots
  const int32_t* header;         // [8] n_live, overflow, n_slots, faults, 0...
  const int32_t* block_of_slot;  // [capacity] row * C + column, -1 when free
  const int32_t* row_ptr;        // [R + 1]
  const int32_t* row_cols;       // [capacity]
  const int32_t* row_slots;      // [capacity]
  const int32_t* col_ptr;        // [P + 1]
  const int32_t* col_rows;       // [capacity]
  const int32_t* col_cols;       // [capacity]
  const int32_t* col_slots;      // [capacity]
  const int32_t* row_order;      // [R] rows, most live blocks first
  const int32_t* col_order;      // [P] lists, most live blocks first
};

DYN_LAYOUT_INLINE int64_t packed_index_size(int64_t rows, int64_t lists, int64_t capacity) {
  return 8 + (rows + 1) + (lists + 1) + 6 * capacity + rows + lists;
}

DYN_LAYOUT_INLINE LayoutView layout_view(const int32_t* index, int64_t rows, int64_t columns, int64_t lists,
                                         int64_t capacity) {
  LayoutView v;
  v.rows = rows;
  v.columns = columns;
  v.lists = lists;
  v.capacity = capacity;
  v.header = index;
  v.block_of_slot = v.header + 8;
  v.row_ptr = v.block_of_slot + capacity;
  v.row_cols = v.row_ptr + rows + 1;
  v.row_slots = v.row_cols + capacity;
  v.col_ptr = v.row_slots + capacity;
  v.col_rows = v.col_ptr + lists + 1;
  v.col_cols = v.col_rows + capacity;
  v.col_slots = v.col_cols + capacity;
  v.row_order = v.col_slots + capacity;
  v.col_order = v.row_order + rows;
  return v;
}

#undef DYN_LAYOUT_INLINE

}  // namespace dynaprune
