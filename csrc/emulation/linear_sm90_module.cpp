// The emulated launchers of core/linear_sm90.cu for Python. Activations are [tokens, row stride]; `in` and `out` are a
// layer's.
#include "emulation/module.h"

#include "core/launch/linear_sm90.cu"

namespace dynaprune::cuda::emulation {
namespace {

// One call: a layer's sizes, its index on loan, the device that it is planned for.
struct Call {
  Buffer index;
  Target target;
  Blocks blocks;
  LinearShape shape;
  DType dtype;

  Call(const py::array& packed, int64_t capacity, int64_t bi, int64_t bo, int64_t in, int64_t out, const py::array& a,
       int64_t b_stride, int processors)
      : index(packed), target{processors, 90, nullptr}, blocks{index.data<const int32_t>(), ceil_div(out, bo),
                                                              ceil_div(in, bi), ceil_div(in, bi), capacity, bi, bo},
        shape{a.shape(0), in, out, a.shape(1), b_stride}, dtype(dtype_of(a)) {
    if (!runs_sm90(target, dtype, shape, blocks)) throw std::invalid_argument("not for sm_90a");
  }
  Call(const py::array& packed, const py::array& values, int64_t in, int64_t out, const py::array& a, int processors)
      : Call(packed, values.shape(0), values.shape(1), values.shape(2), in, out, a, 0, processors) {}
};

py::array forward(const py::array& x, const py::array& values, const py::object& bias, const py::array& index,
                  int64_t in, int64_t out, int processors) {
  const Call call(index, values, in, out, x, processors);
  const Buffer a(x), w(values), b = Buffer::optional(bias), y(size_t(x.shape(0) * out) * 2);
  check(linear_forward_sm90(call.target, call.dtype, call.shape, call.blocks, a.data(), w.data(), b.data(), y.data()));
  return y.array(x.dtype(), {x.shape(0), out});
}

py::array dgrad(const py::array& dy, const py::array& values, const py::array& index, int64_t in, int64_t out,
                int processors) {
  const Call call(index, values, in, out, dy, processors);
  const Buffer a(dy), w(values), dx(size_t(dy.shape(0) * in) * 2);
  check(linear_dgrad_sm90(call.target, call.dtype, call.shape, call.blocks, a.data(), w.data(), dx.data()));
  return dx.array(dy.dtype(), {dy.shape(0), in});
}

// dvalues, wg (None without values) and whether the sum over tokens was split.
py::tuple wgrad(const py::array& dy, const py::array& x, const py::object& values, const py::array& index,
                int64_t capacity, int64_t bi, int64_t bo, int64_t in, int64_t out, int processors) {
  const Call call(index, capacity, bi, bo, in, out, x, dy.shape(1), processors);
  const Buffer b(dy), a(x), w = Buffer::optional(values), dvalues(size_t(capacity * bi * bo) * 2);
  const Buffer wg = values.is_none() ? Buffer() : Buffer(size_t(call.blocks.rows * call.blocks.columns) * 4);
  const size_t bytes = linear_wgrad_workspace_sm90(call.target, call.dtype, call.shape, call.blocks);
  const Buffer workspace = bytes == 0 ? Buffer() : Buffer(bytes);
  check(linear_wgrad_sm90(call.target, call.dtype, call.shape, call.blocks, b.data(), a.data(), w.data(),
                          dvalues.data(), wg.data<float>(), workspace.data()));
  py::object sums = py::none();
  if (!values.is_none()) sums = wg.array(py::dtype::of<float>(), {call.blocks.rows, call.blocks.columns});
  return py::make_tuple(dvalues.array(dy.dtype(), {capacity, bi, bo}), sums, bytes > 0);
}

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_linear_sm90, module) {
  using namespace dynaprune::cuda::emulation;
  module.def("forward", &forward);
  module.def("dgrad", &dgrad);
  module.def("wgrad", &wgrad);
}
