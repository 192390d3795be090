// Zero-padded planes: what the convolution kernels read instead of a tensor. Include after simd.h.
//
// A plane holds `width` consecutive channels at every (row, column) of a regular grid over the padded image, so that
// a tap of the kernel is a pointer offset, neighbouring pixels are at a distance known to the compiler, and a stride
// becomes one plane per stride phase. bfloat16 is widened on the way. Padding is exact zero.
#pragma once

#include "kernels.h"
#include "transpose.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

// Largest q with q * b <= a, for any sign of a.
DYNAPRUNE_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -divide_up(-a, b); }

// Channels in a plane: 16, or 8 for blocks that would waste half of the last plane.
DYNAPRUNE_INLINE int plane_width(int64_t block) { return round_up(block, 8) % 16 == 8 ? 8 : 16; }

struct Plane {
  int64_t channel;   // first channel in the tensor
  int64_t channels;  // channels that exist; the rest of the width is zero
  int64_t row0, col0;  // place of the plane's first pixel in the image (negative: padding)
};

struct PlaneSet {
  Plane* planes;
  int64_t count;
  int64_t width;               // channels in a plane
  int64_t rows, cols;          // pixels of a plane, for the largest band
  int64_t row_step, col_step;  // image pixels between neighbours in the plane
  int64_t channels, image_rows, image_cols;  // of the tensor
  bool channels_last;                        // the tensor's memory

  int64_t plane_size() const { return rows * cols * width; }
  int64_t image_size() const { return count * plane_size(); }
};

// `pixels` pixels of `valid` channels, each into `width` slots. `ahead` is the distance to what is copied next.
template <class T>
void copy_pixels(const T* from, int64_t step, int64_t pixels, int64_t valid, int64_t width, int64_t ahead,
                 typename Num<T>::Acc* to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t j = 0; j < pixels; ++j) prefetch(from + j * step + ahead);
  if (valid == width && width == L) {
    for (int64_t j = 0; j < pixels; ++j) store(to + j * L, load(from + j * step));
  } else if (valid == width && width % L == 0) {
    for (int64_t j = 0; j < pixels; ++j)
      for (int64_t c = 0; c < width; c += L) store(to + j * width + c, load(from + j * step + c));
  } else {
    for (int64_t j = 0; j < pixels; ++j)
      for (int64_t c = 0; c < width; c += L)
        store_partial(to + j * width + c, load_partial(from + j * step + c, int(most(0, least(L, valid - c)))),
                      int(least(L, width - c)));
  }
}

// What of [0, count) lies in an image of `size` when i is found at place + i * step: [begin, end).
struct Range {
  int64_t begin, end;
};
DYNAPRUNE_INLINE Range inside(int64_t place, int64_t step, int64_t size, int64_t count) {
  const int64_t begin = least(count, divide_up(most(0, -place), step));
  return {begin, most(begin, least(count, floor_div(size - 1 - place, step) + 1))};
}

// Pixels of contiguous memory, `step` apart from `first` on, and the plane's pixels that they become: rows of `cols`,
// `gap` elements between one row's end and the next one's begin.
struct PixelRun {
  int64_t first, step, count, cols, gap;
};

// A run of `valid` channels of a contiguous image of `size` pixels, into `width` slots each, a square at a time.
template <class T>
void copy_channels(const T* from, int64_t size, const PixelRun& run, int64_t valid, int64_t width,
                   typename Num<T>::Acc* plane) {
  typedef typename Num<T>::Acc A;
  constexpr int64_t L = kLanes<T>;
  alignas(64) A unwanted[L];
  A* at[L];
  for (int64_t c = 0; c < width; c += L) {
    const T* channels = from + c * size;
    A* to = plane + c;
    const bool whole = run.step <= 2 && valid - c >= L && width - c >= L;
    for (int64_t k = 0, col = 0; k < run.count;) {
      const int64_t pixel = run.first + k * run.step;
      if (whole && run.cols - col >= L && size - pixel >= run.step * L) {
        if (run.step == 1)
          gather_square<1>(channels + pixel, size, to, width);
        else
          gather_square<2>(channels + pixel, size, to, width);
        k += L;
        to += L * width;
        if ((col += L) == run.cols) {
          col = 0;
          to += run.gap;
        }
        continue;
      }
      const int64_t square = most(0, least(pixel, size - L));  // a last one reads some pixels again
      for (int64_t j = 0; j < L; ++j) at[j] = unwanted;
      for (int64_t j = pixel - square; j < L && k < run.count; j += run.step, ++k) {
        at[j] = to;
        to += width;
        if (++col == run.cols) {
          col = 0;
          to += run.gap;
        }
      }
      gather_channels(channels + square, size, int(most(0, least(L, valid - c))), int(least(L, size - square)), at,
                      int(least(L, width - c)));
    }
  }
}

