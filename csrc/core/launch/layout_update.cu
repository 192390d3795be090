// Launcher of the layout kernels.
#include "core/kernels/layout_update.h"

#include "core/launchers.h"

namespace dynaprune::cuda {
namespace {

LayoutGrid grid_of(const LayoutShape& shape) {
  const int64_t taps = shape.kernel_h * shape.kernel_w, phases = shape.stride_h * shape.stride_w;
  const int64_t channel_blocks = shape.columns / taps;
  LayoutGrid size;
  size.rows = int(shape.rows);
  size.columns = int(shape.columns);
  size.lists = int(shape.groups * channel_blocks * phases);
  size.capacity = int(shape.capacity);
  size.channel_blocks = int(channel_blocks);
  size.rows_per_group = int(shape.rows / shape.groups);
  size.taps = int(taps);
  size.phases = int(phases);
  size.kernel_w = int(shape.kernel_w);
  size.stride_h = int(shape.stride_h);
  size.stride_w = int(shape.stride_w);
  size.dilation_h = int(shape.dilation_h);
  size.dilation_w = int(shape.dilation_w);
  return size;
}

int64_t slot_chunks(const LayoutGrid& size) { return ceil_div(size.capacity, kSlotChunk); }

LayoutScratch scratch_in(void* workspace, const LayoutGrid& size) {
  LayoutScratch scratch;
  scratch.wanting = static_cast<int32_t*>(workspace);
  scratch.holding = scratch.wanting + size.rows;
  scratch.live_of_row = scratch.holding + size.rows;
  scratch.live_of_list = scratch.live_of_row + size.rows;
  scratch.free_of_chunk = scratch.live_of_list + size.lists;
  scratch.free_slots = scratch.free_of_chunk + slot_chunks(size);
  return scratch;
}

}  // namespace

size_t layout_update_workspace(LayoutShape shape) {
  const LayoutGrid size = grid_of(shape);
  return size_t(3 * int64_t(size.rows) + size.lists + slot_chunks(size) + size.capacity) * sizeof(int32_t);
}

cudaError_t layout_update(Target target, LayoutShape shape, bool release, bool* live, int32_t* slot_of_block,
                          int32_t* index, void* workspace) {
  const LayoutGrid size = grid_of(shape);
  const LayoutScratch scratch = scratch_in(workspace, size);
  const LayoutView view = layout_view(index, size.rows, size.columns, size.lists, size.capacity);
  uint8_t* mask = reinterpret_cast<uint8_t*>(live);
  const auto warps = [](int64_t items) { return Grid{unsigned(ceil_div<int64_t>(items, kLayoutWarps))}; };
  const Grid list_tiles{unsigned(shape.groups * size.phases * ceil_div(size.channel_blocks, kWarp))};
  const size_t list_bytes = kListThreads * sizeof(int);
  const int64_t index_size = packed_index_size(size.rows, size.lists, size.capacity);
  const int64_t clearing = ceil_div<int64_t>(index_size, kLayoutThreads), most = 8 * int64_t(target.sm_count);
  cudaError_t error = cudaSuccess;
  const auto run = [&](auto kernel, Grid blocks, int threads, size_t shared_bytes, auto... arguments) {
    if (error == cudaSuccess) error = launch(kernel, blocks, threads, shared_bytes, target.stream, arguments...);
  };
  run(&clear_kernel, {unsigned(clearing < most ? clearing : most)}, kLayoutThreads, 0, index, index_size);
  run(release ? &claim_kernel<true> : &claim_kernel<false>, warps(size.rows), kLayoutThreads, 0, mask, slot_of_block,
      view, size, scratch);
  run(&count_free_kernel, warps(slot_chunks(size)), kLayoutThreads, 0, view, size, scratch);
  run(&list_free_kernel, warps(slot_chunks(size)), kLayoutThreads, 0, view, size, scratch);
  run(&assign_kernel, warps(size.rows), kLayoutThreads, 0, mask, slot_of_block, view, size, scratch);
  run(&count_lists_kernel, list_tiles, kListThreads, list_bytes, mask, size, scratch);
  run(&emit_rows_kernel, warps(int64_t(size.rows) + size.lists), kLayoutThreads, 0, mask, slot_of_block, view, size,
      scratch);
  run(&emit_lists_kernel, list_tiles, kListThreads, list_bytes, mask, slot_of_block, view, size);
  return error;
}

}  // namespace dynaprune::cuda
