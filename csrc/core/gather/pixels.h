// Which pixels a convolution multiplies: implicit GEMM, the columns of im2col are addressed and never stored.
//
// Forward, dgrad, wgrad and probe gather alike: position (image, j, i) of a grid reads pixel (image, j * step + t,
// i * step + u) of the images, where the shift (t, u) belongs to a tap. For forward, wgrad and probe the grid holds the
// output pixels. For dgrad it holds the input pixels of one stride phase, first + stride * j, which get tap r from
// output row (first + stride * j + pad - r * dilation) / stride: exact, because the list of the phase holds just those
// taps.
#pragma once

#include "core/problem.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

// Quotients of 0 <= n < 2^31 in one multiplication: with 2^log >= value, n * ceil(2^(31 + log) / value) >> (31 + log)
// is exact. Made by the host.
struct Divisor {
  int value;
  int log;
  uint32_t multiplier;

  DYN_DEVICE int quotient(int n) const {
    return int(uint32_t((uint64_t(2 * uint32_t(n)) * multiplier) >> 32) >> log);  // the high half of a product
  }
};

inline Divisor divisor(int64_t value) {
  if (value == 0) return {0, 0, 0};  // of a grid without positions
  int log = 0;
  while ((int64_t(1) << log) < value) ++log;
  return {int(value), log, uint32_t(((uint64_t(1) << (31 + log)) + uint64_t(value) - 1) / uint64_t(value))};
}

// Positions of the images of a batch, row by row.
struct PixelGrid {
  Divisor height, width;

  struct Place {
    int image, j, i;
  };
  DYN_DEVICE Place place(int64_t position) const {
    const int line = width.quotient(int(position)), image = height.quotient(line);
    return {image, line - image * height.value, int(position) - line * width.value};
  }
};

// What kernels are told of a convolution, by value.
struct Conv2dSizes {
  int64_t images;
  int in_h, in_w, in_channels, out_h, out_w, out_channels;
  int x_channels, dy_channels;  // of a pixel in memory
  int groups, group_channels, rows_per_group, bi, bo;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  PixelGrid output;
  Divisor phase_height[2], phase_width[2];  // in_h / stride_h and in_w / stride_w, rounded down and up
  Divisor channel_blocks, kernel_w, by_stride_h, by_stride_w;

  struct Tap {
    int h, w;  // times the dilation
    int channel_block;
  };
  DYN_DEVICE Tap tap(int column) const {
    const int number = channel_blocks.quotient(column), line = kernel_w.quotient(number);
    return {line * dilation_h, (number - line * kernel_w.value) * dilation_w, column - number * channel_blocks.value};
  }
};

// Whether pixels, those that images would have with padding included, can be counted in 32 bits.
inline bool fits(const Conv2dShape& s) {
  return fits_int32(s.images * (s.in_h + 2 * s.pad_h) * (s.in_w + 2 * s.pad_w)) && fits_int32(s.x_channels) &&
         fits_int32(s.dy_channels);
}

inline Conv2dSizes sizes_of(const Conv2dShape& s, const Blocks& blocks) {
  const int64_t group_channels = s.in_channels / s.groups;
  Conv2dSizes sizes;
  sizes.images = s.images;
  sizes.in_h = int(s.in_h);
  sizes.in_w = int(s.in_w);
  sizes.in_channels = int(s.in_channels);
  sizes.out_h = int(s.out_h);
  sizes.out_w = int(s.out_w);
  sizes.out_channels = int(s.out_channels);
  sizes.x_channels = int(s.x_channels);
  sizes.dy_channels = int(s.dy_channels);
  sizes.groups = s.groups;
  sizes.group_channels = int(group_channels);
  sizes.rows_per_group = int(blocks.rows / s.groups);
  sizes.bi = int(blocks.bi);
  sizes.bo = int(blocks.bo);
  sizes.stride_h = s.stride_h;
  sizes.stride_w = s.stride_w;
  sizes.pad_h = s.pad_h;
  sizes.pad_w = s.pad_w;
  sizes.dilation_h = s.dilation_h;
  sizes.dilation_w = s.dilation_w;
  sizes.output = {divisor(s.out_h), divisor(s.out_w)};
  for (int up = 0; up < 2; ++up) {
    sizes.phase_height[up] = divisor(s.in_h / s.stride_h + up);
    sizes.phase_width[up] = divisor(s.in_w / s.stride_w + up);
  }
  sizes.channel_blocks = divisor(ceil_div(group_channels, blocks.bi));
  sizes.kernel_w = divisor(s.kernel_w);
  sizes.by_stride_h = divisor(s.stride_h);
  sizes.by_stride_w = divisor(s.stride_w);
  return sizes;
}

// One column list: the input pixels of a stride phase, and a block of a group's channels.
struct StridePhase {
  PixelGrid grid;
  int first_h, first_w;
  int group, channel_block;

