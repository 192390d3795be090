// The emulated launchers of core/linear.cu for Python. Activations are [tokens, row stride]; `in` and `out` are a
// layer's.
#include "emulation/module.h"

#include "core/launch/linear.cu"

namespace dynaprune::cuda::emulation {
namespace {

// How a call is made: the device that it is planned for, and what float32 products may lose.
struct Setting {
  Target target;
  Precision precision;
};

Setting setting_of(const std::string& precision, int processors) {
  return {{processors, 80, nullptr}, precision == "tf32" ? Precision::tf32 : Precision::ieee};
}

// A layer's sizes, its index on loan.
struct Layer {
  Buffer index;
  Blocks blocks;
  int64_t in, out;

  Layer(const py::array& packed, int64_t capacity, int64_t bi, int64_t bo, int64_t in, int64_t out)
      : index(packed), blocks{index.data<const int32_t>(), ceil_div(out, bo), ceil_div(in, bi), ceil_div(in, bi),
                              capacity, bi, bo}, in(in), out(out) {}
  Layer(const py::array& packed, const py::array& values, int64_t in, int64_t out)
      : Layer(packed, values.shape(0), values.shape(1), values.shape(2), in, out) {}

  LinearShape shape(const py::array& a) const { return {a.shape(0), in, out, a.shape(1), 0}; }
  LinearShape shape(const py::array& x, const py::array& dy) const {
    return {x.shape(0), in, out, x.shape(1), dy.shape(1)};
  }
};

Buffer matrix(const py::array& like, int64_t rows, int64_t columns) {
  return Buffer(size_t(rows * columns) * size_of(dtype_of(like)));
}

py::array forward(const py::array& x, const py::array& values, const py::object& bias, const py::array& index,
                  int64_t in, int64_t out, const std::string& precision, int processors) {
  const Layer layer(index, values, in, out);
  const Setting setting = setting_of(precision, processors);
  const Buffer a(x), w(values), b = Buffer::optional(bias), y = matrix(x, x.shape(0), out);
  check(linear_forward(setting.target, dtype_of(x), setting.precision, layer.shape(x), layer.blocks, a.data(), w.data(),
                       b.data(), y.data()));
  return y.array(x.dtype(), {x.shape(0), out});
}

py::array dgrad(const py::array& dy, const py::array& values, const py::array& index, int64_t in, int64_t out,
                const std::string& precision, int processors) {
  const Layer layer(index, values, in, out);
  const Setting setting = setting_of(precision, processors);
  const Buffer a(dy), w(values), dx = matrix(dy, dy.shape(0), in);
  check(linear_dgrad(setting.target, dtype_of(dy), setting.precision, layer.shape(dy), layer.blocks, a.data(), w.data(),
                     dx.data()));
  return dx.array(dy.dtype(), {dy.shape(0), in});
}

// (dvalues, wg or None, bytes of workspace); values are used `with_saliency` only, otherwise just their shape.
py::tuple wgrad(const py::array& dy, const py::array& x, const py::array& values, bool with_saliency,
                const py::array& index, int64_t in, int64_t out, const std::string& precision, int processors) {
  const Layer layer(index, values, in, out);
  const Setting setting = setting_of(precision, processors);
  const LinearShape shape = layer.shape(x, dy);
  const int64_t blocks = layer.blocks.rows * layer.blocks.columns;
  const size_t bytes = linear_wgrad_workspace(setting.target, dtype_of(x), shape, layer.blocks);
  const Buffer left(x), right(dy), w(values);
  const Buffer dvalues(size_t(values.nbytes())), wg(size_t(blocks) * 4), workspace(bytes);
  check(linear_wgrad(setting.target, dtype_of(x), setting.precision, shape, layer.blocks, right.data(), left.data(),
                     with_saliency ? w.data() : nullptr, dvalues.data(), with_saliency ? wg.data<float>() : nullptr,
                     bytes > 0 ? workspace.data() : nullptr));
  const py::object sums = with_saliency ? py::object(wg.array(py::dtype::of<float>(), {blocks})) : py::none();
  const py::array gradient = dvalues.array(values.dtype(), {values.shape(0), values.shape(1), values.shape(2)});
  return py::make_tuple(gradient, sums, bytes);
}

py::array probe(const py::array& dy, const py::array& x, int64_t capacity, int64_t bi, int64_t bo, bool wanted,
                const py::array& index, int64_t in, int64_t out, const std::string& precision, int processors) {
  const Layer layer(index, capacity, bi, bo, in, out);
  const Setting setting = setting_of(precision, processors);
  const int64_t blocks = layer.blocks.rows * layer.blocks.columns;
  const Buffer left(x), right(dy), squares(size_t(blocks) * 4);
  check(linear_probe(setting.target, dtype_of(x), setting.precision, layer.shape(x, dy), layer.blocks, right.data(),
                     left.data(), &wanted, squares.data<float>()));
  return squares.array(py::dtype::of<float>(), {blocks});
}

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_linear, module) {
  using namespace dynaprune::cuda::emulation;
  module.def("forward", &forward, py::arg("x"), py::arg("values"), py::arg("bias"), py::arg("index"), py::arg("in_"),
             py::arg("out"), py::arg("precision") = "ieee", py::arg("processors") = 4);
  module.def("dgrad", &dgrad, py::arg("dy"), py::arg("values"), py::arg("index"), py::arg("in_"), py::arg("out"),
             py::arg("precision") = "ieee", py::arg("processors") = 4);
  module.def("wgrad", &wgrad, py::arg("dy"), py::arg("x"), py::arg("values"), py::arg("with_saliency"),
             py::arg("index"), py::arg("in_"), py::arg("out"), py::arg("precision") = "ieee",
             py::arg("processors") = 4);
  module.def("probe", &probe, py::arg("dy"), py::arg("x"), py::arg("capacity"), py::arg("bi"), py::arg("bo"),
             py::arg("wanted"), py::arg("index"), py::arg("in_"), py::arg("out"), py::arg("precision") = "ieee",
             py::arg("processors") = 4);
}
