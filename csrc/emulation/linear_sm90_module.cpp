// The emulated launchers of core/linear_sm90.cu for Python.
#include <pybind11/stl.h>

#include <array>

#include "emulation/module.h"

#include "core/linear_sm90.cu"

namespace dynaprune::cuda::emulation {
namespace {

// Fields of LinearShape and, behind the index, of Blocks.
using Shape = std::array<int64_t, 5>;
using Grid6 = std::array<int64_t, 6>;

Target target_of(int sm_count) { return {sm_count, 90, nullptr}; }
LinearShape shape_of(const Shape& s) { return {s[0], s[1], s[2], s[3], s[4]}; }
Blocks blocks_of(const Buffer& index, const Grid6& b) {
  return {index.data<const int32_t>(), b[0], b[1], b[2], b[3], b[4], b[5]};
}

void require(int sm_count, DType dtype, const Shape& shape, const Blocks& blocks) {
  if (!runs_sm90(target_of(sm_count), dtype, shape_of(shape), blocks)) throw std::invalid_argument("not for sm_90a");
}

py::array forward(const py::array& x, const py::array& values, const py::object& bias, const py::array& index,
                  const Shape& shape, const Grid6& grid, int sm_count) {
  const Buffer a(x), w(values), b = Buffer::optional(bias), packed(index);
  const DType dtype = dtype_of(x);
  const Blocks blocks = blocks_of(packed, grid);
  require(sm_count, dtype, shape, blocks);
  const Buffer y(size_t(shape[0] * shape[2]) * 2);
  check(linear_forward_sm90(target_of(sm_count), dtype, shape_of(shape), blocks, a.data(), w.data(), b.data(), y.data()));
  return y.array(x.dtype(), {shape[0], shape[2]});
}

py::array dgrad(const py::array& dy, const py::array& values, const py::array& index, const Shape& shape,
                const Grid6& grid, int sm_count) {
  const Buffer a(dy), w(values), packed(index);
  const DType dtype = dtype_of(dy);
  const Blocks blocks = blocks_of(packed, grid);
  require(sm_count, dtype, shape, blocks);
  const Buffer dx(size_t(shape[0] * shape[1]) * 2);
  check(linear_dgrad_sm90(target_of(sm_count), dtype, shape_of(shape), blocks, a.data(), w.data(), dx.data()));
  return dx.array(dy.dtype(), {shape[0], shape[1]});
}

// dvalues, wg (None without values), bytes of workspace.
py::tuple wgrad(const py::array& dy, const py::array& x, const py::object& values, const py::array& index,
                const Shape& shape, const Grid6& grid, int sm_count) {
  const Buffer b(dy), a(x), w = Buffer::optional(values), packed(index);
  const DType dtype = dtype_of(dy);
  const Blocks blocks = blocks_of(packed, grid);
  require(sm_count, dtype, shape, blocks);
  const Target target = target_of(sm_count);
  const Buffer dvalues(size_t(blocks.capacity * blocks.bi * blocks.bo) * 2);
  const Buffer wg = values.is_none() ? Buffer() : Buffer(size_t(blocks.rows * blocks.columns) * 4);
  const size_t bytes = linear_wgrad_workspace_sm90(target, dtype, shape_of(shape), blocks);
  const Buffer workspace = bytes > 0 ? Buffer(bytes) : Buffer();
  check(linear_wgrad_sm90(target, dtype, shape_of(shape), blocks, b.data(), a.data(), w.data(), dvalues.data(),
                          wg.data<float>(), workspace.data()));
  py::object sums = py::none();
  if (!values.is_none()) sums = wg.array(py::dtype::of<float>(), {blocks.rows, blocks.columns});
  return py::make_tuple(dvalues.array(dy.dtype(), {blocks.capacity, blocks.bi, blocks.bo}), sums, bytes);
}

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_linear_sm90, module) {
  using namespace dynaprune::cuda::emulation;
  module.def("forward", &forward);
  module.def("dgrad", &dgrad);
  module.def("wgrad", &wgrad);
}
