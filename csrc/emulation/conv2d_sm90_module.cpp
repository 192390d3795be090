// The emulated launchers of core/conv2d_sm90.cu for Python.
#include "emulation/conv2d_call.h"

#include "core/launch/conv2d_sm90.cu"

namespace dynaprune::cuda::emulation {
namespace {

class Conv2d : Conv2dCall {
 public:
  Conv2d(const std::array<int64_t, 18>& n, const py::array& packed, const std::array<int64_t, 6>& grid, int processors)
      : Conv2dCall(n, packed, grid, processors, 90) {}

  // Whether these kernels take the problem, for activations of the array's type.
  bool runs(const py::array& a) const { return runs_sm90(target, dtype_of(a), shape, blocks); }

  py::array forward(const py::array& x, const py::array& values, const py::object& bias) const {
    const Buffer a(x), w(values), b = Buffer::optional(bias), out = new_y(checked(x));
    check(conv2d_forward_sm90(target, dtype_of(x), shape, blocks, a.data(), w.data(), b.data(), out.data()));
    return y(out, x.dtype());
  }

  py::array dgrad(const py::array& dy, const py::array& values) const {
    const Buffer a(dy), w(values), out = new_dx(checked(dy));
    check(conv2d_dgrad_sm90(target, dtype_of(dy), shape, blocks, a.data(), w.data(), out.data()));
    return dx(out, dy.dtype());
  }

  // dvalues, wg (None without values) and whether the sum over pixels was split.
  py::tuple wgrad(const py::array& dy, const py::array& x, const py::object& values) const {
    const DType dtype = checked(x);
    const Buffer b(dy), a(x), w = Buffer::optional(values), out = new_dvalues(dtype);
    const Buffer wg = values.is_none() ? Buffer() : new_sums();
    const size_t bytes = conv2d_wgrad_workspace_sm90(target, dtype, shape, blocks);
    const Buffer scratch = bytes == 0 ? Buffer() : Buffer(bytes);
    check(conv2d_wgrad_sm90(target, dtype, shape, blocks, b.data(), a.data(), w.data(), out.data(), wg.data<float>(),
                            scratch.data()));
    const py::object sums = values.is_none() ? py::object(py::none()) : by_block(wg);
    return py::make_tuple(dvalues(out, x.dtype()), sums, bytes > 0);
  }

 private:
  DType checked(const py::array& a) const {
    if (!runs(a)) throw std::invalid_argument("not for sm_90a");
    return dtype_of(a);
  }
};

// The first channel of what one copy reads of images [count, height, width, channels]; pairs are (height, width).
std::vector<int> column(const py::array_t<uint16_t, py::array::c_style>& images, std::array<int, 2> lower,
                        std::array<int, 2> upper, std::array<int, 2> step, std::array<int, 2> at,
                        std::array<int, 2> shift, int pixels) {
  const int64_t channels = images.shape(3), width = images.shape(2), height = images.shape(1), pixel = channels * 2;
  const Im2colMap map{reinterpret_cast<const unsigned char*>(images.data()),
                      {channels, width, height, images.shape(0)},
                      {pixel, pixel * width, pixel * width * height},
                      {lower[1], lower[0]},
                      {upper[1], upper[0]},
                      {step[1], step[0]},
                      1,
                      pixels};
  std::vector<int> read;
  read_im2col(map, 0, {at[1], at[0]}, 0, {shift[1], shift[0]},
              [&](int, int, uint16_t element) { read.push_back(element); });
  return read;
}

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_conv2d_sm90, module) {
  using namespace dynaprune::cuda::emulation;
  py::class_<Conv2d>(module, "Conv2d")
      .def(py::init<const std::array<int64_t, 18>&, const py::array&, const std::array<int64_t, 6>&, int>())
      .def("runs", &Conv2d::runs)
      .def("forward", &Conv2d::forward)
      .def("dgrad", &Conv2d::dgrad)
      .def("wgrad", &Conv2d::wgrad);
  module.def("column", &column, py::arg("images"), py::kw_only(), py::arg("lower"), py::arg("upper"), py::arg("step"),
             py::arg("at"), py::arg("shift"), py::arg("pixels"));
}
