// Kernels of block-sparse convolutions: those of linear layers, over gathered pixels.
#pragma once

#include "core/epilogue/store_blocks_sm80.h"
#include "core/epilogue/store_rows_sm80.h"
#include "core/epilogue/store_squares_sm80.h"
#include "core/gather/pixels.h"
#include "core/mainloop/product_sm80.h"
#include "core/mainloop/wgrad_sm80.h"

namespace dynaprune::cuda {

// Forward: y [images, out_h, out_w, out_channels] from x. Dgrad: dx [images, in_h, in_w, in_channels] from dy.
template <class T>
struct Conv2dProduct {
  LayoutView view;
  Conv2dSizes sizes;
  const T* a;  // x or dy
  const T* values;
  const T* bias;  // or null
  T* y;           // or dx
  int64_t row_tiles;  // of the largest grid of positions
  int log_inner;
};

// Grid: tiles of output pixels x block rows.
template <class Tile>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(Tile::kThreads, Tile::kPerProcessor)
    conv2d_forward_kernel(const DYN_GRID_CONSTANT Conv2dProduct<typename Tile::Element> p) {
  const LayoutView& view = p.view;
  const Conv2dSizes& s = p.sizes;
  const TileOfProgram program = tile_of_program(block(), p.row_tiles, view.rows);
  const int row = list_at(view.row_order, program.rank, view.rows);
  const auto [begin, end] = entries_of(view, view.row_ptr, row);
  const ListedBlocks listed{view.row_slots, view.capacity, begin, end};
  const int64_t first = program.tile * Tile::kRows, count = s.images * s.out_h * s.out_w;
  typename Tile::Sums sums;
  product<Tile>(sums, input_pixels(s, p.a, row / s.rows_per_group, view), first, count, p.values, p.log_inner, listed,
                shared_memory());

  const int channel = row * Tile::kColumns;
  const auto out = [&](int64_t position) { return p.y + position * s.out_channels + channel; };
  store_rows<Tile>(sums, out, first, count, s.out_channels - channel, p.bias == nullptr ? nullptr : p.bias + channel,
                   shared_memory());
}

// Grid: tiles of input pixels of a stride phase x column lists.
template <class Tile>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(Tile::kThreads, Tile::kPerProcessor)
    conv2d_dgrad_kernel(const DYN_GRID_CONSTANT Conv2dProduct<typename Tile::Element> p) {
  using T = typename Tile::Element;
  const LayoutView& view = p.view;
  const Conv2dSizes& s = p.sizes;
  const TileOfProgram program = tile_of_program(block(), p.row_tiles, view.lists);
  const int list = list_at(view.col_order, program.rank, view.lists);
  const StridePhase phase(s, list);
  const int64_t first = program.tile * Tile::kRows, count = s.images * phase.grid.height.value * phase.grid.width.value;
  if (first >= count) return;  // phases differ in size
  const auto [begin, end] = entries_of(view, view.col_ptr, list);
  const ListedBlocks listed{view.col_slots, view.capacity, begin, end};
  typename Tile::Sums sums;
  product<Tile>(sums, output_pixels(s, p.a, phase, view), first, count, p.values, p.log_inner, listed,
                shared_memory());

  const int within_group = phase.channel_block * Tile::kColumns;
  const int channel = phase.group * s.group_channels + within_group;
  const auto out = [&](int64_t position) -> T* {
    const auto [image, j, i] = phase.grid.place(position);
    const int64_t h = phase.first_h + j * s.stride_h, w = phase.first_w + i * s.stride_w;
    return p.y + ((int64_t(image) * s.in_h + h) * s.in_w + w) * s.in_channels + channel;
  };
  store_rows<Tile>(sums, out, first, count, s.group_channels - within_group, nullptr, shared_memory());
}

// Operands of wgrad and probe.
template <class T>
struct Conv2dGradient {
  LayoutView view;
  Conv2dSizes sizes;
  const T* x;
  const T* dy;

