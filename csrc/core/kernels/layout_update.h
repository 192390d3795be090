// A live mask into slots and index lists, on the device.
//
// Eight launches, each of which needs all of the one before: clear, claim (which blocks keep a slot, want one, free
// one), count_free and list_free (the free slots, in order), assign (slots to the blocks that want one), count_lists
// (live blocks of each column list), emit_rows (the row lists, and where every list begins), emit_lists (the column
// lists). What slot_of_block holds is not trusted: a number that is neither a slot nor -1 takes its block out of the
// mask, and no list is written beyond the capacity. The header counts such numbers and the blocks beyond one that share
// a slot. Scans over the whole device come in two halves: a launch leaves the count of each part, and whoever needs the
// sum before his part in a later launch adds it up, one warp reading 32 counts at a time.
#pragma once

#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

constexpr int kLayoutThreads = 256, kLayoutWarps = kLayoutThreads / kWarp;  // a warp works by itself, except for lists
constexpr int kListThreads = 512, kListWarps = kListThreads / kWarp;
constexpr int kSlotChunk = 256;  // slots per warp

struct LayoutGrid {
  int rows, columns, lists, capacity;
  int channel_blocks, rows_per_group, taps, phases;
  int kernel_w, stride_h, stride_w, dilation_h, dilation_w;
};

// Counts that do not outlive an update.
struct LayoutScratch {
  int32_t* wanting;        // [rows] live blocks without a slot
  int32_t* holding;        // [rows] blocks with a slot, or with a number that is none
  int32_t* live_of_row;    // [rows]
  int32_t* live_of_list;   // [lists]
  int32_t* free_of_chunk;  // [ceil(capacity / kSlotChunk)]
  int32_t* free_slots;     // [capacity], the lowest first
};

DYN_DEVICE int32_t* writable(const int32_t* section) { return const_cast<int32_t*>(section); }

DYN_DEVICE int sum_lanes(int value) {
  for (int mask = 1; mask < kWarp; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

// Place of this lane among the lanes that vote.
DYN_DEVICE int lanes_before(uint32_t votes) { return count_bits(votes & ((1u << lane()) - 1)); }

// Sum of counts[0 .. stop), by a warp.
DYN_DEVICE int sum_before(const int32_t* counts, int stop) {
  int total = 0;
#pragma unroll 4
  for (int at = lane(); at < stop; at += kWarp) total += read_only(counts + at);
  return sum_lanes(total);
}

// Place of `item` when counts[0 .. size) is sorted, most first, ties in order; by a warp.
DYN_DEVICE int rank_of(const int32_t* counts, int item, int size) {
  const int own = read_only(counts + item);
  int before = 0;
#pragma unroll 4
  for (int at = lane(); at < size; at += kWarp) {
    const int count = read_only(counts + at);
    before += count > own || (count == own && at < item);
  }
  return sum_lanes(before);
}

// Whether a list has room for an entry: blocks that share a slot can be more than slots.
DYN_DEVICE bool is_place(int64_t entry, const LayoutGrid& size) {
  return DYN_GUARD(kGuardPlace, uint64_t(entry) < uint64_t(size.capacity));
}

DYN_DEVICE int item_of_warp() { return block() * kLayoutWarps + warp(); }

DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kLayoutThreads, 2) clear_kernel(int32_t* index, int64_t size) {
  for (int64_t at = int64_t(block()) * kLayoutThreads + thread(); at < size; at += int64_t(grid()) * kLayoutThreads)
    index[at] = -1;
}

// One warp per row. Now and in the kernels below block_of_slot is -1 where a slot is free.
template <bool RELEASE>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kLayoutThreads, 2)
    claim_kernel(const uint8_t* mask, int32_t* slot_of_block, LayoutView view, LayoutGrid size, LayoutScratch scratch) {
  const int row = item_of_warp();
  if (row >= size.rows) return;
  int wants = 0, holds = 0;
  for (int column = lane(); column < size.columns; column += kWarp) {
    const int64_t at = int64_t(row) * size.columns + column;
    const bool live = mask[at] != 0;
    int slot = slot_of_block[at];
    if (RELEASE && !live && slot >= 0) slot_of_block[at] = slot = -1;
    if (slot != -1 && is_slot(slot, size.capacity)) writable(view.block_of_slot)[slot] = int32_t(at);
    wants += live && slot == -1;
    holds += slot != -1;
  }
  wants = sum_lanes(wants);
  holds = sum_lanes(holds);
  if (lane() > 0) return;
  scratch.wanting[row] = wants;
  scratch.holding[row] = holds;
}

