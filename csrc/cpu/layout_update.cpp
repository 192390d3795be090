#include "layout_update.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout_view.h"

namespace dynaprune::cpu {
namespace {

// Numbers 0 .. count - 1 by list length, longest first, equal ones in order: a counting sort.
void order_by_length(const int32_t* ptr, int64_t count, int32_t* order) {
  int32_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = std::max(longest, ptr[i + 1] - ptr[i]);
  std::vector<int32_t> place(size_t(longest) + 2, 0);
  for (int64_t i = 0; i < count; ++i) ++place[size_t(longest - (ptr[i + 1] - ptr[i]) + 1)];
  for (size_t k = 1; k < place.size(); ++k) place[k] += place[k - 1];
  for (int64_t i = 0; i < count; ++i) order[place[size_t(longest - (ptr[i + 1] - ptr[i]))]++] = int32_t(i);
}

}  // namespace

void layout_update(const LayoutShape& shape, bool release, unsigned char* mask, int32_t* slot_of_block,
                   int32_t* index) {
  const int64_t blocks = shape.rows * shape.columns, capacity = shape.capacity;
  // Who holds each slot; one more place takes the writes of blocks without one, so that the loop has no branches.
  std::vector<int32_t> owner(static_cast<size_t>(capacity) + 1, -1);
  bool invalid = false, wanting = false;
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t slot = slot_of_block[b];
    const bool live = mask[b] != 0, holds = (slot >= 0) & (live | !release);
    invalid |= (slot < -1) | (holds & (slot >= capacity));
    wanting |= live & (slot < 0);
    int32_t& place = owner[size_t(holds & (slot < capacity) ? slot : capacity)];
    invalid |= holds & (place >= 0);
    place = holds ? int32_t(b) : -1;
  }
  if (invalid)
    throw std::runtime_error("layout_update: expected slots of slot_of_block from -1 on and below capacity " +
                             std::to_string(capacity) + ", each at most once");
  for (int64_t b = 0; b < blocks; ++b) mask[b] = mask[b] != 0;  // later on, bytes are added up
  if (release)
    for (int64_t b = 0; b < blocks; ++b) slot_of_block[b] = mask[b] ? slot_of_block[b] : -1;
  int32_t overflow = 0;
  if (wanting) {
    int64_t free_slot = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (!mask[b] || slot_of_block[b] >= 0) continue;
      while (free_slot < capacity && owner[size_t(free_slot)] >= 0) ++free_slot;
      if (free_slot == capacity) {
        mask[b] = 0;
        ++overflow;
      } else {
        owner[size_t(free_slot)] = int32_t(b);
        slot_of_block[b] = int32_t(free_slot);
      }
    }
  }

  const LayoutView view = layout_view(index, shape.rows, shape.columns, shape.lists(), capacity);
  const auto section = [&](const int32_t* part) { return index + (part - index); };
  int32_t* row_ptr = section(view.row_ptr);
  const int64_t rows_per_group = shape.rows / shape.groups;
  std::vector<int32_t> column_count(size_t(shape.groups * shape.columns), 0);  // of each group, per column
  std::vector<int32_t> entry_cols(static_cast<size_t>(capacity) + 1), entry_slots(static_cast<size_t>(capacity) + 1);
  int32_t live = 0;
  for (int64_t row = 0; row < shape.rows; ++row) {
    row_ptr[row] = live;
    const unsigned char* row_mask = mask + row * shape.columns;
    const int32_t* row_slot = slot_of_block + row * shape.columns;
    int32_t* count = column_count.data() + row / rows_per_group * shape.columns;
    for (int64_t col = 0; col < shape.columns; ++col) count[col] += row_mask[col];
    for (int64_t col = 0; col < shape.columns; ++col) {
      entry_cols[size_t(live)] = int32_t(col);
      entry_slots[size_t(live)] = row_slot[col];
      live += row_mask[col];
    }
  }
  row_ptr[shape.rows] = live;
  int32_t* row_cols = section(view.row_cols);
  int32_t* row_slots = section(view.row_slots);
  std::copy_n(entry_cols.data(), live, row_cols);
  std::copy_n(entry_slots.data(), live, row_slots);

  std::memcpy(section(view.block_of_slot), owner.data(), size_t(capacity) * sizeof(int32_t));
  int32_t* header = index;
  std::fill(header, header + 8, 0);
  header[0] = live;
  header[1] = overflow;
  header[2] = int32_t(std::count_if(owner.begin(), owner.end() - 1, [](int32_t b) { return b >= 0; }));

  // A (group, column) belongs to one list, and a list's entries are ordered by tap, then row: where each pair's entries
  // begin follows from the counts, and one pass over the rows places them.
  const int64_t taps = shape.taps(), phases = shape.phases(), channel_blocks = shape.columns / taps;
  std::vector<int32_t> tap_phase(static_cast<size_t>(taps));
  for (int64_t tap = 0; tap < taps; ++tap)
    tap_phase[size_t(tap)] = int32_t(tap / shape.kernel_w * shape.dilation_h % shape.stride_h * shape.stride_w +
                                     tap % shape.kernel_w * shape.dilation_w % shape.stride_w);
  int32_t* col_ptr = section(view.col_ptr);
  int32_t place = 0;
  for (int64_t list = 0; list < shape.lists(); ++list) {
    const int64_t group = list / (channel_blocks * phases), channel = list / phases % channel_blocks;
    col_ptr[list] = place;
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (tap_phase[size_t(tap)] != list % phases) continue;
      int32_t& count = column_count[size_t(group * shape.columns + tap * channel_blocks + channel)];
      const int32_t entries = count;
      count = place;
      place += entries;
    }
  }
  col_ptr[shape.lists()] = place;
  int32_t* col_rows = section(view.col_rows);
  int32_t* col_cols = section(view.col_cols);
  int32_t* col_slots = section(view.col_slots);
  for (int64_t row = 0; row < shape.rows; ++row) {
    int32_t* next = column_count.data() + row / rows_per_group * shape.columns;
    for (int32_t e = row_ptr[row]; e < row_ptr[row + 1]; ++e) {
      const int32_t at = next[row_cols[e]]++;
      col_rows[at] = int32_t(row);
      col_cols[at] = row_cols[e];
      col_slots[at] = row_slots[e];
    }
  }
  for (int32_t* list : {row_cols, row_slots, col_rows, col_cols, col_slots}) std::fill(list + live, list + capacity, -1);
  order_by_length(row_ptr, shape.rows, section(view.row_order));
  order_by_length(col_ptr, shape.lists(), section(view.col_order));
}

}  // namespace dynaprune::cpu
