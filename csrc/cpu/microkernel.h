// Register-tiled inner loops of the linear kernels. Include after simd.h.
//
// multiply_tile: MR rows by NV vectors of outputs stay in registers across all live blocks of an output block row.
// A live block is a Term: where its values are, where its inputs begin relative to a row, and how deep it is.
// outer_tile: IR inputs by NV vectors of outputs, summed over rows of packed panels (weight gradients).
#pragma once

#include "simd.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

// Accumulator tiles: most vectors per row, and most rows for a given number of vectors, without spilling.
#if DYNAPRUNE_VECTOR_REGISTERS >= 32
constexpr int kMaxVectors = 4;
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int kMaxVectors = 2;
constexpr int tile_rows(int vectors) { return vectors == 2 ? 6 : 12; }
#endif
constexpr int kMaxTileRows = 12;

template <class V>
struct Term {
  const V* values;  // [depth][ldv], input-major
  int64_t offset;   // elements from a row pointer to the first input of the block
  int64_t depth;    // inputs to read, >= 1 (less than the block's in a ragged last column)
};

// Rows of an activation, and memory that will be read soon: every term asks for `lines` more cache lines of it.
template <class X>
struct TileRows {
  const X* first;
  int64_t stride;  // elements
  const char* ahead;
  int64_t lines;
};

template <class V, bool Tail, int NV>
DYNAPRUNE_INLINE void load_values(const V* w, int last, typename Num<V>::Vec (&b)[NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v)
    b[v] = Tail && v == NV - 1 ? load_partial(w + v * kLanes<V>, last) : load(w + v * kLanes<V>);
}

// One base pointer serves three rows (x86 addresses reach base, base + stride and base + 2 * stride), so that twelve
// rows need five address registers.
template <class X, class V, int MR, int NV, bool Tail>
DYNAPRUNE_INLINE void add_term(TileRows<X>& rows, const Term<V>& term, const V* w, int64_t ldv, int last,
                               typename Num<V>::Vec (&acc)[MR][NV]) {
  constexpr int kBases = (MR + 2) / 3;
  constexpr int kUnroll = 4;
  const int64_t stride = rows.stride * int64_t(sizeof(X));
  const char* p[kBases];
#pragma GCC unroll 16
  for (int g = 0; g < kBases; ++g)
    p[g] = reinterpret_cast<const char*>(rows.first + term.offset) + 3 * g * stride;
  for (int64_t line = 0; line < rows.lines; ++line) prefetch_l2(rows.ahead + line * 64);
  rows.ahead += rows.lines * 64;
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + kUnroll <= term.depth; k += kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      typename Num<V>::Vec b[NV];
      load_values<V, Tail, NV>(w, last, b);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const auto a = splat(widen(reinterpret_cast<const X*>(p[m / 3] + (m % 3) * stride)[u]));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = a * b[v] + acc[m][v];
      }
      w += ldv;
    }
#pragma GCC unroll 16
    for (int g = 0; g < kBases; ++g) {
      p[g] += kUnroll * sizeof(X);
      __asm__ volatile("" : "+r"(p[g]));  // keeps the compiler from rewriting the bases into one register per row
    }
  }
#pragma GCC unroll 1
  for (; k < term.depth; ++k) {
    typename Num<V>::Vec b[NV];
    load_values<V, Tail, NV>(w, last, b);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const auto a = splat(widen(*reinterpret_cast<const X*>(p[m / 3] + (m % 3) * stride)));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = a * b[v] + acc[m][v];
    }
    w += ldv;
#pragma GCC unroll 16
    for (int g = 0; g < kBases; ++g) p[g] += sizeof(X);
  }
}

// y[m][0 .. width) = bias + sum over terms, for MR rows and width = (NV - 1) * lanes + last outputs.
// `values_offset` moves into every block (the second half of a wide one); `bias` may be null.
template <class X, class V, class Y, int MR, int NV, bool Tail>
void multiply_tile(TileRows<X> rows, Y* y, int64_t ldy, const Term<V>* terms, int64_t count, int64_t ldv,
                   int64_t values_offset, const typename Num<V>::Acc* bias, int last) {
  typedef typename Num<V>::Vec Vec;
  constexpr int L = kLanes<V>;
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) prefetch_for_write(y + m * ldy + v * L);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    Vec start = {};
    if (bias) start = Tail && v == NV - 1 ? load_partial(bias + v * L, last) : load(bias + v * L);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) acc[m][v] = start;
  }
  for (int64_t t = 0; t < count; ++t)
    add_term<X, V, MR, NV, Tail>(rows, terms[t], terms[t].values + values_offset, ldv, last, acc);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    Y* out = y + m * ldy;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if (Tail && v == NV - 1)
        store_partial(out + v * L, acc[m][v], last);
      else
        store(out + v * L, acc[m][v]);
    }
  }
}

template <class X, class V, class Y>
using MultiplyTile = void (*)(TileRows<X>, Y*, int64_t, const Term<V>*, int64_t, int64_t, int64_t,
                              const typename Num<V>::Acc*, int);

// The tile function for `rows` (1 .. tile_rows(vectors)) and `vectors` (1 .. kMaxVectors).
template <class X, class V, class Y, int NV = 1, int MR = 1>
MultiplyTile<X, V, Y> multiply_tile_for(int rows, int vectors, bool tail) {
  if constexpr (NV <= kMaxVectors) {
    if (vectors > NV) return multiply_tile_for<X, V, Y, NV + 1, 1>(rows, vectors, tail);
    if constexpr (MR < tile_rows(NV)) {
      if (rows > MR) return multiply_tile_for<X, V, Y, NV, MR + 1>(rows, vectors, tail);
    }
    return tail ? multiply_tile<X, V, Y, MR, NV, true> : multiply_tile<X, V, Y, MR, NV, false>;
  } else {
    return nullptr;
  }
}

