// The emulated launchers of core/conv2d.cu for Python.
#include "core/launch/conv2d.cu"
#include "emulation/conv2d_call.h"

namespace dynaprune::cuda::emulation {
namespace {

class Conv2d : Conv2dCall {
 public:
  Conv2d(const std::array<int64_t, 18>& n, const py::array& packed, const std::array<int64_t, 6>& grid, bool tf32,
         int processors)
      : Conv2dCall(n, packed, grid, processors, 80), precision_(tf32 ? Precision::tf32 : Precision::ieee) {}

  py::array forward(const py::array& x, const py::array& values, const py::object& bias) const {
    const Buffer a(x), w(values), b = Buffer::optional(bias), out = new_y(dtype_of(x));
    check(conv2d_forward(target, dtype_of(x), precision_, shape, blocks, a.data(), w.data(), b.data(), out.data()));
    return y(out, x.dtype());
  }

  py::array dgrad(const py::array& dy, const py::array& values) const {
    const Buffer a(dy), w(values), out = new_dx(dtype_of(dy));
    check(conv2d_dgrad(target, dtype_of(dy), precision_, shape, blocks, a.data(), w.data(), out.data()));
    return dx(out, dy.dtype());
  }

  // dvalues, and with values the sums of weight x gradient by block.
  py::tuple wgrad(const py::array& dy, const py::array& x, const py::object& values) const {
    const DType dtype = dtype_of(x);
    const Buffer b(dy), a(x), w = Buffer::optional(values), out = new_dvalues(dtype);
    const Buffer wg = values.is_none() ? Buffer() : new_sums();
    const Buffer scratch(conv2d_wgrad_workspace(target, dtype, shape, blocks));
    check(conv2d_wgrad(target, dtype, precision_, shape, blocks, b.data(), a.data(), w.data(), out.data(),
                       wg.data<float>(), scratch.data()));
    return py::make_tuple(dvalues(out, x.dtype()), values.is_none() ? py::object(py::none()) : by_block(wg));
  }

  py::array probe(const py::array& dy, const py::array& x, bool wanted) const {
    const Buffer b(dy), a(x), squares = new_sums();
    check(conv2d_probe(target, dtype_of(x), precision_, shape, blocks, b.data(), a.data(), &wanted,
                       squares.data<float>()));
    return by_block(squares);
  }

  size_t workspace(const py::array& x) const { return conv2d_wgrad_workspace(target, dtype_of(x), shape, blocks); }

 private:
  Precision precision_;
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
