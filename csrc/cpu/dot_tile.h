// Dot products along the outputs of stored blocks, and their transposition. Include after simd.h.
#pragma once

#include "microkernel.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

template <int... J>
struct Sequence {};
template <int N, int... J>
struct MakeSequence : MakeSequence<N - 1, N - 1, J...> {};
template <int... J>
struct MakeSequence<0, J...> {
  typedef Sequence<J...> Type;
};

typedef int32_t vint __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES)));
template <class Vec>
struct LaneIndex {
  typedef vint Type;
};
template <>
struct LaneIndex<vdouble> {
  typedef vlong Type;
};

// Swaps the off-diagonal S x S squares of two rows: lanes with bit S from the other row.
template <int S, int L, class Vec, int... J>
DYNAPRUNE_INLINE void swap_squares(Vec& a, Vec& b, Sequence<J...>) {
#if defined(__clang__)
  const Vec low = __builtin_shufflevector(a, b, ((J & S) ? L + J - S : J)...);
  const Vec high = __builtin_shufflevector(a, b, ((J & S) ? L + J : J + S)...);
#else
  typedef typename LaneIndex<Vec>::Type Index;
  const Vec low = __builtin_shuffle(a, b, Index{((J & S) ? L + J - S : J)...});
  const Vec high = __builtin_shuffle(a, b, Index{((J & S) ? L + J : J + S)...});
#endif
  a = low;
  b = high;
}

template <int S, int L, class Vec>
DYNAPRUNE_INLINE void transpose_from(Vec (&r)[L]) {
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (!(i & S)) swap_squares<S, L>(r[i], r[i + S], typename MakeSequence<L>::Type());
    transpose_from<S * 2, L>(r);
  }
}

// to[o][i] = from[i][o], widened, for a block of bi by bo.
template <class T, class A>
void transpose_block(const T* from, int64_t bi, int64_t bo, A* to) {
  constexpr int L = kLanes<T>;
  typedef typename Num<T>::Vec Vec;
  for (int64_t i = 0; i < bi; i += L) {
    const int inputs = int(bi - i < L ? bi - i : L);
    for (int64_t o = 0; o < bo; o += L) {
      const int outputs = int(bo - o < L ? bo - o : L);
      Vec r[L];
      if (inputs == L && outputs == L) {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) r[j] = load(from + (i + j) * bo + o);
        transpose_from<1, L>(r);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store(to + (o + j) * bi + i, r[j]);
      } else {
        for (int j = 0; j < outputs; ++j)
          for (int k = 0; k < inputs; ++k) to[(o + j) * bi + i + k] = widen(from[(i + k) * bo + o + j]);
      }
    }
  }
}

// Lane j of the result is the sum of the lanes of v[j]: L sums by L - 1 additions, in an order fixed by L.
template <int S, int L, class Vec>
DYNAPRUNE_INLINE Vec sum_rows_from(Vec (&v)[L]) {
  if constexpr (S == L) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2 * S) {
      swap_squares<S, L>(v[i], v[i + S], typename MakeSequence<L>::Type());
      v[i] = v[i] + v[i + S];
    }
    return sum_rows_from<S * 2, L>(v);
  }
}

#if DYNAPRUNE_VECTOR_REGISTERS >= 32
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 2;
#endif
constexpr int kDotInputs = 4;

// y[m][i] = sum over terms of x[m] . value[i], for MR rows and IR of a block's stored rows (ldv values apart, the first
// `values_offset` into the block). A term's `depth` counts along the dot product; nothing past it is read.
template <class T, int MR, int IR>
void dot_tile(const T* x, int64_t ldx, const Term<T>* terms, int64_t count, int64_t values_offset, int64_t ldv, T* y,
              int64_t ldy) {
  typedef typename Num<T>::Vec Vec;
  typedef typename Num<T>::Acc A;
  constexpr int L = kLanes<T>;
  Vec acc[MR][IR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < IR; ++i) acc[m][i] = Vec{};
  for (int64_t t = 0; t < count; ++t) {
    const T* w = terms[t].values + values_offset;
    const T* p = x + terms[t].offset;
    int64_t o = 0;
#pragma GCC unroll 1
    for (; o + L <= terms[t].depth; o += L) {
      Vec b[IR];
#pragma GCC unroll 4
      for (int i = 0; i < IR; ++i) b[i] = load(w + i * ldv + o);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) {
        const Vec a = load(p + m * ldx + o);
#pragma GCC unroll 4
        for (int i = 0; i < IR; ++i) acc[m][i] = a * b[i] + acc[m][i];
      }
    }
    if (o < terms[t].depth) {
      const int last = int(terms[t].depth - o);
      Vec b[IR];
#pragma GCC unroll 4
      for (int i = 0; i < IR; ++i) b[i] = load_partial(w + i * ldv + o, last);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) {
        const Vec a = load_partial(p + m * ldx + o, last);
#pragma GCC unroll 4
        for (int i = 0; i < IR; ++i) acc[m][i] = a * b[i] + acc[m][i];
      }
    }
  }
  constexpr int kSums = MR * IR, kGroups = (kSums + L - 1) / L;
  A sums[kGroups * L];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    Vec v[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) v[j] = g * L + j < kSums ? acc[(g * L + j) / IR % MR][(g * L + j) % IR] : Vec{};
    store(sums + g * L, sum_rows_from<1, L>(v));
  }
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < IR; ++i) narrow(sums[m * IR + i], y + m * ldy + i);
}

template <class T>
using DotTile = void (*)(const T*, int64_t, const Term<T>*, int64_t, int64_t, int64_t, T*, int64_t);

template <class T, int MR = 1, int IR = 1>
DotTile<T> dot_tile_for(int rows, int inputs) {
  if constexpr (IR < kDotInputs) {
    if (inputs > IR) return dot_tile_for<T, MR, IR + 1>(rows, inputs);
  }
  if constexpr (MR < kDotRows) {
    if (rows > MR) return dot_tile_for<T, MR + 1, IR>(rows, inputs);
  }
  return dot_tile<T, MR, IR>;
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