  DYN_DEVICE int64_t positions() const { return sizes.images * sizes.out_h * sizes.out_w; }
  DYN_DEVICE MatrixRows<T> dy_rows() const {
    return {dy, sizes.dy_channels, sizes.out_channels, nullptr, sizes.bo, view.rows};
  }
};

// Grid: chunks of live blocks of a row x parts of the sum over output pixels.
template <class Tile>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(Tile::kThreads, Tile::kPerProcessor)
    conv2d_wgrad_kernel(const DYN_GRID_CONSTANT Conv2dGradient<typename Tile::Element> p, int log_bi,
                        int64_t positions_per_split, GradientOutput<typename Tile::Element> output) {
  const LayoutView& view = p.view;
  const Conv2dSizes& s = p.sizes;
  const int64_t elements = int64_t(Tile::kOutputs) << log_bi;
  const int split = block(1);
  const Chunk chunk = chunk_of_program(view, block(), Tile::kInputs >> log_bi);
  if (chunk.begin < chunk.end) {
    const auto x = input_pixels(s, p.x, chunk.row / s.rows_per_group, view);
    const auto x_part = [&](int m) {
      const int entry = chunk.begin + (m >> log_bi);
      const bool listed = entry < chunk.end;
      return part_of(x, listed, x.entry(listed ? entry : chunk.begin), m & (s.bi - 1));
    };
    const auto dy_part = [&](int n) { return chunk.row * Tile::kOutputs + n; };
    const int64_t first = split * positions_per_split, end = first + positions_per_split, last = p.positions();
    typename Tile::Sums sums;
    sum_over_rows<Tile>(sums, x, x_part, p.dy_rows(), dy_part, first, end < last ? end : last, shared_memory());
    if (output.partial != nullptr) output.partial += split * view.capacity * elements;
    store_blocks<Tile>(sums, x, view, chunk, log_bi, s.out_channels - chunk.row * Tile::kOutputs, output,
                       shared_memory());
  }
  if (split == 0) zero_unlisted(view, block(), grid(), elements, output.dvalues, output.wg);
}

// Grid: tiles of the dense gradient, each of one tap and one group.
template <class Tile>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(Tile::kThreads, Tile::kPerProcessor)
    conv2d_probe_kernel(const DYN_GRID_CONSTANT Conv2dGradient<typename Tile::Element> p, const bool* wanted,
                        float* squares) {
  const LayoutView& view = p.view;
  const Conv2dSizes& s = p.sizes;
  const int tile_rows = Tile::kOutputs / s.bo, tile_columns = Tile::kInputs / s.bi;
  const int row_tiles = ceil_div(s.rows_per_group, tile_rows);
  const int column_tiles = ceil_div(s.channel_blocks.value, tile_columns);
  const int first_row = block() % row_tiles * tile_rows, group = block() / row_tiles % s.groups;
  const int rest = block() / row_tiles / s.groups;
  const int first_block = rest % column_tiles * tile_columns, tap = rest / column_tiles;
  const int rows_left = s.rows_per_group - first_row, columns_left = s.channel_blocks.value - first_block;
  const int row = group * s.rows_per_group + first_row, column = tap * s.channel_blocks.value + first_block;
  const ProbedBlocks blocks{row, column, rows_left < tile_rows ? rows_left : tile_rows,
                            columns_left < tile_columns ? columns_left : tile_columns, s.bi, s.bo};
  if (!*wanted || !any_dead(view, blocks)) {
    store_no_squares(view, blocks, squares);
    return;
  }
  const auto x = input_pixels(s, p.x, group, view);
  typename Tile::Sums sums;
  const auto x_part = [&](int m) { return x.part({0, column}, m); };
  const auto dy_part = [&](int n) { return row * s.bo + n; };
  sum_over_rows<Tile>(sums, x, x_part, p.dy_rows(), dy_part, 0, p.positions(), shared_memory());
  store_squares<Tile>(sums, view, blocks, squares, shared_memory());
}

}  // namespace dynaprune::cuda
