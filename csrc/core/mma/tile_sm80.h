// Products of matrices in shared memory by mma.sync.
//
// A tile lies in shared memory in pieces of 16 bytes. Piece p of row r stands at p XOR a function of r, so that the
// reads of one instruction touch every bank once, without padding.
#pragma once

#include "core/ptx/sm80.h"

namespace dynaprune::cuda {

// A matrix of rows of WIDTH pieces (a power of two). SUM_INSIDE: a row runs along the summed axis, else across it.
template <class T, int WIDTH, bool SUM_INSIDE>
struct SharedTile {
  using Element = T;
  static constexpr int kPiece = 16 / sizeof(T);  // elements
  static constexpr int kWidth = WIDTH;

  // Byte offset of a piece. ldmatrix reads the same piece of 8 rows. Without it (transposed 32-bit elements) a warp
  // reads two neighbouring pieces of 4 rows. Rows of 128 bytes or more move through 8 pieces, shorter ones share them.
  static DYN_DEVICE int at(int row, int piece) {
    constexpr int kRowsPerLine = WIDTH >= 8 ? 1 : 8 / WIDTH;
    constexpr int kMask = (WIDTH < 8 ? WIDTH : 8) - 1;
    const int turn = row / kRowsPerLine;
    return (row * WIDTH + (piece ^ ((kPaired ? turn << 1 : turn) & kMask))) * 16;
  }

  // Elements first .. first + 15 of the other axis times the step-th 32 bytes of the summed one. Quarters stand as an
  // mma's left operand wants them, or as two right ones: one after the other, in neighbouring registers.
  template <bool RIGHT>
  static DYN_DEVICE void fragment(uint32_t (&f)[4], const unsigned char* tile, int first, int step) {
    const int l = lane(), quarter = l / 8;
    const int other = RIGHT ? quarter / 2 : quarter % 2, summed = RIGHT ? quarter % 2 : quarter / 2;
    if constexpr (SUM_INSIDE) {
      ldmatrix_x4(f, tile + at(first + other * 8 + l % 8, step * 2 + summed));
    } else if constexpr (!kPaired) {
      ldmatrix_x4_transposed(f, tile + at(step * 16 + summed * 8 + l % 8, first / kPiece + other));
    } else {
      DYN_UNROLL
      for (int q = 0; q < 4; ++q) {
        const int k = step * 8 + (RIGHT ? q % 2 : q / 2) * 4 + l % 4;
        const int column = first + (RIGHT ? q / 2 : q % 2) * 8 + l / 4;
        memcpy(&f[q], tile + at(k, column / kPiece) + column % kPiece * 4, 4);
      }
    }
  }

 private:
  static constexpr bool kPaired = sizeof(T) == 4 && !SUM_INSIDE;
};

// float32 for the tensor core: rounded to tf32, with `rest` what that leaves over, rounded too (NaN of an infinity).
template <bool REST>
DYN_DEVICE void split_tf32(uint32_t (&f)[4], uint32_t (&rest)[4]) {
  DYN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float exact = float_of(f[i]);
    f[i] = to_tf32(exact);
    if constexpr (REST) rest[i] = to_tf32(exact - float_of(f[i]));
  }
}

// sums [16 M, 8 N] += left [16 M, STEPS * 32 bytes] right [8 N, STEPS * 32 bytes]^T, one warp's share of a stage.
// PRODUCTS: 3 gives float32 operands float32's precision (left over x left over is below it), 1 that of tf32.
template <class Left, class Right, int PRODUCTS, int STEPS, int M, int N>
DYN_DEVICE void multiply(float (&sums)[M][N][4], const unsigned char* left, const unsigned char* right, int first_m,
                         int first_n) {
  using T = typename Left::Element;
  constexpr bool kSplit = sizeof(T) == 4, kRest = PRODUCTS == 3;
  // Several steps at once would keep so many sums of single steps that registers spill.
  constexpr int kUnrolled = kRest ? 1 : STEPS;
  DYN_UNROLL_BY(kUnrolled)
  for (int step = 0; step < STEPS; ++step) {
    uint32_t b[N / 2][4], b_rest[N / 2][4];
    DYN_UNROLL
    for (int j = 0; j < N / 2; ++j) {
      Right::template fragment<true>(b[j], right, first_n + 16 * j, step);
      if constexpr (kSplit) split_tf32<kRest>(b[j], b_rest[j]);
    }
    DYN_UNROLL
    for (int i = 0; i < M; ++i) {
      uint32_t a[4], a_rest[4];
      Left::template fragment<false>(a, left, first_m + 16 * i, step);
      if constexpr (kSplit) split_tf32<kRest>(a, a_rest);
      DYN_UNROLL
      for (int j = 0; j < N; ++j) {
        const uint32_t* f = &b[j / 2][j % 2 * 2];
        if constexpr (kRest) {
          // A tensor core cuts sums off, ever in the same direction: sums of its own only for one step, the small
          // products first; the long ones are added outside, rounded to nearest.
          const uint32_t* rest = &b_rest[j / 2][j % 2 * 2];
          float of_step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          mma<T>(of_step, a_rest, f[0], f[1]);
          mma<T>(of_step, a, rest[0], rest[1]);
          mma<T>(of_step, a, f[0], f[1]);
          DYN_UNROLL
          for (int e = 0; e < 4; ++e) sums[i][j][e] += of_step[e];
        } else {
          mma<T>(sums[i][j], a, f[0], f[1]);
        }
      }
    }
  }
}

// How an M x N tile is shared out over warps of up to 64 x 32, and what of it a thread holds in registers:
// sums[i][j][e] stands at row m(i, e) and column n(j) + e % 2.
template <int M, int N>
struct WarpTiles {
  static constexpr int kWarps = M * N >= 128 * 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kWarpN = N < 32 ? N : 32, kAcross = N / kWarpN;
  static constexpr int kWarpM = M / (kWarps / kAcross);
  static constexpr int kM = kWarpM / 16, kN = kWarpN / 8;
  using Sums = float[kM][kN][4];

  static DYN_DEVICE int first_m() { return warp() / kAcross * kWarpM; }
  static DYN_DEVICE int first_n() { return warp() % kAcross * kWarpN; }
  static DYN_DEVICE int m(int i, int e) { return first_m() + 16 * i + e / 2 * 8 + lane() / 4; }
  static DYN_DEVICE int n(int j) { return first_n() + 8 * j + lane() % 4 * 2; }
};

// Two neighbours in a row of T.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T element[2];
};

}  // namespace dynaprune::cuda