  DYN_DEVICE StridePhase(const Conv2dSizes& s, int list) {
    const int phases = s.stride_h * s.stride_w, channels = list / phases, phase = list % phases;
    group = s.channel_blocks.quotient(channels);
    channel_block = channels - group * s.channel_blocks.value;
    first_h = modulo(s.by_stride_h, phase / s.stride_w - s.pad_h);
    first_w = modulo(s.by_stride_w, phase % s.stride_w - s.pad_w);
    grid = {s.phase_height[first_h < s.in_h % s.stride_h], s.phase_width[first_w < s.in_w % s.stride_w]};
  }

 private:
  // n modulo the divisor, for n below it and possibly negative.
  static DYN_DEVICE int modulo(const Divisor& by, int n) { return n + by.quotient(by.value - 1 - n) * by.value; }
};

// Rows of the gathered matrix, as matrix_rows.h says. Pixels are counted in 32 bits, those that images would
// have with padding included; their channels in 64.
template <class T, bool DGRAD>
struct Pixels {
  const Conv2dSizes& s;
  const T* data;  // first channel of the group, for dgrad of all
  PixelGrid grid;
  int step_h, step_w;      // pixels from position to position
  int origin_h, origin_w;  // the pixel of position (0, 0) for a shift of 0
  const int32_t* rows;     // the entries' block rows, which only dgrad reads
  const int32_t* columns;  // and block columns
  int64_t row_count, column_count;

  struct Row {
    const T* at;  // the pixel that a shift of 0 reads, possibly outside of the image
    int h, w;
  };
  struct Entry {
    int row, column;
  };
  struct Part {
    int64_t at;  // shift and channel
    int h, w;
  };

  DYN_DEVICE int height() const { return DGRAD ? s.out_h : s.in_h; }
  DYN_DEVICE int width() const { return DGRAD ? s.out_w : s.in_w; }
  DYN_DEVICE int stride() const { return DGRAD ? s.dy_channels : s.x_channels; }
  DYN_DEVICE int channels() const { return DGRAD ? s.out_channels : s.group_channels; }

  // Plus any shift, or nothing(), it stays outside of every image, and an int.
  static constexpr int kOutside = -(1 << 30);

  DYN_DEVICE Row row(int64_t position, bool exists) const {
    const auto [image, j, i] = grid.place(position);
    const int h = j * step_h + origin_h, w = i * step_w + origin_w;
    return {data + int64_t((image * height() + h) * width() + w) * stride(), exists ? h : kOutside, w};
  }
  DYN_DEVICE Part nothing() const { return {0, kOutside, kOutside}; }

  DYN_DEVICE Entry entry(int entry) const { return {DGRAD ? rows[entry] : 0, columns[entry]}; }
  DYN_DEVICE bool exists(Entry entry) const {
    return (!DGRAD || is_row(entry.row, row_count)) && is_column(entry.column, column_count);
  }

  DYN_DEVICE Part part(Entry entry, int within) const {
    const Conv2dSizes::Tap tap = s.tap(entry.column);
    if constexpr (DGRAD)
      return part(-s.by_stride_h.quotient(tap.h), -s.by_stride_w.quotient(tap.w), entry.row * s.bo + within);
    else
      return part(tap.h, tap.w, tap.channel_block * s.bi + within);
  }
  DYN_DEVICE Part part(int t, int u, int channel) const {
    if (channel >= channels()) return nothing();
    return {int64_t(t * width() + u) * stride() + channel, t, u};
  }

  DYN_DEVICE const T* address(const Row& row, const Part& part, bool& valid) const {
    valid = unsigned(row.h + part.h) < unsigned(height()) && unsigned(row.w + part.w) < unsigned(width());
    return row.at + part.at;
  }

  DYN_DEVICE int real(Entry entry) const {
    const int block = DGRAD ? s.bo : s.bi;
    const int left = channels() - (DGRAD ? entry.row : s.tap(entry.column).channel_block) * block;
    return left < block ? left : block;
  }
};

// What the output pixels read: the input of one group.
template <class T>
DYN_DEVICE Pixels<T, false> input_pixels(const Conv2dSizes& s, const T* x, int group, const LayoutView& view) {
  return {s, x + int64_t(group) * (s.x_channels / s.groups), s.output, s.stride_h, s.stride_w, -s.pad_h, -s.pad_w,
          nullptr, view.row_cols, view.rows, view.columns};
}

// What the input pixels of a stride phase read: the output's gradient.
template <class T>
DYN_DEVICE Pixels<T, true> output_pixels(const Conv2dSizes& s, const T* dy, const StridePhase& phase,
                                         const LayoutView& view) {
  const int origin_h = s.by_stride_h.quotient(phase.first_h + s.pad_h);
  const int origin_w = s.by_stride_w.quotient(phase.first_w + s.pad_w);
  return {s, dy, phase.grid, 1, 1, origin_h, origin_w, view.col_rows, view.col_cols, view.rows, view.columns};
}

}  // namespace dynaprune::cuda
