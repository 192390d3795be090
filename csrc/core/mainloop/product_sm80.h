// The product that forward and dgrad of linear and conv2d share: rows of an activation, gathered by a functor
// (gather/matrix_rows.h), times the live blocks of one list.
#pragma once

#include "core/gather/matrix_rows.h"
#include "core/mainloop/pipeline_sm80.h"
#include "core/mma/tile_sm80.h"

namespace dynaprune::cuda {

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

}  // namespace dynaprune::cuda
