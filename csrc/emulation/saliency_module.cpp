// The emulated launchers of core/saliency.cu for Python.
#include "emulation/module.h"

#include "core/launch/saliency.cu"

namespace dynaprune::cuda::emulation {
namespace {

py::tuple emulate_block_saliency(const py::array& values, const py::array& gradient, const py::array& index,
                                 int64_t rows, int64_t columns, int64_t lists) {
  const Buffer w(values), g(gradient), packed(index);
  const Blocks blocks = blocks_of(packed, values, rows, columns, lists);
  const Buffer stats(size_t(4 * rows * columns) * 4), neuron(size_t(rows * blocks.bo) * 4);
  const Buffer workspace(block_saliency_workspace(blocks));
  check(block_saliency({132, 80, nullptr}, dtype_of(values), blocks, w.data(), g.data(), stats.data<float>(),
                       neuron.data<float>(), workspace.data()));
  const py::dtype type = py::dtype::of<float>();
  return py::make_tuple(stats.array(type, {4, rows * columns}), neuron.array(type, {rows * blocks.bo}));
}

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_saliency, module) {
  using namespace dynaprune::cuda::emulation;
  module.def("block_saliency", &emulate_block_saliency);
}