// Most inputs (rows of the tile) for NV vectors of outputs in outer_tile.
constexpr int outer_rows(int vectors) { return tile_rows(vectors) > 8 ? 8 : tile_rows(vectors); }

// Moves a pointer in a way the compiler does not see through: it would keep one register a row.
template <class A>
DYNAPRUNE_INLINE void next_row(A*& p, int64_t ld) {
  p += ld;
  __asm__ volatile("" : "+r"(p));
}

// sum[i][0 .. width) (+)= sum_m x[m][i] * dy[m][0 .. width) for IR inputs, width = (NV - 1) * lanes + last.
// `dy` rows must be readable to NV whole vectors (packed panels are padded); nothing past `width` is stored.
template <class A, int IR, int NV, bool Tail>
void outer_tile(const A* x, int64_t ldx, const A* dy, int64_t lddy, int64_t rows, A* sum, int64_t ldsum, bool add,
                int last) {
  typedef typename Num<A>::Vec Vec;
  constexpr int L = kLanes<A>;
  Vec acc[IR][NV];
  A* to = sum;
#pragma GCC unroll 16
  for (int i = 0; i < IR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      acc[i][v] = Vec{};
      prefetch_for_write(to + v * L);
    }
    next_row(to, ldsum);
  }
#pragma GCC unroll 1
  for (int64_t m = 0; m < rows; ++m) {
    Vec b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = load(dy + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < IR; ++i) {
      const Vec a = splat(x[i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = a * b[v] + acc[i][v];
    }
    x += ldx;
    dy += lddy;
  }
  to = sum;
#pragma GCC unroll 16
  for (int i = 0; i < IR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const bool partial = Tail && v == NV - 1;
      Vec total = acc[i][v];
      if (add) total = total + (partial ? load_partial(to + v * L, last) : load(to + v * L));
      if (partial)
        store_partial(to + v * L, total, last);
      else
        store(to + v * L, total);
    }
    next_row(to, ldsum);
  }
}

template <class A>
using OuterTile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, A*, int64_t, bool, int);

// The tile function for `inputs` (1 .. outer_rows(vectors)) and `vectors` (1 .. kMaxVectors).
template <class A, int NV = 1, int IR = 1>
OuterTile<A> outer_tile_for(int inputs, int vectors, bool tail) {
  if constexpr (NV <= kMaxVectors) {
    if (vectors > NV) return outer_tile_for<A, NV + 1, 1>(inputs, vectors, tail);
    if constexpr (IR < outer_rows(NV)) {
      if (inputs > IR) return outer_tile_for<A, NV, IR + 1>(inputs, vectors, tail);
    }
    return tail ? outer_tile<A, IR, NV, true> : outer_tile<A, IR, NV, false>;
  } else {
    return nullptr;
  }
}

// A rectangle of memory that will be read soon, asked for a few cache lines at a time.
struct Ahead {
  const char* row;
  int64_t ld, row_bytes, rows;  // ld in bytes
  int64_t lines;                // of one request
  int64_t at = 0;
  void ask() {
    for (int64_t line = 0; line < lines && rows > 0; ++line) {
      prefetch_l2(row + at);
      at += 64;
      if (at >= row_bytes) {
        at = 0;
        row += ld;
        --rows;
      }
    }
  }
};

DYNAPRUNE_INLINE Ahead nothing_ahead() { return Ahead{nullptr, 0, 0, 0, 0}; }

// Rows [row, row + rows) and elements [begin, end) of a matrix `ld` wide, to be asked for in `requests` pieces.
template <class T>
Ahead rectangle_ahead(const T* from, int64_t ld, int64_t row, int64_t rows, int64_t begin, int64_t end,
                      int64_t requests) {
  const int64_t bytes = (end - begin) * int64_t(sizeof(T)), lines = rows * bytes / 64;
  return Ahead{reinterpret_cast<const char*>(from + row * ld + begin), ld * int64_t(sizeof(T)), bytes, rows,
               requests > 0 ? (lines + requests - 1) / requests : lines};
}

// sum[0 .. depth)[0 .. width) (+)= x^T dy over `rows` rows of two panels: one block of a weight gradient.
template <class A>
void outer_block(const A* x, int64_t ldx, int64_t depth, const A* dy, int64_t lddy, int64_t width, int64_t rows,
                 A* sum, int64_t ldsum, bool add, Ahead& x_ahead, Ahead& dy_ahead) {
  constexpr int L = kLanes<A>;
  for (int64_t o = 0; o < width; o += kMaxVectors * L) {
    const int64_t outputs = width - o < kMaxVectors * L ? width - o : kMaxVectors * L;
    const int vectors = int((outputs + L - 1) / L);
    const int last = int(outputs - (vectors - 1) * L);
    const int64_t pieces = (depth + outer_rows(vectors) - 1) / outer_rows(vectors);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      x_ahead.ask();
      dy_ahead.ask();
      const int64_t i0 = depth * piece / pieces, i1 = depth * (piece + 1) / pieces;
      outer_tile_for<A>(int(i1 - i0), vectors, last != L)(x + i0, ldx, dy + o, lddy, rows, sum + i0 * ldsum + o,
                                                          ldsum, add, last);
    }
  }
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
