// What Hopper's kernels multiply in a convolution: implicit GEMM, pixels gathered by the copy engine
// (ptx/im2col_sm90.h). Which pixels these are, see pixels.h.
#pragma once

#include "core/gather/pixels.h"
#include "core/ptx/im2col_sm90.h"

namespace dynaprune::cuda::sm90 {

constexpr int kMostPhases = 4;  // of a strided convolution's dgrad, which needs a map for each

// What a tap sees of a block's channels.
struct ShiftedChannels {
  int channel;           // the first
  int shift_h, shift_w;  // of the copy
};

// The pixel that the copies for an output pixel begin at.
DYN_DEVICE Pixel input_pixel(const Conv2dSizes& s, int position) {
  const PixelGrid::Place place = s.output.place(position);
  return {place.image, place.j * s.stride_h - s.pad_h, place.i * s.stride_w - s.pad_w};
}

// Forward: output pixels, which read the input of their group.
struct OutputPixels {
  static constexpr bool kDgrad = false;
  Im2colMap x;  // in columns of a tile's pixels
  Conv2dSizes s;
  int positions;
  int ragged;  // the ragged channel block of a tap, where there is one

  struct List {
    int count, output, real;
    int first_input;  // of the group
  };
  struct Block {
    ShiftedChannels seen;
    int channel_block;
  };
  using Entry = int;

  DYN_DEVICE void prefetch() const { sm90::prefetch(x); }
  DYN_DEVICE int most() const { return positions; }
  DYN_DEVICE int inner() const { return s.bi; }
  DYN_DEVICE int width() const { return s.out_channels; }

  DYN_DEVICE List list(int row, int outer) const {
    return {positions, row * outer, s.out_channels - row * outer, row / s.rows_per_group * s.group_channels};
  }
  static DYN_DEVICE int64_t row(const List&, int position) { return position; }
  DYN_DEVICE Pixel start(const List&, int position) const { return input_pixel(s, position); }
  static DYN_DEVICE Entry entry(const LayoutView& view, int e) { return view.row_cols[e]; }
  static DYN_DEVICE bool exists(const LayoutView& view, Entry column) { return is_column(column, view.columns); }
  DYN_DEVICE Block block(Entry column) const {
    const Conv2dSizes::Tap tap = s.tap(column);
    return {{tap.channel_block * s.bi, tap.h, tap.w}, tap.channel_block};
  }
  DYN_DEVICE bool is_ragged(const Block& block) const { return block.channel_block == ragged; }

  DYN_DEVICE void copy(void* to, const List& list, Pixel start, const Block& block, int k, uint64_t* barrier) const {
    const ShiftedChannels& seen = block.seen;
    im2col_load(to, x, list.first_input + seen.channel + k, start, seen.shift_h, seen.shift_w, barrier);
  }
};

// Dgrad: the input pixels of a stride phase, which read the output's gradient. A tap reads output pixels *before* the
// one that tap 0 reads, and a copy shifts only forward: it begins as far before as the last tap reaches.
struct InputPixels {
  static constexpr bool kDgrad = true;
  Im2colMap dy[kMostPhases];  // in columns of a tile's pixels
  Conv2dSizes s;
  int largest_phase;  // its pixels
  int reach_h, reach_w;
  int ragged;  // the ragged block of outputs, where there is one

  struct List {
    StridePhase phase;
    int map;
    int count, output, real;
  };
  struct Entry {
    int row, column;
  };
  struct Block {
    ShiftedChannels seen;
    int row;
  };

  DYN_DEVICE void prefetch() const {
    for (int phase = 0; phase < s.stride_h * s.stride_w; ++phase) sm90::prefetch(dy[phase]);
  }
  DYN_DEVICE int most() const { return largest_phase; }
  DYN_DEVICE int inner() const { return s.bo; }
  DYN_DEVICE int width() const { return s.in_channels; }

  DYN_DEVICE List list(int number, int outer) const {
    const StridePhase phase(s, number);
    const int within_group = phase.channel_block * outer;
    return {phase, number % (s.stride_h * s.stride_w),
            int(s.images) * phase.grid.height.value * phase.grid.width.value,
            phase.group * s.group_channels + within_group, s.group_channels - within_group};
  }
  DYN_DEVICE int64_t row(const List& list, int position) const {
    if (s.stride_h * s.stride_w == 1) return position;  // spares the quotients
    const PixelGrid::Place place = list.phase.grid.place(position);
    const int h = list.phase.first_h + place.j * s.stride_h, w = list.phase.first_w + place.i * s.stride_w;
    return (place.image * s.in_h + h) * s.in_w + w;
  }
  DYN_DEVICE Pixel start(const List& list, int position) const {
    const PixelGrid::Place place = list.phase.grid.place(position);
    return {place.image, place.j + s.by_stride_h.quotient(list.phase.first_h + s.pad_h) - reach_h,
            place.i + s.by_stride_w.quotient(list.phase.first_w + s.pad_w) - reach_w};
  }
  static DYN_DEVICE Entry entry(const LayoutView& view, int e) { return {view.col_rows[e], view.col_cols[e]}; }
  static DYN_DEVICE bool exists(const LayoutView& view, Entry entry) {
    return is_row(entry.row, view.rows) && is_column(entry.column, view.columns);
  }
  DYN_DEVICE Block block(Entry entry) const {
    const Conv2dSizes::Tap tap = s.tap(entry.column);
    return {{entry.row * s.bo, reach_h - s.by_stride_h.quotient(tap.h), reach_w - s.by_stride_w.quotient(tap.w)},
            entry.row};
  }
  DYN_DEVICE bool is_ragged(const Block& block) const { return block.row == ragged; }

  DYN_DEVICE void copy(void* to, const List& list, Pixel start, const Block& block, int k, uint64_t* barrier) const {
    const ShiftedChannels& seen = block.seen;
    im2col_load(to, dy[list.map], seen.channel + k, start, seen.shift_h, seen.shift_w, barrier);
  }
};

// Wgrad: what output pixels see of x.
struct SeenInputs {
  Im2colMap x;  // in columns of 64 output pixels
  Conv2dSizes s;

  using Panel = ShiftedChannels;

  DYN_DEVICE void prefetch() const { sm90::prefetch(x); }
  DYN_DEVICE int inputs(int column) const {
    const int left = s.group_channels - s.tap(column).channel_block * s.bi;
    return left < s.bi ? left : s.bi;
  }
  DYN_DEVICE Panel panel(int row, int column, int first) const {
    const Conv2dSizes::Tap tap = s.tap(column);
    return {row / s.rows_per_group * s.group_channels + tap.channel_block * s.bi + first, tap.h, tap.w};
  }
  DYN_DEVICE Pixel start(int position) const { return input_pixel(s, position); }
  DYN_DEVICE void copy(void* to, Pixel start, const Panel& seen, uint64_t* barrier) const {
    im2col_load(to, x, seen.channel, start, seen.shift_h, seen.shift_w, barrier);
  }
};

}  // namespace dynaprune::cuda::sm90
