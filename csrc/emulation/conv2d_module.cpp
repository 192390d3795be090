// The emulated launchers of core/conv2d.cu for Python.
#include <pybind11/stl.h>

#include <array>

#include "core/linear.cu"  // pointwise convolutions
#include "core/conv2d.cu"
#include "emulation/module.h"

namespace dynaprune::cuda::emulation {
namespace {

// One convolution: its sizes and its index, kept in memory of exactly their size.
class Conv2d {
 public:
  // `shape`: the fields of Conv2dShape; `grid`: rows, columns and lists of the index, capacity, bi, bo.
  Conv2d(const std::array<int64_t, 18>& n, const py::array& index, const std::array<int64_t, 6>& grid, bool tf32,
         int sm_count)
      : shape_{n[0],      n[1],      n[2],       n[3],       n[4],       n[5],       n[6],       int(n[7]),  int(n[8]),
               int(n[9]), int(n[10]), int(n[11]), int(n[12]), int(n[13]), int(n[14]), int(n[15]), n[16],      n[17]},
        index_(index),
        blocks_{index_.data<const int32_t>(), grid[0], grid[1], grid[2], grid[3], grid[4], grid[5]},
        precision_(tf32 ? Precision::tf32 : Precision::ieee),
        target_{sm_count, 80, nullptr} {}

  py::array forward(const py::array& x, const py::array& values, const py::object& bias) const {
    const Buffer a(x), w(values), b = Buffer::optional(bias);
    const Buffer y(size_t(shape_.images * shape_.out_h * shape_.out_w * shape_.out_channels) * size_of(dtype_of(x)));
    check(conv2d_forward(target_, dtype_of(x), precision_, shape_, blocks_, a.data(), w.data(), b.data(), y.data()));
    return y.array(x.dtype(), {shape_.images, shape_.out_h, shape_.out_w, shape_.out_channels});
  }

  py::array dgrad(const py::array& dy, const py::array& values) const {
    const Buffer a(dy), w(values);
    const Buffer dx(size_t(shape_.images * shape_.in_h * shape_.in_w * shape_.in_channels) * size_of(dtype_of(dy)));
    check(conv2d_dgrad(target_, dtype_of(dy), precision_, shape_, blocks_, a.data(), w.data(), dx.data()));
    return dx.array(dy.dtype(), {shape_.images, shape_.in_h, shape_.in_w, shape_.in_channels});
  }

  // dvalues, and with values the sums of weight x gradient by block.
  py::tuple wgrad(const py::array& dy, const py::array& x, const py::object& values) const {
    const DType dtype = dtype_of(x);
    const Buffer b(dy), a(x), w = Buffer::optional(values);
    const Buffer dvalues(size_t(blocks_.capacity * blocks_.bi * blocks_.bo) * size_of(dtype));
    const Buffer wg = values.is_none() ? Buffer() : Buffer(squares_bytes());
    const Buffer workspace(conv2d_wgrad_workspace(target_, dtype, shape_, blocks_));
    check(conv2d_wgrad(target_, dtype, precision_, shape_, blocks_, b.data(), a.data(), w.data(), dvalues.data(),
                       wg.data<float>(), workspace.data()));
    const py::array gradient = dvalues.array(x.dtype(), {blocks_.capacity, blocks_.bi, blocks_.bo});
    return py::make_tuple(gradient, values.is_none() ? py::object(py::none()) : by_block(wg));
  }

  py::array probe(const py::array& dy, const py::array& x, bool wanted) const {
    const Buffer b(dy), a(x), squares(squares_bytes());
    check(conv2d_probe(target_, dtype_of(x), precision_, shape_, blocks_, b.data(), a.data(), &wanted,
                       squares.data<float>()));
    return by_block(squares);
  }

  size_t workspace(const py::array& x) const { return conv2d_wgrad_workspace(target_, dtype_of(x), shape_, blocks_); }

 private:
  size_t squares_bytes() const { return size_t(blocks_.rows * blocks_.columns) * sizeof(float); }
  py::array by_block(const Buffer& sums) const {
    return sums.array(py::dtype::of<float>(), {blocks_.rows, blocks_.columns});
  }

  Conv2dShape shape_;
  Buffer index_;
  Blocks blocks_;
  Precision precision_;
  Target target_;
};

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_conv2d, module) {
  using namespace dynaprune::cuda::emulation;
  py::class_<Conv2d>(module, "Conv2d")
      .def(py::init<const std::array<int64_t, 18>&, const py::array&, const std::array<int64_t, 6>&, bool, int>())
      .def("forward", &Conv2d::forward)
      .def("dgrad", &Conv2d::dgrad)
      .def("wgrad", &Conv2d::wgrad)
      .def("probe", &Conv2d::probe)
      .def("workspace", &Conv2d::workspace);
}