// One warp per chunk of slots.
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kLayoutThreads, 2)
    count_free_kernel(LayoutView view, LayoutGrid size, LayoutScratch scratch) {
  const int chunk = item_of_warp(), first = chunk * kSlotChunk;
  if (first >= size.capacity) return;
  int free = 0;
  DYN_UNROLL
  for (int step = 0; step < kSlotChunk; step += kWarp) {
    const int slot = first + step + lane();
    free += slot < size.capacity && view.block_of_slot[slot] < 0;
  }
  free = sum_lanes(free);
  if (lane() == 0) scratch.free_of_chunk[chunk] = free;
}

DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kLayoutThreads, 2)
    list_free_kernel(LayoutView view, LayoutGrid size, LayoutScratch scratch) {
  const int chunk = item_of_warp(), first = chunk * kSlotChunk;
  if (first >= size.capacity) return;
  int place = sum_before(scratch.free_of_chunk, chunk);
  for (int step = 0; step < kSlotChunk; step += kWarp) {
    const int slot = first + step + lane();
    const bool free = slot < size.capacity && view.block_of_slot[slot] < 0;
    const uint32_t votes = ballot(free);
    if (free) scratch.free_slots[place + lanes_before(votes)] = slot;
    place += count_bits(votes);
  }
}

// One warp per row: the next free slot to each block that wants one, in row-major order, until none is left.
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kLayoutThreads, 2)
    assign_kernel(uint8_t* mask, int32_t* slot_of_block, LayoutView view, LayoutGrid size, LayoutScratch scratch) {
  const int row = item_of_warp();
  if (row >= size.rows) return;
  const int held = sum_before(scratch.holding, size.rows), free = size.capacity - held;
  int wanted = sum_before(scratch.wanting, row), lives = 0;
  for (int first = 0; first < size.columns; first += kWarp) {
    const int column = first + lane();
    const int64_t at = int64_t(row) * size.columns + column;
    const uint8_t byte = column < size.columns ? mask[at] : 0;
    const int held_slot = column < size.columns ? slot_of_block[at] : -1;
    bool live = byte != 0;
    const bool wants = live && held_slot == -1;
    const uint32_t votes = ballot(wants);
    const int place = wanted + lanes_before(votes);
    if (wants && place < free) {
      const int slot = scratch.free_slots[place];
      slot_of_block[at] = slot;
      writable(view.block_of_slot)[slot] = int32_t(at);
    } else if (wants) {
      mask[at] = 0;
      live = false;
    } else if (held_slot != -1 && !is_slot(held_slot, size.capacity)) {
      slot_of_block[at] = -1;
      mask[at] = 0;
      live = false;
    }
    if (live && byte != 1) mask[at] = 1;
    lives += live;
    wanted += count_bits(votes);
  }
  lives = sum_lanes(lives);
  if (lane() == 0) scratch.live_of_row[row] = lives;
  if (row < size.rows - 1) return;
  // The last row has counted every block that wants a slot. Header: (n_live, by emit_rows,) overflow, n_slots, faults,
  // zeros.
  const int free_slots = sum_before(scratch.free_of_chunk, ceil_div(size.capacity, kSlotChunk));
  const int served = free < 0 ? 0 : wanted < free ? wanted : free, faults = free_slots - free;
  const int header = lane() == 1   ? wanted - served
                     : lane() == 2 ? size.capacity - free_slots + served
                     : lane() == 3 ? faults
                                   : 0;
  if (lane() >= 1 && lane() < 8) writable(view.header)[lane()] = header;
}

DYN_DEVICE int phase_of_tap(const LayoutGrid& size, int tap) {
  return tap / size.kernel_w * size.dilation_h % size.stride_h * size.stride_w +
         tap % size.kernel_w * size.dilation_w % size.stride_w;
}

// Column lists of 32 neighbouring channel blocks of one group and stride phase, one per lane. The positions of a list,
// (tap, row) in this order, are cut into a slice for each warp.
class ListTile {
 public:
  DYN_DEVICE explicit ListTile(const LayoutGrid& size) : size_(size) {
    const int tiles = ceil_div(size.channel_blocks, kWarp);  // of each group and phase
    const int group = block() / tiles / size.phases;
    phase_ = block() / tiles % size.phases;
    channel_ = block() % tiles * kWarp + lane();
    first_row_ = group * size.rows_per_group;
    list_ = (group * size.channel_blocks + channel_) * size.phases + phase_;
    int positions = 0;
    for (int tap = 0; tap < size.taps; ++tap)
      if (phase_of_tap(size, tap) == phase_) positions += size.rows_per_group;
    const int slice = ceil_div(positions, kListWarps);
    begin_ = warp() * slice;
    end_ = begin_ + slice < positions ? begin_ + slice : positions;
  }

