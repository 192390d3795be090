// Where forward and dgrad of linear and conv2d write a tile of sums.
#pragma once

#include "core/mma/tile_sm80.h"

namespace dynaprune::cuda {

// Writes sums + bias, rounded, to rows first .. first + M below `count`. `out(position)` is where the tile's part of a
// row starts; `columns` of it are real. Any alignment, though 16 bytes make it fast. bias: of the tile's columns, or
// null.
template <class Tile, class Out>
DYN_DEVICE void store_rows(const typename Tile::Sums& sums, const Out& out, int64_t first, int64_t count, int columns,
                           const typename Tile::Element* bias, unsigned char* shared) {
  using T = typename Tile::Element;
  using Staged = typename Tile::Staged;
  constexpr int kPiece = Tile::kPiece;
  sync_block();  // the operands have been read
  DYN_UNROLL
  for (int j = 0; j < Tile::kN; ++j) {
    const int n = Tile::n(j);
    float add[2] = {0.0f, 0.0f};
    if (bias != nullptr) {
      if (n < columns) add[0] = to_float(bias[n]);
      if (n + 1 < columns) add[1] = to_float(bias[n + 1]);
    }
    DYN_UNROLL
    for (int i = 0; i < Tile::kM; ++i)
      DYN_UNROLL
      for (int e = 0; e < 4; e += 2) {
        const Pair<T> pair{{from_float<T>(sums[i][j][e] + add[0]), from_float<T>(sums[i][j][e + 1] + add[1])}};
        const int at = Staged::at(Tile::m(i, e), n / kPiece) + n % kPiece * int(sizeof(T));
        *reinterpret_cast<Pair<T>*>(shared + at) = pair;
      }
  }
  sync_block();
  for (int index = thread(); index < Tile::kRows * Tile::kRowPieces; index += Tile::kThreads) {
    const int row = index / Tile::kRowPieces, n = index % Tile::kRowPieces * kPiece;
    if (first + row >= count || n >= columns) continue;
    const auto vector = load16(reinterpret_cast<const T*>(shared + Staged::at(row, n / kPiece)));
    T* to = out(first + row) + n;
    if (n + kPiece <= columns && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      store16(to, vector);
    } else {
      DYN_UNROLL
      for (int e = 0; e < kPiece; ++e)
        if (n + e < columns) to[e] = vector.element[e];
    }
  }
}

}  // namespace dynaprune::cuda
