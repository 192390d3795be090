// What both directions of a convolution prepare: places of columns and planes, panels of values. Include after simd.h.
#pragma once

#include "conv2d_planes.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

// Carves arrays out of one piece of memory; with a null base it only counts.
struct Carver {
  char* base;
  int64_t used;
  template <class E>
  E* take(int64_t count) {
    E* at = base == nullptr ? nullptr : reinterpret_cast<E*>(base + used);
    used = round_up(used + most(1, count) * int64_t(sizeof(E)), 64);
    return at;
  }
};

struct Grid {
  int64_t taps, group_in, channel_blocks, phases;
};
DYNAPRUNE_INLINE Grid grid_of(const ConvShape& s) {
  Grid g;
  g.taps = s.kernel_h * s.kernel_w;
  g.group_in = s.in / s.groups;
  g.channel_blocks = divide_up(g.group_in, s.bi);
  g.phases = s.stride_h * s.stride_w;
  return g;
}

// Where a column of a block row reads: its tap's stride phase and place in that phase's plane, its channel block.
struct ColumnPlace {
  int64_t row, col;  // of the tap in the plane
  int64_t list;      // channel block * phases + phase; a group adds its channel blocks * phases
  int64_t inputs;    // of the channel block that exist
};

// All columns: taps outside, channel blocks inside.
DYNAPRUNE_INLINE void place_columns(const ConvShape& s, const Grid& g, ColumnPlace* columns) {
  for (int64_t tap = 0; tap < g.taps; ++tap) {
    const int64_t r = tap / s.kernel_w * s.dilation_h, c = tap % s.kernel_w * s.dilation_w;
    const int64_t phase = r % s.stride_h * s.stride_w + c % s.stride_w;
    for (int64_t block = 0; block < g.channel_blocks; ++block)
      *columns++ = {r / s.stride_h, c / s.stride_w, block * g.phases + phase,
                    least(s.bi, g.group_in - block * s.bi)};
  }
}

// The first column list of a block row's group.
DYNAPRUNE_INLINE int64_t first_list(const ConvShape& s, const Grid& g, int64_t rows, int64_t row) {
  return s.groups == 1 ? 0 : row / (rows / s.groups) * g.channel_blocks * g.phases;
}

// Adds the planes of channels [channel, channel + count) at a place of the image; returns the first one's number.
DYNAPRUNE_INLINE int64_t add_planes(PlaneSet& set, int64_t channel, int64_t count, int64_t row0, int64_t col0) {
  const int64_t first = set.count;
  for (int64_t c = 0; c < count; c += set.width)
    set.planes[set.count++] = {channel + c, least(set.width, count - c), row0, col0};
  return first;
}

// The planes of x for the column lists marked in `used`: lookup[list] becomes the first plane.
DYNAPRUNE_INLINE void plan_input_planes(const ConvShape& s, const Grid& g, const uint8_t* used, PlaneSet& set,
                                        int64_t* lookup) {
  set.count = 0;
  set.width = plane_width(s.bi);
  set.cols = s.out_w + (s.kernel_w - 1) * s.dilation_w / s.stride_w;
  set.row_step = s.stride_h;
  set.col_step = s.stride_w;
  set.channels = s.in;
  set.image_rows = s.height;
  set.image_cols = s.width;
  set.channels_last = s.x_channels_last;
  for (int64_t list = 0; list < s.groups * g.channel_blocks * g.phases; ++list) {
    if (!used[list]) continue;
    const int64_t phase = list % g.phases, block = list / g.phases % g.channel_blocks,
                  group = list / g.phases / g.channel_blocks;
    lookup[list] = add_planes(set, group * g.group_in + block * s.bi, least(s.bi, g.group_in - block * s.bi),
                              phase / s.stride_w - s.padding_h, phase % s.stride_w - s.padding_w);
  }
}

// Values of live blocks as panels of the type that sums are kept in: as they are, or transposed.
template <class T>
struct Panels {
  const T* values;
  const int32_t* slots;
  int64_t count, bi, bo, stride;
  bool transposed;
  typename Num<T>::Acc* panels;  // [count][bi][stride], transposed [count][bo][stride]
};
constexpr int64_t kPanelsPerItem = 32;

template <class T>
void make_panels(void* context, int64_t item, int64_t) {
  typedef typename Num<T>::Acc A;
  constexpr int64_t L = kLanes<T>;
  const Panels<T>& g = *static_cast<const Panels<T>*>(context);
  const int64_t depth = g.transposed ? g.bo : g.bi;
  for (int64_t e = item * kPanelsPerItem; e < least(g.count, (item + 1) * kPanelsPerItem); ++e) {
    const T* from = g.values + g.slots[e] * g.bi * g.bo;
    A* to = g.panels + e * depth * g.stride;
    if (g.transposed && g.bi % L == 0 && g.bo % L == 0) {
      for (int64_t i = 0; i < g.bi; i += L)
        for (int64_t o = 0; o < g.bo; o += L)
          transpose_square(from + i * g.bo + o, g.bo, to + o * g.stride + i, g.stride);
    } else if (g.transposed) {
      for (int64_t o = 0; o < g.bo; ++o) {
        for (int64_t i = 0; i < g.bi; ++i) to[o * g.stride + i] = widen(from[i * g.bo + o]);
        for (int64_t i = g.bi; i < g.stride; ++i) to[o * g.stride + i] = 0;
      }
    } else {
      for (int64_t i = 0; i < g.bi; ++i)
        for (int64_t o = 0; o < g.stride; o += L)
          store(to + i * g.stride + o, load_partial(from + i * g.bo + o, int(most(0, least(L, g.bo - o)))));
    }
  }
}

template <class T>
const typename Num<T>::Acc* run_panels(Panels<T>& g, const Workers& workers) {
  typedef typename Num<T>::Acc A;
  const int64_t depth = g.transposed ? g.bo : g.bi;
  g.stride = round_up(g.transposed ? g.bi : g.bo, kLanes<T>);
  g.panels = static_cast<A*>(conv_scratch(kPanels, g.count * depth * g.stride * int64_t(sizeof(A))));
  workers.run(divide_up(g.count, kPanelsPerItem), make_panels<T>, &g);
  return g.panels;
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
