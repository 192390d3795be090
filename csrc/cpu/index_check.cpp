#include "index_check.h"

namespace dynaprune::cpu {
namespace {

constexpr IndexFault kNone = {nullptr, 0, 0, nullptr};

// `ptr` [lists + 1] begins with 0, never descends and ends with `live`.
IndexFault pointer_fault(const char* section, const int32_t* ptr, int64_t lists, int32_t live) {
  if (ptr[0] != 0) return {section, 0, ptr[0], "0"};
  bool descends = false;
  for (int64_t i = 0; i < lists; ++i) descends |= ptr[i + 1] < ptr[i];
  if (descends)
    for (int64_t i = 0; i < lists; ++i)
      if (ptr[i + 1] < ptr[i]) return {section, i + 1, ptr[i + 1], "no less than the element before"};
  if (ptr[lists] != live) return {section, lists, ptr[lists], "the number of live blocks in the header"};
  return kNone;
}

// `order` has every list once, the longest first and equal ones ascending.
IndexFault order_fault(const char* section, const int32_t* order, const int32_t* ptr, int64_t lists) {
  int64_t length_before = INT64_MAX;
  int32_t before = -1;
  for (int64_t i = 0; i < lists; ++i) {
    const int32_t list = order[i];
    if (uint64_t(list) >= uint64_t(lists)) return {section, i, list, "a number of a list"};
    const int64_t length = int64_t(ptr[list + 1]) - ptr[list];
    if (length > length_before || (length == length_before && list <= before))
      return {section, i, list, "every list once, the longest first"};
    length_before = length;
    before = list;
  }
  return kNone;
}

IndexFault row_entry_fault(const LayoutView& v, int64_t row, int64_t e) {
  const uint32_t column = uint32_t(v.row_cols[e]), slot = uint32_t(v.row_slots[e]);
  if (column >= v.columns) return {"row_cols", e, v.row_cols[e], "a block column of the weight"};
  if (e > v.row_ptr[row] && v.row_cols[e] <= v.row_cols[e - 1])
    return {"row_cols", e, v.row_cols[e], "ascending block columns in a row"};
  if (slot >= v.capacity) return {"row_slots", e, v.row_slots[e], "a slot below the capacity"};
  if (v.block_of_slot[slot] != row * v.columns + column)
    return {"block_of_slot", slot, v.block_of_slot[slot], "the block that lists the slot"};
  return kNone;
}

// `linear`: the column lists are the block columns.
IndexFault row_entries_fault(const LayoutView& v, bool linear) {
  const int32_t* used = v.col_ptr;
  for (int64_t row = 0; row < v.rows; ++row) {
    const int64_t begin = v.row_ptr[row], end = v.row_ptr[row + 1], first_block = row * v.columns;
    int32_t before = -1;
    bool wrong = false;
    for (int64_t e = begin; e < end; ++e) {
      const int32_t column = v.row_cols[e];
      const uint32_t slot = uint32_t(v.row_slots[e]);
      const bool inside = (uint32_t(column) < uint64_t(v.columns)) & (slot < uint64_t(v.capacity));
      const int64_t safe_column = inside ? column : 0;
      wrong |= !inside | (column <= before) | (v.block_of_slot[inside ? slot : 0] != first_block + column) |
               (linear && used[safe_column + 1] == used[safe_column]);
      before = column;
    }
    if (!wrong) continue;
    for (int64_t e = begin; e < end; ++e) {
      const IndexFault fault = row_entry_fault(v, row, e);
      if (fault.section != nullptr) return fault;
      const int32_t column = v.row_cols[e];
      if (linear && used[column + 1] == used[column])
        return {"col_ptr", column + 1, used[column + 1], "a list that holds the block of row_cols"};
    }
  }
  return kNone;
}

// Stride phase of a tap.
int64_t phase_of(const ListGeometry& g, int64_t tap) {
  return tap / g.kernel_w * g.dilation_h % g.stride_h * g.stride_w + tap % g.kernel_w * g.dilation_w % g.stride_w;
}

IndexFault column_entries_fault(const LayoutView& v, const ListGeometry& g) {
  const int64_t phases = g.stride_h * g.stride_w, rows_per_group = v.rows / g.groups;
  for (int64_t list = 0; list < v.lists; ++list) {
    const int64_t group = list / phases / g.channel_blocks, channel = list / phases % g.channel_blocks;
    int64_t before = -1, last_column = -1;
    for (int64_t e = v.col_ptr[list]; e < v.col_ptr[list + 1]; ++e) {
      const int64_t row = v.col_rows[e], column = v.col_cols[e];
      const uint32_t slot = uint32_t(v.col_slots[e]);
      if (uint64_t(row - group * rows_per_group) >= uint64_t(rows_per_group))
        return {"col_rows", e, row, "a block row of the weight and of the list's group"};
      if (v.row_ptr[row + 1] == v.row_ptr[row])
        return {"row_ptr", row + 1, v.row_ptr[row + 1], "a list that holds the block of col_rows"};
      if (uint64_t(column) >= uint64_t(v.columns))
        return {"col_cols", e, column, "a block column of the weight"};
      if (column != last_column) {
        const int64_t tap = column / g.channel_blocks;
        if (column - tap * g.channel_blocks != channel || phase_of(g, tap) != list % phases)
          return {"col_cols", e, column, "a block column of the list"};
        last_column = column;
      }
      const int64_t place = column * v.rows + row;
      if (place <= before) return {"col_cols", e, column, "ascending taps, then rows, in a list"};
      before = place;
      if (slot >= uint64_t(v.capacity)) return {"col_slots", e, v.col_slots[e], "a slot below the capacity"};
      if (v.block_of_slot[slot] != row * v.columns + column)
        return {"block_of_slot", slot, v.block_of_slot[slot], "the block that lists the slot"};
    }
  }
  return kNone;
}

}  // namespace

IndexFault index_fault(const LayoutView& v, Lists direction, const ListGeometry* geometry) {
  const int32_t live = v.header[0];
  if (live < 0 || live > v.capacity) return {"header", 0, live, "a number of live blocks up to the capacity"};
  IndexFault fault = pointer_fault("row_ptr", v.row_ptr, v.rows, live);
  if (fault.section == nullptr) fault = pointer_fault("col_ptr", v.col_ptr, v.lists, live);
  if (fault.section != nullptr) return fault;
  if (direction == Lists::columns) {
    fault = column_entries_fault(v, *geometry);
    return fault.section != nullptr ? fault : order_fault("col_order", v.col_order, v.col_ptr, v.lists);
  }
  const bool linear = geometry != nullptr && v.lists == v.columns && geometry->channel_blocks == v.columns;
  fault = row_entries_fault(v, linear);
  return fault.section != nullptr ? fault : order_fault("row_order", v.row_order, v.row_ptr, v.rows);
}

}  // namespace dynaprune::cpu