template <class T>
void pack_contiguous(const PlaneSet& set, const T* image, int64_t first_row, int64_t rows,
                     typename Num<T>::Acc* out) {
  constexpr size_t kElement = sizeof(typename Num<T>::Acc);
  const int64_t row_size = set.cols * set.width, pixels = set.image_rows * set.image_cols;
  for (int64_t p = 0; p < set.count; ++p) {
    const Plane& plane = set.planes[p];
    auto* to = out + p * set.plane_size();
    const int64_t first = plane.row0 + first_row * set.row_step;
    const Range real = inside(first, set.row_step, set.image_rows, rows);
    const Range cols = inside(plane.col0, set.col_step, set.image_cols, set.cols);
    const int64_t count = cols.end - cols.begin;
    memset(to, 0, size_t(real.begin * row_size) * kElement);
    memset(to + real.end * row_size, 0, size_t((rows - real.end) * row_size) * kElement);
    // whole rows follow each other in the image
    const bool whole = set.row_step == 1 && set.col_step == 1 && count == set.image_cols;
    const int64_t together = whole ? real.end - real.begin : 1;
    for (int64_t i = real.begin; i < real.end; ++i) {
      auto* row = to + i * row_size;
      memset(row, 0, size_t(cols.begin * set.width) * kElement);
      memset(row + cols.end * set.width, 0, size_t((set.cols - cols.end) * set.width) * kElement);
      if ((i - real.begin) % together != 0 || count == 0) continue;
      const int64_t pixel = (first + i * set.row_step) * set.image_cols + plane.col0 + cols.begin * set.col_step;
      const PixelRun run = {pixel, set.col_step, together * count, count, row_size - count * set.width};
      copy_channels(image + plane.channel * pixels, pixels, run, plane.channels, set.width,
                    row + cols.begin * set.width);
    }
  }
}

template <class T>
void pack_channels_last(const PlaneSet& set, const T* image, int64_t first_row, int64_t rows,
                        typename Num<T>::Acc* out) {
  constexpr size_t kElement = sizeof(typename Num<T>::Acc);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t p = 0; p < set.count; ++p) {
      const Plane& plane = set.planes[p];
      auto* to = out + p * set.plane_size() + i * set.cols * set.width;
      const int64_t row = plane.row0 + (first_row + i) * set.row_step;
      const bool padding = row < 0 || row >= set.image_rows;
      const Range cols = inside(plane.col0, set.col_step, set.image_cols, padding ? 0 : set.cols);
      memset(to, 0, size_t(cols.begin * set.width) * kElement);
      if (cols.end > cols.begin) {
        const T* from = image + (row * set.image_cols + plane.col0 + cols.begin * set.col_step) * set.channels;
        copy_pixels(from + plane.channel, set.col_step * set.channels, cols.end - cols.begin, plane.channels,
                    set.width, set.row_step * set.image_cols * set.channels, to + cols.begin * set.width);
      }
      memset(to + cols.end * set.width, 0, size_t((set.cols - cols.end) * set.width) * kElement);
    }
  }
}

// Plane rows [first_row, first_row + rows) of image `number`, all planes of the set.
template <class T>
void pack_image(const PlaneSet& set, const T* tensor, int64_t number, int64_t first_row, int64_t rows,
                typename Num<T>::Acc* out) {
  const T* image = tensor + number * set.image_rows * set.image_cols * set.channels;
  if (set.channels_last)
    pack_channels_last(set, image, first_row, rows, out);
  else
    pack_contiguous(set, image, first_row, rows, out);
}

// Units of parallel work: bands of plane rows of one image, or several whole images.
struct Chunks {
  int64_t images, band;  // images in a chunk, target rows in a band
  int64_t bands;         // bands of an image
  int64_t count;
};

// Chunks that need at most about `budget` bytes each, and at least `wanted` of them where the rows allow it.
// `row_bytes` is the memory of one plane row of all planes; a band of b rows needs b + extra of them.
DYNAPRUNE_INLINE Chunks choose_chunks(int64_t images, int64_t rows, int64_t extra, int64_t row_bytes, int64_t budget,
                                      int64_t wanted) {
  Chunks c;
  const int64_t image_bytes = most(1, (rows + extra) * row_bytes);
  c.images = most(1, least(budget / image_bytes, images / most(1, wanted)));
  c.band = rows;
  if (c.images == 1 && rows > 0) {
    const int64_t fitting = most(1, budget / most(1, row_bytes) - extra);
    const int64_t bands = most(divide_up(rows, fitting), divide_up(wanted, most(1, images)));
    c.band = divide_up(rows, least(bands, rows));
  }
  c.bands = c.band > 0 ? divide_up(rows, c.band) : 0;
  c.count = divide_up(images, c.images) * c.bands;
  return c;
}

// Images [image, image_end) and target rows [row, row_end) of a chunk.
struct ChunkRange {
  int64_t image, image_end, row, row_end;
};
DYNAPRUNE_INLINE ChunkRange chunk_range(const Chunks& c, int64_t images, int64_t rows, int64_t chunk) {
  ChunkRange r;
  r.image = chunk / c.bands * c.images;
  r.image_end = least(images, r.image + c.images);
  r.row = chunk % c.bands * c.band;
  r.row_end = least(rows, r.row + c.band);
  return r;
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
