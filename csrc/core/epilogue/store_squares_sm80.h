// Where the probe writes the squared norms of the dense gradient's blocks.
#pragma once

#include "core/epilogue/block_sums_sm80.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

// A tile of the dense gradient, cut into blocks of bi x bo, seen by the probe. Blocks beyond the grid do not count.
struct ProbedBlocks {
  int64_t first_row, first_column;
  int rows, columns;  // inside the grid
  int bi, bo;

  DYN_DEVICE int count() const { return rows * columns; }
  DYN_DEVICE int64_t row(int block) const { return first_row + block / columns; }
  DYN_DEVICE int64_t column(int block) const { return first_column + block % columns; }
};

// Whether any of the blocks is not live; the same for every thread of the block.
DYN_DEVICE bool any_dead(const LayoutView& view, const ProbedBlocks& blocks) {
  bool dead = false;  // a tile has 64 blocks at most: every warp looks at all of them
  for (int b = lane(); b < blocks.count(); b += kWarp) dead = dead || !is_live(view, blocks.row(b), blocks.column(b));
  return ballot(dead) != 0;
}

// Writes the blocks' squared norms to squares [rows * columns], zeros at live ones.
template <class Tile>
DYN_DEVICE void store_squares(const typename Tile::Sums& sums, const LayoutView& view, const ProbedBlocks& blocks,
                              float* squares, unsigned char* shared) {
  float part[Tile::kM][Tile::kN / 2];
  DYN_UNROLL
  for (int i = 0; i < Tile::kM; ++i)
    DYN_UNROLL
    for (int j = 0; j < Tile::kN / 2; ++j) {
      part[i][j] = 0.0f;
      DYN_UNROLL
      for (int e = 0; e < 8; ++e) {
        const float sum = sums[i][2 * j + e / 4][e % 4];
        part[i][j] += sum * sum;
      }
    }
  float* cells = reinterpret_cast<float*>(shared);
  sync_block();  // the operands have been read
  store_cells<Tile>(part, cells);
  sync_block();
  const int height = blocks.bi / 16, width = blocks.bo / 16;
  for (int b = thread(); b < blocks.count(); b += Tile::kThreads) {
    const int64_t row = blocks.row(b), column = blocks.column(b);
    const int first_m = b % blocks.columns * height, first_n = b / blocks.columns * width;
    const float square = sum_of_cells<Tile>(cells, first_m, height, first_n, width);
    squares[row * view.columns + column] = is_live(view, row, column) ? 0.0f : square;
  }
}

DYN_DEVICE void store_no_squares(const LayoutView& view, const ProbedBlocks& blocks, float* squares) {
  for (int b = thread(); b < blocks.count(); b += threads())
    squares[blocks.row(b) * view.columns + blocks.column(b)] = 0.0f;
}

}  // namespace dynaprune::cuda
