// Kernels of block-sparse linear layers.
#pragma once

#include "core/epilogue/store_blocks_sm80.h"
#include "core/epilogue/store_rows_sm80.h"
#include "core/epilogue/store_squares_sm80.h"
#include "core/mainloop/product_sm80.h"
#include "core/mainloop/wgrad_sm80.h"

namespace dynaprune::cuda {

// y [tokens, outer_size] = a [tokens, inner_size] W^T + bias, or for dgrad a W.
template <class T>
struct LinearProduct {
  LayoutView view;
  const T* a;
  const T* values;
  const T* bias;  // or null
  T* y;
  int64_t tokens, a_stride;
  int inner_size, outer_size, log_inner;
};

template <class Tile>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(Tile::kThreads, Tile::kPerProcessor)
    linear_product_kernel(LinearProduct<typename Tile::Element> p) {
  using T = typename Tile::Element;
  const LayoutView& view = p.view;
  const int64_t lists = Tile::kDgrad ? view.lists : view.rows;
  const TileOfProgram program = tile_of_program(block(), ceil_div(p.tokens, int64_t(Tile::kRows)), lists);
  const int list = list_at(Tile::kDgrad ? view.col_order : view.row_order, program.rank, lists);
  const auto [begin, end] = entries_of(view, Tile::kDgrad ? view.col_ptr : view.row_ptr, list);
  const ListedBlocks listed{Tile::kDgrad ? view.col_slots : view.row_slots, view.capacity, begin, end};
  const MatrixRows<T> rows{p.a,
                           p.a_stride,
                           p.inner_size,
                           Tile::kDgrad ? view.col_rows : view.row_cols,
                           1 << p.log_inner,
                           Tile::kDgrad ? view.rows : view.columns};
  const int64_t first = program.tile * Tile::kRows;
  typename Tile::Sums sums;
  product<Tile>(sums, rows, first, p.tokens, p.values, p.log_inner, listed, shared_memory());

  const int column = list * Tile::kColumns;
  const auto out = [&](int64_t token) { return p.y + token * p.outer_size + column; };
  store_rows<Tile>(sums, out, first, p.tokens, p.outer_size - column, p.bias == nullptr ? nullptr : p.bias + column,
                   shared_memory());
}

// Operands of wgrad and probe.
template <class T>
struct LinearGradient {
  LayoutView view;
  const T* x;
  const T* dy;
  int64_t tokens, x_stride, dy_stride;
  int in, out, bi, bo;

  DYN_DEVICE MatrixRows<T> x_rows() const { return {x, x_stride, in, view.row_cols, bi, view.columns}; }
  DYN_DEVICE MatrixRows<T> dy_rows() const { return {dy, dy_stride, out, nullptr, bo, view.rows}; }
};

// Grid: chunks of live blocks of a row x parts of the sum over tokens.
template <class Tile>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(Tile::kThreads, Tile::kPerProcessor)
    linear_wgrad_kernel(LinearGradient<typename Tile::Element> p, int log_bi, int64_t tokens_per_split,
                        GradientOutput<typename Tile::Element> output) {
  using T = typename Tile::Element;
  const LayoutView& view = p.view;
  const int64_t elements = int64_t(Tile::kOutputs) << log_bi;
  const int split = block(1);
  const Chunk chunk = chunk_of_program(view, block(), Tile::kInputs >> log_bi);
  if (chunk.begin < chunk.end) {
    const MatrixRows<T> x = p.x_rows(), dy = p.dy_rows();
    const auto x_part = [&](int m) {
      const int entry = chunk.begin + (m >> log_bi);
      const bool listed = entry < chunk.end;
      return part_of(x, listed, x.entry(listed ? entry : chunk.begin), m & ((1 << log_bi) - 1));
    };
    const auto dy_part = [&](int n) { return chunk.row * Tile::kOutputs + n; };
    const int64_t first = split * tokens_per_split, end = first + tokens_per_split;
    typename Tile::Sums sums;
    sum_over_rows<Tile>(sums, x, x_part, dy, dy_part, first, end < p.tokens ? end : p.tokens, shared_memory());
    if (output.partial != nullptr) output.partial += split * view.capacity * elements;
    store_blocks<Tile>(sums, x, view, chunk, log_bi, p.out - chunk.row * Tile::kOutputs, output, shared_memory());
  }
  if (split == 0) zero_unlisted(view, block(), grid(), elements, output.dvalues, output.wg);
}

// Grid: tiles of the dense gradient.
template <class Tile>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(Tile::kThreads, Tile::kPerProcessor)
    linear_probe_kernel(LinearGradient<typename Tile::Element> p, const bool* wanted, float* squares) {
  const LayoutView& view = p.view;
  const int tile_rows = Tile::kOutputs / p.bo, tile_columns = Tile::kInputs / p.bi;
  const int64_t row_tiles = ceil_div(view.rows, int64_t(tile_rows));
  const int64_t first_row = block() % row_tiles * tile_rows, first_column = block() / row_tiles * tile_columns;
  const int64_t rows_left = view.rows - first_row, columns_left = view.columns - first_column;
  const ProbedBlocks blocks{first_row, first_column, int(rows_left < tile_rows ? rows_left : tile_rows),
                            int(columns_left < tile_columns ? columns_left : tile_columns), p.bi, p.bo};
  if (!*wanted || !any_dead(view, blocks)) {
    store_no_squares(view, blocks, squares);
    return;
  }
  typename Tile::Sums sums;
  const auto x_part = [&](int m) { return int(first_column) * p.bi + m; };
  const auto dy_part = [&](int n) { return int(first_row) * p.bo + n; };
  sum_over_rows<Tile>(sums, p.x_rows(), x_part, p.dy_rows(), dy_part, 0, p.tokens, shared_memory());
  store_squares<Tile>(sums, view, blocks, squares, shared_memory());
}

}  // namespace dynaprune::cuda
