// A convolution as Python describes it, for the modules that call its launchers.
#pragma once

#include <array>

#include "emulation/module.h"

namespace dynaprune::cuda::emulation {

// `shape`: the fields of Conv2dShape; `grid`: rows, columns and lists of the index, capacity, bi, bo. The index is kept
// in memory of exactly its size.
struct Conv2dCall {
  Conv2dShape shape;
  Buffer index;
  Blocks blocks;
  Target target;

  Conv2dCall(const std::array<int64_t, 18>& n, const py::array& packed, const std::array<int64_t, 6>& grid,
             int processors, int capability)
      : shape{n[0],      n[1],       n[2],       n[3],       n[4],       n[5],       n[6],  int(n[7]),  int(n[8]),
              int(n[9]), int(n[10]), int(n[11]), int(n[12]), int(n[13]), int(n[14]), int(n[15]), n[16], n[17]},
        index(packed),
        blocks{index.data<const int32_t>(), grid[0], grid[1], grid[2], grid[3], grid[4], grid[5]},
        target{processors, capability, nullptr} {}

  // Buffers of the results for operands of a type, and what Python gets of them.
  Buffer new_y(DType dtype) const {
    return Buffer(size_t(shape.images * shape.out_h * shape.out_w * shape.out_channels) * size_of(dtype));
  }
  Buffer new_dx(DType dtype) const {
    return Buffer(size_t(shape.images * shape.in_h * shape.in_w * shape.in_channels) * size_of(dtype));
  }
  Buffer new_dvalues(DType dtype) const {
    return Buffer(size_t(blocks.capacity * blocks.bi * blocks.bo) * size_of(dtype));
  }
  Buffer new_sums() const { return Buffer(size_t(blocks.rows * blocks.columns) * sizeof(float)); }

  py::array y(const Buffer& of, const py::dtype& dtype) const {
    return of.array(dtype, {shape.images, shape.out_h, shape.out_w, shape.out_channels});
  }
  py::array dx(const Buffer& of, const py::dtype& dtype) const {
    return of.array(dtype, {shape.images, shape.in_h, shape.in_w, shape.in_channels});
  }
  py::array dvalues(const Buffer& of, const py::dtype& dtype) const {
    return of.array(dtype, {blocks.capacity, blocks.bi, blocks.bo});
  }
  py::array by_block(const Buffer& sums) const {
    return sums.array(py::dtype::of<float>(), {blocks.rows, blocks.columns});
  }
};

}  // namespace dynaprune::cuda::emulation
