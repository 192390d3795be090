// Gradients of blocks: sums over the rows (tokens, pixels) of two activations, what linear and conv2d share. The rows
// come from functors (gather/matrix_rows.h).
#pragma once

#include "core/mainloop/pipeline_sm80.h"
#include "core/mma/tile_sm80.h"

namespace dynaprune::cuda {

// One thread block's tile of the dense gradient: 128 inputs x N outputs (16, 32, 64 or 128).
template <class T, int N, int PRODUCTS>
struct GradientTile : WarpTiles<128, N> {
  using Element = T;
  static constexpr int kInputs = 128, kOutputs = N, kProducts = PRODUCTS;
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kStep = 64 / sizeof(T);  // rows summed per stage
  static constexpr int kStages = 4;
  static constexpr int kPerProcessor = sizeof(T) == 2 ? 2 : 1;  // thread blocks that registers are to suffice for
  using Left = SharedTile<T, kInputs / kPiece, false>;    // [kStep][128]
  using Right = SharedTile<T, kOutputs / kPiece, false>;  // [kStep][N]
  static constexpr int kLeftBytes = kInputs * 64, kStageBytes = kLeftBytes + N * 64;
  static constexpr int kCells = kInputs / 16 * (N / 16);  // of 16 x 16 elements
  static constexpr int kSharedBytes = kStages * kStageBytes;

  // A thread copies pieces of one row per step, kPerRow threads together the whole row: 64 bytes at once at least.
  // Eight threads write without a bank conflict: where they are of two rows, these differ in the first and third bit.
  static constexpr int kPerRow = WarpTiles<128, N>::kThreads / kStep;
  static DYN_DEVICE int copied_row() {
    const int row = thread() / kPerRow;
    return kPerRow == 4 ? (row & ~7) | ((row & 7) >> 1 ^ (row & 1) * 5) : row;
  }
};

// The pieces of a row that a thread copies; part(e) stands for the piece that starts at element e.
template <class Shared, int PER_ROW, class Rows>
struct CopiedPieces {
  static constexpr int kCount = (Shared::kWidth + PER_ROW - 1) / PER_ROW;
  typename Rows::Part parts[kCount];

  template <class PartOf>
  explicit DYN_DEVICE CopiedPieces(const PartOf& part) {
    DYN_UNROLL
    for (int i = 0; i < kCount; ++i) parts[i] = part(piece(i) * Shared::kPiece);
  }
  DYN_DEVICE void copy(const Rows& rows, const typename Rows::Row& row, int at, unsigned char* to) const {
    DYN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (Shared::kWidth % PER_ROW != 0 && piece(i) >= Shared::kWidth) return;
      bool valid;
      const typename Shared::Element* from = rows.address(row, parts[i], valid);
      cp_async_16(to + Shared::at(at, piece(i)), from, valid ? 16 : 0);
    }
  }
  static DYN_DEVICE int piece(int i) { return thread() % PER_ROW + i * PER_ROW; }
};

// sums [128, N] = left^T right over positions first .. last.
template <class Tile, class LeftRows, class LeftPart, class RightRows, class RightPart>
DYN_DEVICE void sum_over_rows(typename Tile::Sums& sums, const LeftRows& left_rows, const LeftPart& left_part,
                              const RightRows& right_rows, const RightPart& right_part, int64_t first, int64_t last,
                              unsigned char* shared) {
  const CopiedPieces<typename Tile::Left, Tile::kPerRow, LeftRows> left_pieces(left_part);
  const CopiedPieces<typename Tile::Right, Tile::kPerRow, RightRows> right_pieces(right_part);
  const int row = Tile::copied_row();
  const auto copy = [&](int step, int stage) {
    const int64_t position = first + int64_t(step) * Tile::kStep + row;
    const bool exists = position < last;
    unsigned char* to = shared + stage * Tile::kStageBytes;
    left_pieces.copy(left_rows, left_rows.row(position, exists), row, to);
    right_pieces.copy(right_rows, right_rows.row(position, exists), row, to + Tile::kLeftBytes);
  };

  DYN_UNROLL
  for (int i = 0; i < Tile::kM; ++i)
    for (int j = 0; j < Tile::kN; ++j)
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
  const int steps = first < last ? int(ceil_div(last - first, int64_t(Tile::kStep))) : 0;
  pipeline<Tile::kStages>(steps, copy, [&](int stage) {
    const unsigned char* left = shared + stage * Tile::kStageBytes;
    multiply<typename Tile::Left, typename Tile::Right, Tile::kProducts, 2>(sums, left, left + Tile::kLeftBytes,
                                                                            Tile::first_m(), Tile::first_n());
  });
}

}  // namespace dynaprune::cuda
