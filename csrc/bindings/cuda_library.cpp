// The library `dynaprune_cuda`: its schemas. torch.ops.load_library loads it; no Python module, no Python.h needed.
//
// Activations come as backends/alignment.py makes them, wider than the layer where its sizes are no multiples of 16:
// therefore the real sizes are arguments of their own.
#include <string>

#include "bindings/cuda_common.h"

DYN_DEFINE(m) {
  m.def(
      "linear_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int in_features, int out_features, "
      "bool tf32) -> Tensor");
  m.def("linear_dgrad(Tensor dy, Tensor values, Tensor index, int in_features, int out_features, bool tf32) -> Tensor");
  m.def(
      "linear_wgrad(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo, int in_features, "
      "int out_features, bool tf32) -> Tensor");
  m.def(
      "linear_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index, int in_features, int out_features, "
      "bool tf32) -> (Tensor, Tensor)");
  m.def(
      "linear_probe(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo, int in_features, "
      "int out_features, Tensor probe, bool tf32) -> Tensor");
  m.def(
      "conv2d_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int in_channels, int out_channels, "
      "int[] conv, bool tf32) -> Tensor");
  m.def(
      "conv2d_dgrad(Tensor dy, Tensor values, Tensor index, int out_channels, int[] input_size, int[] conv, "
      "bool tf32) -> Tensor");
  m.def(
      "conv2d_wgrad(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo, int in_channels, "
      "int out_channels, int[] conv, bool tf32) -> Tensor");
  m.def(
      "conv2d_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index, int in_channels, int out_channels, "
      "int[] conv, bool tf32) -> (Tensor, Tensor)");
  m.def(
      "conv2d_probe(Tensor dy, Tensor x, Tensor index, int capacity, int bi, int bo, int in_channels, "
      "int out_channels, int[] conv, Tensor probe, bool tf32) -> Tensor");
  m.def("block_saliency(Tensor values, Tensor grad, Tensor index, int rows, int columns) -> (Tensor, Tensor)");
  m.def(
      "layout_update(Tensor(a!) mask, Tensor(b!) slot_of_block, Tensor(c!) index, int capacity, int groups, "
      "int[] kernel, int[] stride, int[] dilation, bool release) -> ()");
  m.def("architectures() -> str");
  m.def("toolkit_and_driver() -> str");
}

namespace dynaprune::bindings {
namespace {

std::string architectures() { return DYNAPRUNE_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace dynaprune::bindings

DYN_IMPLEMENT_AS(DYN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&dynaprune::bindings::architectures));
  m.impl("toolkit_and_driver", TORCH_BOX(&dynaprune::bindings::toolkit_and_driver));
}
