// The emulated launcher of core/layout_update.cu for Python.
#include "emulation/module.h"

#include "core/launch/layout_update.cu"

namespace dynaprune::cuda::emulation {
namespace {

// conv: groups, kernel, stride and dilation, two each but for the groups. Writes mask (bool), slot_of_block and index.
void emulate_layout_update(py::array mask, py::array slot_of_block, py::array index, int64_t capacity,
                           const std::array<int64_t, 7>& conv, bool release) {
  const Buffer live(mask), slots(slot_of_block), packed(size_t(index.nbytes()));
  const LayoutShape shape{mask.shape(0), mask.shape(1), capacity, conv[0], conv[1],
                          conv[2],       conv[3],       conv[4],  conv[5], conv[6]};
  const Buffer workspace(layout_update_workspace(shape));
  check(layout_update({132, 80, nullptr}, shape, release, live.data<bool>(), slots.data<int32_t>(),
                      packed.data<int32_t>(), workspace.data()));
  live.copy_to(mask);
  slots.copy_to(slot_of_block);
  packed.copy_to(index);
}

}  // namespace
}  // namespace dynaprune::cuda::emulation

PYBIND11_MODULE(emulated_layout_update, module) {
  using namespace dynaprune::cuda::emulation;
  module.def("layout_update", &emulate_layout_update);
}
