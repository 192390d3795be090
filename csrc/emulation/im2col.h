// Tensor maps of im2col mode and what a copy through one reads, from the PTX ISA ("Tensor im2col mode") and the
// driver's documentation of cuTensorMapEncodeIm2col alone: a launcher's wrong corner must show as a wrong result.
#pragma once

#include "emulation/barriers.h"

namespace dynaprune::cuda::emulation {

struct Im2colMap {
  const unsigned char* base;
  std::array<int64_t, 4> size;      // channels, width, height, images
  std::array<int64_t, 3> stride;    // bytes from pixel to pixel, row to row, image to image
  std::array<int, 2> lower, upper;  // corners of the bounding box in width and height, from the first and last pixel
  std::array<int, 2> step;          // in width and height
  int channels, pixels;             // per pixel, per column
};

// Whether the driver makes such a map, for 16-bit elements and the 128-byte swizzle.
inline bool is_valid(const Im2colMap& m) {
  bool valid = reinterpret_cast<uintptr_t>(m.base) % 16 == 0;
  for (const int64_t size : m.size) valid = valid && size > 0 && size <= int64_t(1) << 32;
  for (const int64_t bytes : m.stride) valid = valid && bytes % 16 == 0 && bytes < int64_t(1) << 40;
  for (size_t axis = 0; axis < 2; ++axis) {
    for (const int corner : {m.lower[axis], m.upper[axis]}) valid = valid && corner >= -128 && corner <= 127;
    valid = valid && m.lower[axis] <= m.size[axis + 1] - 1 + m.upper[axis] && m.step[axis] >= 1 && m.step[axis] <= 8;
  }
  return valid && m.channels >= 1 && m.channels * 2 <= 128 && m.pixels >= 1 && m.pixels <= 1024;
}

// Whether a copy may begin there and shift that far: inside of the bounding box, and an offset of 8 bits.
inline bool can_begin(const Im2colMap& m, std::array<int, 2> at, std::array<int, 2> shift) {
  for (size_t axis = 0; axis < 2; ++axis)
    if (at[axis] < m.lower[axis] || at[axis] > m.size[axis + 1] - 1 + m.upper[axis] || shift[axis] < 0 ||
        shift[axis] > 255)
      return false;
  return true;
}

// store(pixel, channel, element) for a whole column: from `at` (width, height) of `image` on through the bounding box,
// width first, then height, then images, back to the lower corner each time. Read is what lies `shift` further.
template <class Store>
void read_im2col(const Im2colMap& m, int channel, std::array<int, 2> at, int image, std::array<int, 2> shift,
                 const Store& store) {
  int64_t w = at[0], h = at[1], n = image;
  for (int pixel = 0; pixel < m.pixels; ++pixel) {
    const int64_t x = w + shift[0], y = h + shift[1];
    const bool inside = x >= 0 && x < m.size[1] && y >= 0 && y < m.size[2] && n >= 0 && n < m.size[3];
    for (int c = 0; c < m.channels; ++c) {
      uint16_t element = 0;
      if (inside && channel + c >= 0 && channel + c < m.size[0])
        std::memcpy(&element, m.base + n * m.stride[2] + y * m.stride[1] + x * m.stride[0] + (channel + c) * 2, 2);
      store(pixel, c, element);
    }
    w += m.step[0];
    if (w <= m.size[1] - 1 + m.upper[0]) continue;
    w = m.lower[0];
    h += m.step[1];
    if (h <= m.size[2] - 1 + m.upper[1]) continue;
    h = m.lower[1];
    ++n;
  }
}

}  // namespace dynaprune::cuda::emulation