  DYN_DEVICE bool exists() const { return channel_ < size_.channel_blocks; }  // this lane's list
  DYN_DEVICE int list() const { return list_; }

  // Calls visit(row, column) for this warp's slice of this lane's list.
  template <class Visit>
  DYN_DEVICE void walk(const Visit& visit) const {
    if (!exists()) return;
    int before = 0;
    for (int tap = 0; tap < size_.taps && before < end_; ++tap) {
      if (phase_of_tap(size_, tap) != phase_) continue;
      const int column = tap * size_.channel_blocks + channel_;
      const int first = begin_ > before ? begin_ - before : 0;
      const int last = end_ - before < size_.rows_per_group ? end_ - before : size_.rows_per_group;
#pragma unroll 8
      for (int row = first; row < last; ++row) visit(first_row_ + row, column);
      before += size_.rows_per_group;
    }
  }

  // Live blocks of this lane's list in the slices of warps 0 .. stop - 1. Every thread of the block must call it once;
  // `counts` [kListWarps, 32] is shared memory.
  DYN_DEVICE int live_before(const uint8_t* mask, int stop, int* counts) const {
    int live = 0;
    walk([&](int row, int column) { live += read_only(mask + int64_t(row) * size_.columns + column) != 0; });
    counts[thread()] = live;
    sync_block();
    int before = 0;
    for (int w = 0; w < stop; ++w) before += counts[w * kWarp + lane()];
    return before;
  }

 private:
  const LayoutGrid& size_;
  int phase_, channel_, first_row_, list_, begin_, end_;
};

DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kListThreads, 1)
    count_lists_kernel(const uint8_t* mask, LayoutGrid size, LayoutScratch scratch) {
  const ListTile tile(size);
  const int live = tile.live_before(mask, kListWarps, reinterpret_cast<int*>(shared_memory()));
  if (warp() == 0 && tile.exists()) scratch.live_of_list[tile.list()] = live;
}

// One warp per row, then one per column list.
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kLayoutThreads, 2)
    emit_rows_kernel(const uint8_t* mask, const int32_t* slot_of_block, LayoutView view, LayoutGrid size,
                     LayoutScratch scratch) {
  const int item = item_of_warp();
  if (item >= size.rows + size.lists) return;
  const bool is_row = item < size.rows;
  const int number = is_row ? item : item - size.rows, numbers = is_row ? size.rows : size.lists;
  const int32_t* counts = is_row ? scratch.live_of_row : scratch.live_of_list;
  const int rank = rank_of(counts, number, numbers);
  int entry = sum_before(counts, number);
  if (lane() == 0) {
    writable(is_row ? view.row_order : view.col_order)[rank] = number;
    int32_t* pointers = writable(is_row ? view.row_ptr : view.col_ptr);
    if (item == 0) writable(view.row_ptr)[0] = writable(view.col_ptr)[0] = 0;
    pointers[number + 1] = entry + counts[number];
    if (is_row && number == size.rows - 1) writable(view.header)[0] = entry + counts[number];
  }
  if (!is_row) return;
  for (int first = 0; first < size.columns; first += kWarp) {
    const int column = first + lane();
    const int64_t at = int64_t(number) * size.columns + column;
    const bool live = column < size.columns && read_only(mask + at) != 0;
    const uint32_t votes = ballot(live);
    const int64_t to = entry + lanes_before(votes);
    if (live && is_place(to, size)) {
      writable(view.row_cols)[to] = column;
      writable(view.row_slots)[to] = read_only(slot_of_block + at);
    }
    entry += count_bits(votes);
  }
}

DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kListThreads, 1)
    emit_lists_kernel(const uint8_t* mask, const int32_t* slot_of_block, LayoutView view, LayoutGrid size) {
  const ListTile tile(size);
  int64_t to = tile.live_before(mask, warp(), reinterpret_cast<int*>(shared_memory()));
  if (tile.exists()) to += view.col_ptr[tile.list()];
  tile.walk([&](int row, int column) {
    const int64_t at = int64_t(row) * size.columns + column;
    if (read_only(mask + at) == 0 || !is_place(to, size)) return;
    writable(view.col_rows)[to] = row;
    writable(view.col_cols)[to] = column;
    writable(view.col_slots)[to] = read_only(slot_of_block + at);
    ++to;
  });
}

}  // namespace dynaprune::cuda
