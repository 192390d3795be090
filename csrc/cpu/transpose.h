// Squares of lanes x lanes values, transposed in registers. Include after simd.h.
#pragma once

#include "packing.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

// row[i][j] and row[j][i] change places: in step h, the off-diagonal h x h squares do.
template <class T>
DYNAPRUNE_INLINE void transpose_rows(typename Num<T>::Vec (&row)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  typedef typename Num<T>::Vec Vec;
#if defined(__clang__)
  typename Num<T>::Acc lanes[L][L];
  for (int i = 0; i < L; ++i) store(lanes[i], row[i]);
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) row[i][j] = lanes[j][i];
#else
  typedef decltype(Vec{} < Vec{}) Lanes;
#pragma GCC unroll 4
  for (int h = L / 2; h > 0; h /= 2) {
    Lanes upper = {}, lower = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) {
      upper[lane] = lane & h ? L + lane - h : lane;
      lower[lane] = lane & h ? L + lane : lane + h;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & h) continue;
      const Vec a = row[i], b = row[i + h];
      row[i] = __builtin_shuffle(a, b, upper);
      row[i + h] = __builtin_shuffle(a, b, lower);
    }
  }
#endif
}

template <class T, class U>
DYNAPRUNE_INLINE void transpose_square(const T* from, int64_t from_stride, U* to, int64_t to_stride) {
  constexpr int L = kLanes<T>;
  typename Num<T>::Vec row[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) row[i] = load(from + i * from_stride);
  transpose_rows<T>(row);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(to + i * to_stride, row[i]);
}

// Every second lane of a and b, from the first on.
template <class T>
DYNAPRUNE_INLINE typename Num<T>::Vec even_lanes(typename Num<T>::Vec a, typename Num<T>::Vec b) {
  constexpr int L = kLanes<T>;
  typedef typename Num<T>::Vec Vec;
#if defined(__clang__)
  Vec even;
  for (int lane = 0; lane < L; ++lane) even[lane] = lane < L / 2 ? a[2 * lane] : b[2 * lane - L];
  return even;
#else
  decltype(Vec{} < Vec{}) even = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) even[lane] = 2 * lane;
  return __builtin_shuffle(a, b, even);
#endif
}

// Channel-major pixels to pixel-major ones: channel c of pixel j, from[c * channel_step + j * Step], becomes
// to[j * to_stride + c], for lanes x lanes of them. Step * lanes elements of each channel are read.
template <int Step, class T>
__attribute__((noinline)) void gather_square(const T* from, int64_t channel_step, typename Num<T>::Acc* to,
                                             int64_t to_stride) {
  constexpr int L = kLanes<T>;
  typename Num<T>::Vec row[L];
#pragma GCC unroll 16
  for (int c = 0; c < L; ++c) {
    const T* channel = from + c * channel_step;
    if constexpr (Step == 2)
      row[c] = even_lanes<T>(load(channel), load(channel + L));
    else
      row[c] = load(channel);
  }
  transpose_rows<T>(row);
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) store(to + j * to_stride, row[j]);
}

// The same at the edges: channel c < `channels` of pixel j < `pixels`, from[c * channel_step + j], becomes to[j][c];
// channels up to `width` (at most the lanes) become zero, and to[j] from `pixels` on, too.
template <class T>
__attribute__((noinline)) void gather_channels(const T* from, int64_t channel_step, int channels, int pixels,
                                               typename Num<T>::Acc* const* to, int width) {
  constexpr int L = kLanes<T>;
  typename Num<T>::Vec row[L];
  if (channels == L && pixels == L) {
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) row[c] = load(from + c * channel_step);
  } else {
    for (int c = 0; c < L; ++c) {
      row[c] = typename Num<T>::Vec{};
      if (c < channels) row[c] = load_partial(from + c * channel_step, pixels);
    }
  }
  transpose_rows<T>(row);
  if (width == L) {
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) store(to[j], row[j]);
  } else {
    for (int j = 0; j < L; ++j) store_partial(to[j], row[j], width);
  }
}

// The way back: from[j * stride + c] becomes to[c * channel_step + j * pixel_step] for c < `channels` and j < `pixels`.
// lanes x lanes values are read.
template <class T>
__attribute__((noinline)) void scatter_channels(const typename Num<T>::Acc* from, int64_t stride, int channels,
                                                int pixels, T* to, int64_t channel_step, int64_t pixel_step) {
  typedef typename Num<T>::Acc A;
  constexpr int L = kLanes<T>;
  if (pixel_step != 1) {
    for (int c = 0; c < channels; ++c)
      for (int j = 0; j < pixels; ++j) narrow(from[j * stride + c], to + c * channel_step + j * pixel_step);
    return;
  }
  if (channels == L && pixels == L) return transpose_square(from, stride, to, channel_step);
  A lanes[L * L];
  transpose_square(from, stride, lanes, L);
  for (int c = 0; c < channels; ++c) store_partial(to + c * channel_step, load(lanes + c * L), pixels);
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
