// The rows of an activation that sm_80's products read.
//
// A functor `Rows` gathers 16-byte pieces of an activation (MatrixRows below; pixels of a convolution). It serves the
// sums over rows in mainloop/wgrad_sm80.h too:
//   Row row(int64_t position, bool exists)   what a thread keeps of a row; one of zeros where there is none
//   Entry entry(int entry)                what the index says of a list's entry; just reads, used one step later
//   bool exists(Entry)                    whether there is such a block; asked before whatever takes an entry
//   Part part(Entry, int within)          the piece that starts at element `within` of the entry's summed side
//   Part nothing()                        a piece of zeros
//   const T* address(Row, Part, bool& valid)   where it lies; not valid: zeros, and nothing is read
//   int real(Entry)                       elements of the summed side that are no padding, at least 1
#pragma once

#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

// Rows of a matrix [positions, size], zeros behind `size` up to whole pieces; entries stand for blocks of `block`
// columns.
template <class T>
struct MatrixRows {
  const T* data;
  int64_t stride;
  int size;
  const int32_t* blocks;  // the list's block columns
  int block;
  int64_t count;  // of blocks in a row

  using Row = const T*;
  struct Entry {
    int column;
  };
  using Part = int;  // column

  DYN_DEVICE Row row(int64_t position, bool exists) const { return exists ? data + position * stride : nullptr; }
  DYN_DEVICE Entry entry(int entry) const { return {blocks[entry]}; }
  DYN_DEVICE bool exists(Entry entry) const { return is_column(entry.column, count); }
  DYN_DEVICE Part part(Entry entry, int within) const { return entry.column * block + within; }
  DYN_DEVICE Part nothing() const { return size; }
  DYN_DEVICE const T* address(Row row, Part column, bool& valid) const {
    valid = row != nullptr && column < size;
    return valid ? row + column : data;
  }
  DYN_DEVICE int real(Entry entry) const {
    const int left = size - entry.column * block;
    return left < block ? left : block;
  }
};

// The piece of a block, of zeros where it is not `listed` or does not exist.
template <class Rows>
DYN_DEVICE typename Rows::Part part_of(const Rows& rows, bool listed, typename Rows::Entry entry, int within) {
  return listed && rows.exists(entry) ? rows.part(entry, within) : rows.nothing();
}

}  // namespace dynaprune::cuda
