// Whether a packed index is what layout_update writes, checked before a kernel uses it.
//
// Anything may have written to the index: averaging copies, numpy views, `.data`. A kernel that reads an index without
// fault stays inside its memory, and writes every slot and output once.
#pragma once

#include <cstdint>

#include "layout_view.h"

namespace dynaprune::cpu {

// What says which column list a block belongs to. Everything but `channel_blocks` is 1 for a linear layer.
struct ListGeometry {
  int64_t groups, channel_blocks, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
};

// The direction whose entries and order a kernel walks along; of the other it takes the list pointers.
enum class Lists { rows, columns };

// One element of a section that is wrong; `section` is null where the index is right.
struct IndexFault {
  const char* section;
  int64_t at, value;
  const char* expected;
};

// The first fault of header, pointers of both directions, and entries and order of one. Reads no element outside the
// index, allocates nothing, O(rows + lists + live blocks). `geometry` may be null for Lists::rows.
//
// Entries are right if they ascend strictly (so that no block comes twice), lie inside their list, point to a list of
// the other direction that is not empty, and if block_of_slot names their block (so that no slot comes twice).
IndexFault index_fault(const LayoutView& view, Lists direction, const ListGeometry* geometry);

}  // namespace dynaprune::cpu
