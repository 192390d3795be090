// Layout update and block saliency, the two ops on a layer's blocks themselves.
#include "bindings/common.h"
#include "cpu/capability.h"
#include "cpu/layout_update.h"
#include "cpu/saliency.h"

namespace dynaprune::bindings {
namespace {

void layout_update(Tensor mask, Tensor slot_of_block, Tensor index, int64_t capacity, int64_t groups, Ints kernel,
                   Ints stride, Ints dilation, bool release) {
  const char* op = "layout_update";
  check_cpu(op, "mask", mask);
  check_cpu(op, "slot_of_block", slot_of_block);
  const auto shape =
      layout_shape<cpu::LayoutShape>(op, mask, slot_of_block, capacity, groups, kernel, stride, dilation);
  view_index(op, index, shape.rows, shape.columns, shape.lists(), capacity);
  STD_TORCH_CHECK(cpu::layout_update(shape, release, static_cast<unsigned char*>(mask.mutable_data_ptr()),
                                     static_cast<int32_t*>(slot_of_block.mutable_data_ptr()),
                                     static_cast<int32_t*>(index.mutable_data_ptr())),
                  op, ": expected slots of slot_of_block below capacity ", capacity, ", each at most once");
}

std::tuple<Tensor, Tensor> block_saliency(const Tensor& values, const Tensor& grad, const Tensor& index, int64_t rows,
                                          int64_t columns) {
  const char* op = "block_saliency";
  const DType dtype = kernel_dtype(op, "values", values);
  check_values(op, "values", values, "values", values);
  check_cpu(op, "grad", grad);
  check_same_dtype(op, "grad", grad, "values", values);
  check_same_shape(op, "grad", grad, "values", values);
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": expected rows and columns >= 0, got ", rows, " and ", columns);
  const int64_t capacity = values.size(0), lists = lists_of_index(op, index, rows, capacity);
  const LayoutView layout = view_index(op, index, rows, columns, lists, capacity);
  const Tensor gradient = torch::stable::contiguous(grad);
  Tensor stats = torch::stable::new_empty(values, {4, rows * columns}, sum_dtype(dtype));
  Tensor neuron = torch::stable::new_empty(values, {rows * values.size(2)}, sum_dtype(dtype));
  DYNAPRUNE_CHOOSE(block_saliency)
  (dtype, values.size(1), values.size(2), layout, values.const_data_ptr(), gradient.const_data_ptr(),
   stats.mutable_data_ptr(), neuron.mutable_data_ptr(), TorchWorkers());
  return {stats, neuron};
}

}  // namespace
}  // namespace dynaprune::bindings

STABLE_TORCH_LIBRARY_IMPL(dynaprune_cpu, CPU, m) {
  using namespace dynaprune::bindings;
  m.impl("layout_update", TORCH_BOX(&layout_update));
  m.impl("block_saliency", TORCH_BOX(&block_saliency));
}
