// Tensor copies (TMA, "cp.async.bulk.tensor" in the PTX ISA), and the swizzle that they share with wgmma.
#pragma once

#include "core/ptx/mbarrier_sm90.h"

#ifndef DYN_EMULATION
#include <cuda.h>
#endif

namespace dynaprune::cuda::sm90 {

constexpr int kSwizzleRow = 128;       // bytes: the span of the 128-byte swizzle, 64 elements of 16 bits
constexpr int kSwizzlePattern = 1024;  // bytes after which it repeats: eight rows

// The 128-byte swizzle, the same for TMA and wgmma ("Tensor swizzling modes"): within each 1,024 bytes of shared memory
// the 16-byte piece p of row r lies at piece p ^ r. On an address: bits 4..6 ^= bits 7..9.
DYN_HOST_DEVICE constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70u); }

// TMA: a map describes a stack of matrices of 16-bit elements in global memory and the box that one copy takes from it,
// up to 256 rows of 64 elements. In shared memory a row of the box is 128 bytes, the next one follows, swizzled. What
// lies outside the sizes that the map states arrives as zeros and counts as bytes like the rest. Destinations are
// multiples of 1,024 bytes.

#ifdef DYN_EMULATION

struct TensorMap {
  const unsigned char* base;
  int64_t width, height, depth;       // elements, rows, matrices
  int64_t row_stride, matrix_stride;  // bytes
  int box_height;
};

DYN_DEVICE void prefetch(const TensorMap&) {}

DYN_DEVICE void tma_load(void* shared, const TensorMap& map, int column, int row, int matrix, uint64_t* barrier) {
  const uint32_t first = shared_address(shared);
  DYN_ASSERT(first % kSwizzlePattern == 0);
  emulation::copy_bulk(
      shared, map.box_height * kSwizzleRow, barrier, [map, first, column, row, matrix, memory = shared_memory()] {
        for (int r = 0; r < map.box_height; ++r)
          for (int c = 0; c < 64; ++c) {
            const int64_t x = int64_t(column) + c, y = int64_t(row) + r;
            uint16_t element = 0;
            if (x >= 0 && x < map.width && y >= 0 && y < map.height && matrix >= 0 && matrix < map.depth)
              std::memcpy(&element, map.base + matrix * map.matrix_stride + y * map.row_stride + x * 2, 2);
            std::memcpy(memory + swizzled(first + uint32_t(r * kSwizzleRow + c * 2)), &element, 2);
          }
      });
}

#else

using TensorMap = CUtensorMap;

DYN_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// One thread: copies the box that begins at the coordinates and completes its bytes on the barrier.
DYN_DEVICE void tma_load(void* shared, const TensorMap& map, int column, int row, int matrix, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(barrier))
      : "memory");
}

#endif

}  // namespace dynaprune::cuda::sm90
