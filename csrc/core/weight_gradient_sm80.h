// Gradients of blocks: sums over the rows (tokens, pixels) of two activations, what linear and conv2d share.
#pragma once

#include "core/packed_index.h"
#include "core/product_sm80.h"

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

// Where gradients of blocks go. With `partial` (float, [capacity, bi, bo] of this split) there only.
template <class T>
struct GradientOutput {
  float* partial;
  T* dvalues;
  const T* values;  // null: no saliency
  float* wg;        // [rows * columns]
};

// Writes the blocks of a chunk, each 1 << log_bi inputs high, exact zeros in their padding: beyond rows.real() inputs
// or `real_outputs` outputs.
template <class Tile, class Rows>
DYN_DEVICE void store_blocks(const typename Tile::Sums& sums, const Rows& rows, const LayoutView& view, Chunk chunk,
                             int log_bi, int real_outputs, const GradientOutput<typename Tile::Element>& out,
                             unsigned char* shared) {
  using T = typename Tile::Element;
  const bool salient = out.partial == nullptr && out.values != nullptr;
  float weighted[Tile::kM][Tile::kN / 2];
  DYN_UNROLL
  for (int i = 0; i < Tile::kM; ++i) {
    DYN_UNROLL
    for (int j = 0; j < Tile::kN / 2; ++j) weighted[i][j] = 0.0f;
    const int entry = chunk.begin + ((Tile::first_m() + 16 * i) >> log_bi);
    if (entry >= chunk.end) continue;
    const int slot = view.row_slots[entry];
    const auto place = rows.entry(entry);
    if (!is_slot(slot, view.capacity) || !rows.exists(place)) continue;
    const int64_t block = int64_t(slot) * Tile::kOutputs << log_bi;
    const int real_inputs = rows.real(place);
    DYN_UNROLL
    for (int j = 0; j < Tile::kN; ++j)
      DYN_UNROLL
      for (int e = 0; e < 4; e += 2) {
        const int m = Tile::m(i, e) & ((1 << log_bi) - 1), n = Tile::n(j);
        const bool real[2] = {m < real_inputs && n < real_outputs, m < real_inputs && n + 1 < real_outputs};
        const float sum[2] = {real[0] ? sums[i][j][e] : 0.0f, real[1] ? sums[i][j][e + 1] : 0.0f};
        const int64_t at = block + m * Tile::kOutputs + n;
        if (out.partial != nullptr) {
          *reinterpret_cast<Pair<float>*>(out.partial + at) = {{sum[0], sum[1]}};
          continue;
        }
        *reinterpret_cast<Pair<T>*>(out.dvalues + at) = {{from_float<T>(sum[0]), from_float<T>(sum[1])}};
        if (!salient) continue;
        const Pair<T> weight = *reinterpret_cast<const Pair<T>*>(out.values + at);
        DYN_UNROLL
        for (int p = 0; p < 2; ++p)  // the weight's padding may hold anything
          if (real[p]) weighted[i][j / 2] += sum[p] * to_float(weight.element[p]);
      }
  }
  if (!salient) return;
  float* cells = reinterpret_cast<float*>(shared);
  sync_block();  // the operands have been read
  store_cells<Tile>(weighted, cells);
  sync_block();
  const int entry = chunk.begin + thread(), height = (1 << log_bi) / 16;
  if (entry >= chunk.end) return;
  const int column = view.row_cols[entry];
  if (is_column(column, view.columns))
    out.wg[chunk.row * view.columns + column] =
        sum_of_cells<Tile>(cells, thread() * height, height, 0, Tile::kOutputs / 16);
}

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
