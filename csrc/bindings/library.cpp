// The library `dynaprune_cpu`: its schemas. torch.ops.load_library loads it; no Python module, no Python.h needed.
#include <string>

#include "bindings/common.h"
#include "cpu/capability.h"
#include "cpu/scratch.h"

STABLE_TORCH_LIBRARY(dynaprune_cpu, m) {
  m.def("linear_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int out_features) -> Tensor");
  m.def("linear_dgrad(Tensor dy, Tensor values, Tensor index, int in_features) -> Tensor");
  m.def("linear_wgrad(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo) -> Tensor");
  m.def("linear_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index) -> (Tensor, Tensor)");
  m.def("linear_probe(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo) -> Tensor");
  m.def(
      "conv2d_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int out_channels, int[] conv, "
      "bool channels_last=True) -> Tensor");
  m.def(
      "conv2d_dgrad(Tensor dy, Tensor values, Tensor index, int[] input_size, int[] conv, bool channels_last=True) "
      "-> Tensor");
  m.def("conv2d_wgrad(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo, int[] conv) -> Tensor");
  m.def("conv2d_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index, int[] conv) -> (Tensor, Tensor)");
  m.def("conv2d_probe(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo, int[] conv) -> Tensor");
  m.def("block_saliency(Tensor values, Tensor grad, Tensor index, int rows, int columns) -> (Tensor, Tensor)");
  m.def(
      "layout_update(Tensor(a!) mask, Tensor(b!) slot_of_block, Tensor(c!) index, int capacity, int groups, "
      "int[] kernel, int[] stride, int[] dilation, bool release) -> ()");
  m.def(
      "check_index(Tensor index, int rows, int columns, int capacity, int[] conv, bool by_column, int repeats=1) "
      "-> ()");
  m.def("capability() -> str");
  m.def("scratch_bytes(bool restart=False) -> (int, int)");
}

namespace dynaprune::bindings {
namespace {

std::string capability() { return cpu::capability_name(); }

std::tuple<int64_t, int64_t> scratch_bytes(bool restart) {
  const cpu::ScratchBytes counted = cpu::scratch_bytes(restart);
  return {counted.held, counted.most};
}

}  // namespace
}  // namespace dynaprune::bindings

STABLE_TORCH_LIBRARY_IMPL(dynaprune_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&dynaprune::bindings::capability));
  m.impl("scratch_bytes", TORCH_BOX(&dynaprune::bindings::scratch_bytes));
}
