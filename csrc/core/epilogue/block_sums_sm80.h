// Sums over the blocks of a tile of the dense gradient, from 16 x 16 cells that one warp each adds up.
#pragma once

#include "core/mma/tile_sm80.h"

namespace dynaprune::cuda {

// Adds up part[i][j] over the warp in a fixed order: cells [8][N / 16], one for each 16 x 16 elements of the tile.
template <class Tile>
DYN_DEVICE void store_cells(const float (&part)[Tile::kM][Tile::kN / 2], float* cells) {
  DYN_UNROLL
  for (int i = 0; i < Tile::kM; ++i)
    DYN_UNROLL
    for (int j = 0; j < Tile::kN / 2; ++j) {
      float sum = part[i][j];
      DYN_UNROLL
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane() == 0) cells[(Tile::first_m() / 16 + i) * (Tile::kOutputs / 16) + Tile::first_n() / 16 + j] = sum;
    }
}

// The sum of cells [first_m, first_m + bi / 16) x [first_n, first_n + bo / 16).
template <class Tile>
DYN_DEVICE float sum_of_cells(const float* cells, int first_m, int height, int first_n, int width) {
  float sum = 0.0f;
  for (int m = first_m; m < first_m + height; ++m)
    for (int n = first_n; n < first_n + width; ++n) sum += cells[m * (Tile::kOutputs / 16) + n];
  return sum;
}

}  // namespace dynaprune::cuda
