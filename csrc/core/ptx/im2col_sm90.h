// TMA's im2col mode: one copy brings 64 channels of the pixels that a tap sees from successive positions of a grid,
// across the ends of rows and images.
//
// A map describes images (NHWC) and a bounding box, the same in every image. A copy begins at a pixel of the box and
// goes on by the map's steps, along the row, then down, then to the next image, each time back to the box's first
// corner; it reads what lies `shift` pixels further. In shared memory a pixel is a row of 128 bytes, swizzled, as other
// copies leave rows. Pixels outside of their image, images beyond the last and channels beyond a pixel's arrive as
// zeros.
#pragma once

#include "core/ptx/tma_sm90.h"
#ifdef DYN_EMULATION
#include "emulation/im2col.h"
#endif

namespace dynaprune::cuda::sm90 {

constexpr int kLargestShift = 255;  // of a map with two axes of pixels

struct Pixel {
  int image, h, w;
};

#ifdef DYN_EMULATION

using Im2colMap = emulation::Im2colMap;

DYN_DEVICE void prefetch(const Im2colMap&) {}

DYN_DEVICE void im2col_load(void* shared, const Im2colMap& map, int channel, Pixel at, int shift_h, int shift_w,
                            uint64_t* barrier) {
  const uint32_t first = shared_address(shared);
  const std::array<int, 2> begin = {at.w, at.h}, shift = {shift_w, shift_h};
  DYN_ASSERT(first % kSwizzlePattern == 0 && map.channels * 2 == kSwizzleRow);
  DYN_ASSERT(emulation::can_begin(map, begin, shift));
  emulation::copy_bulk(
      shared, map.pixels * kSwizzleRow, barrier,
      [map, channel, begin, image = at.image, shift, first, memory = shared_memory()] {
        emulation::read_im2col(map, channel, begin, image, shift, [&](int pixel, int c, uint16_t element) {
          std::memcpy(memory + swizzled(first + uint32_t(pixel * kSwizzleRow + c * 2)), &element, 2);
        });
      });
}

#else

using Im2colMap = CUtensorMap;

// One thread: copies the map's number of pixels from `at` on and completes their bytes on the barrier.
DYN_DEVICE void im2col_load(void* shared, const Im2colMap& map, int channel, Pixel at, int shift_h, int shift_w,
                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(channel), "r"(at.w), "r"(at.h), "r"(at.image),
      "r"(shared_address(barrier)), "h"(uint16_t(shift_w)), "h"(uint16_t(shift_h))
      : "memory");
}

#endif

}  // namespace dynaprune::cuda::sm90
