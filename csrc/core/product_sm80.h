// The product that forward and dgrad of linear and conv2d share: rows of an activation, gathered by a functor, times
// the live blocks of one list.
//
// A functor `Rows` gathers 16-byte pieces of an activation (MatrixRows below; pixels of a convolution). It serves the
// sums over rows in weight_gradient_sm80.h too:
//   Row row(int64_t position, bool exists)   what a thread keeps of a row; one of zeros where there is none
//   Entry entry(int entry)                what the index says of a list's entry; just reads, used one step later
//   bool exists(Entry)                    whether there is such a block; asked before whatever takes an entry
//   Part part(Entry, int within)          the piece that starts at element `within` of the entry's summed side
//   Part nothing()                        a piece of zeros
//   const T* address(Row, Part, bool& valid)   where it lies; not valid: zeros, and nothing is read
//   int real(Entry)                       elements of the summed side that are no padding, at least 1
#pragma once

#include "core/packed_index.h"
#include "core/tile_sm80.h"

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

// One thread block's output tile: M rows (64 or 128) x N columns, N one side of a block (16, 32, 64 or 128). DGRAD: the
// sum runs over the outputs of values [bi, bo], along its rows.
template <class T, int M, int N, int PRODUCTS, bool DGRAD>
struct ProductTile : WarpTiles<M, N> {
  using Element = T;
  static constexpr int kRows = M, kColumns = N, kProducts = PRODUCTS;
  static constexpr bool kDgrad = DGRAD;
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kDepthBytes = N == 128 ? 64 : 128, kDepth = kDepthBytes / sizeof(T);  // summed per stage
  static constexpr int kDepthPieces = kDepthBytes / 16, kRowPieces = N / kPiece;
  static constexpr int kStages = N == 128 ? 4 : 3;
  static constexpr int kPerProcessor = sizeof(T) == 2 ? 2 : 1;  // thread blocks that registers are to suffice for

  using Left = SharedTile<T, kDepthPieces, true>;                            // [M][kDepth]
  using Right = SharedTile<T, DGRAD ? kDepthPieces : kRowPieces, DGRAD>;     // [kDepth][N], for dgrad [N][kDepth]
  using Staged = SharedTile<T, kRowPieces, false>;                           // [M][N], the result
  static constexpr int kLeftBytes = M * kDepthBytes, kStageBytes = (M + N) * kDepthBytes;
  static constexpr int kStagedBytes = M * N * sizeof(T);
  static constexpr int kSharedBytes = kStages * kStageBytes > kStagedBytes ? kStages * kStageBytes : kStagedBytes;
};

// Entries begin .. end of a list, and the slots of all entries.
struct ListedBlocks {
  const int32_t* slots;
  int64_t capacity;
  int begin, end;
};

// sums = rows first .. first + M (those below `count`) times the blocks of the list. A block is summed over
// 1 << log_inner elements: one that is larger than a stage takes several, smaller ones share it.
template <class Tile, class Rows>
DYN_DEVICE void product(typename Tile::Sums& sums, const Rows& rows, int64_t first, int64_t count,
                        const typename Tile::Element* values, int log_inner, ListedBlocks list,
                        unsigned char* shared) {
  using T = typename Tile::Element;
  using Left = typename Tile::Left;
  using Right = typename Tile::Right;
  constexpr int kPiece = Tile::kPiece, kDepthPieces = Tile::kDepthPieces;
  const int inner = 1 << log_inner;

  // A thread copies one piece of several rows of the left tile.
  constexpr int kLeftStride = Tile::kThreads / kDepthPieces, kLeftRows = Tile::kRows / kLeftStride;
  const int depth_row = thread() / kDepthPieces, depth_piece = thread() % kDepthPieces;
  typename Rows::Row row[kLeftRows];
  DYN_UNROLL
  for (int i = 0; i < kLeftRows; ++i) {
    const int64_t position = first + depth_row + i * kLeftStride;
    row[i] = rows.row(position, position < count);
  }
  // Of the right tile likewise for dgrad, else one piece of neighbouring rows, at most 16: of one block either way.
  constexpr int kRightRows = Tile::kColumns * kDepthPieces / Tile::kThreads;
  static_assert(kRightRows >= 1 && kRightRows <= 16, "a thread copies something, and from one block");
  const int right_row = Tile::kDgrad ? depth_row : thread() / Tile::kRowPieces * kRightRows;
  const int right_piece = Tile::kDgrad ? depth_piece : thread() % Tile::kRowPieces;
  const int left_k = depth_piece * kPiece, right_k = Tile::kDgrad ? left_k : right_row;

  typename Rows::Entry left_entry, right_entry;  // of the next step to copy
  bool left_listed = false, right_listed = false;
  int slot = 0;
  const auto look_up = [&](int step) {
    const int left = list.begin + ((step * Tile::kDepth + left_k) >> log_inner);
    const int right = list.begin + ((step * Tile::kDepth + right_k) >> log_inner);
    left_listed = left < list.end;
    right_listed = right < list.end;
    left_entry = rows.entry(left_listed ? left : list.begin);
    right_entry = rows.entry(right_listed ? right : list.begin);
    slot = list.slots[right_listed ? right : list.begin];
  };
  const auto copy = [&](int step, int stage) {
    unsigned char* left = shared + stage * Tile::kStageBytes;
    unsigned char* right = left + Tile::kLeftBytes;
    const int left_within = (step * Tile::kDepth + left_k) & (inner - 1);
    const auto part = part_of(rows, left_listed, left_entry, left_within);
    DYN_UNROLL
    for (int i = 0; i < kLeftRows; ++i) {
      bool valid;
      const T* from = rows.address(row[i], part, valid);
      cp_async_16(left + Left::at(depth_row + i * kLeftStride, depth_piece), from, valid ? 16 : 0);
    }
    // Padding of values may hold anything, and zero times that need not be zero.
    const int within = (step * Tile::kDepth + right_k) & (inner - 1);
    const bool exists = right_listed && rows.exists(right_entry) && is_slot(slot, list.capacity);
    const int real = exists ? rows.real(right_entry) - within : 0;
    const T* block = values + (int64_t(exists ? slot : 0) * Tile::kColumns << log_inner);
    if constexpr (Tile::kDgrad) {
      const int bytes = (real < 0 ? 0 : real < kPiece ? real : kPiece) * int(sizeof(T));
      const T* from = block + (right_row << log_inner) + within;
      DYN_UNROLL
      for (int i = 0; i < kRightRows; ++i)
        cp_async_16(right + Right::at(right_row + i * kLeftStride, right_piece), from + (i * kLeftStride << log_inner),
                    bytes);
    } else {
      const T* from = block + within * Tile::kColumns + right_piece * kPiece;
      DYN_UNROLL
      for (int i = 0; i < kRightRows; ++i)
        cp_async_16(right + Right::at(right_row + i, right_piece), from + i * Tile::kColumns, i < real ? 16 : 0);
    }
    look_up(step + 1);
  };

  DYN_UNROLL
  for (int i = 0; i < Tile::kM; ++i)
    for (int j = 0; j < Tile::kN; ++j)
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
  const int steps = ceil_div((list.end - list.begin) << log_inner, Tile::kDepth);
  if (steps > 0) look_up(0);
  pipeline<Tile::kStages>(steps, copy, [&](int stage) {
    const unsigned char* left = shared + stage * Tile::kStageBytes;
    multiply<Left, Right, Tile::kProducts, Tile::kDepthBytes / 32>(sums, left, left + Tile::kLeftBytes,
                                                                   Tile::first_m(), Tile::first_n());
  });
}

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
