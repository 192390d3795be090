// The inner loop of forward and input gradient: a tile of target pixels gathers over a list of terms. Include after
// simd.h.
#pragma once

#include "packing.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

constexpr int kGroup = 4;  // neighbouring pixels at a constant distance, so that they share one address register

#if DYNAPRUNE_VECTOR_REGISTERS >= 32
constexpr int kMaxGroups[2] = {7, 3};  // for one and for two vectors of channels
#else
constexpr int kMaxGroups[2] = {3, 1};
#endif

template <class A>
struct GatherTerm {
  const A* values;  // [depth][stride of the panel]
  int64_t offset;   // from a pixel's place in the first plane to the first input
  int64_t depth;    // inputs, 1 .. plane width
};

template <class A, int KC, int NV, int G>
__attribute__((noinline)) void gather_tile(const GatherTerm<A>* terms, int64_t count, int64_t values_offset,
                                           int64_t values_stride, const A* const* source, const A* start,
                                           A* const* target, int64_t target_offset, int64_t target_step) {
  typedef typename Num<A>::Vec Vec;
  constexpr int L = kLanes<A>;
  constexpr int kUnroll = 4;
  Vec acc[G * kGroup][NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v)
#pragma GCC unroll 28
    for (int m = 0; m < G * kGroup; ++m) acc[m][v] = load(start + v * L);
  for (int64_t t = 0; t < count; ++t) {
    const A* p[G];
#pragma GCC unroll 7
    for (int g = 0; g < G; ++g) p[g] = source[g] + terms[t].offset;
    const A* w = terms[t].values + values_offset;
    int64_t k = terms[t].depth;
#pragma GCC unroll 1
    for (; k >= kUnroll; k -= kUnroll) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        Vec b[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) b[v] = load(w + v * L);
#pragma GCC unroll 28
        for (int m = 0; m < G * kGroup; ++m) {
          const Vec a = splat(p[m / kGroup][m % kGroup * KC + u]);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) acc[m][v] += a * b[v];
        }
        w += values_stride;
      }
#pragma GCC unroll 7
      for (int g = 0; g < G; ++g) p[g] += kUnroll;
    }
#pragma GCC unroll 1
    for (; k > 0; --k) {
      Vec b[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) b[v] = load(w + v * L);
#pragma GCC unroll 28
      for (int m = 0; m < G * kGroup; ++m) {
        const Vec a = splat(p[m / kGroup][m % kGroup * KC]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[m][v] += a * b[v];
      }
      w += values_stride;
#pragma GCC unroll 7
      for (int g = 0; g < G; ++g) p[g] += 1;
    }
  }
#pragma GCC unroll 7
  for (int g = 0; g < G; ++g) {
    A* to = target[g] + target_offset;
#pragma GCC unroll 4
    for (int m = 0; m < kGroup; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store(to + m * target_step + v * L, acc[g * kGroup + m][v]);
  }
}

template <class A>
using GatherTile = void (*)(const GatherTerm<A>*, int64_t, int64_t, int64_t, const A* const*, const A*, A* const*,
                            int64_t, int64_t);

template <class A, int KC, int NV = 1, int G = 1>
GatherTile<A> gather_tile_for(int groups, int vectors) {
  if constexpr (NV == 1) {
    if (vectors == 2) return gather_tile_for<A, KC, 2, 1>(groups, vectors);
  }
  if constexpr (G < kMaxGroups[NV - 1]) {
    if (groups > G) return gather_tile_for<A, KC, NV, G + 1>(groups, vectors);
  }
  return gather_tile<A, KC, NV, G>;
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
