// Layout update and block saliency of the library `dynaprune_cuda`, the two ops on a layer's blocks themselves.
#include "bindings/cuda_common.h"

namespace dynaprune::bindings {
namespace {

using cuda::LayoutShape;

void layout_update(Tensor mask, Tensor slot_of_block, Tensor index, int64_t capacity, int64_t groups, Ints kernel,
                   Ints stride, Ints dilation, bool release) {
  const char* op = "layout_update";
  check_cuda(op, "mask", mask);
  check_beside(op, "slot_of_block", slot_of_block, mask);
  check_beside(op, "index", index, mask);
  const auto shape = layout_shape<LayoutShape>(op, mask, slot_of_block, capacity, groups, kernel, stride, dilation);
  const int64_t channel_blocks = shape.columns / (shape.kernel_h * shape.kernel_w);
  const int64_t lists = shape.groups * channel_blocks * shape.stride_h * shape.stride_w;
  check_index(op, index, shape.rows, shape.columns, lists, capacity);
  check_disjoint(op, "mask", mask, "slot_of_block", slot_of_block);
  check_disjoint(op, "mask", mask, "index", index);
  check_disjoint(op, "slot_of_block", slot_of_block, "index", index);
  const OnDevice device(mask);
  const Tensor scratch = workspace(mask, cuda::layout_update_workspace(shape));
  check_success(op, cuda::layout_update(device.target, shape, release, static_cast<bool*>(mask.mutable_data_ptr()),
                                        static_cast<int32_t*>(slot_of_block.mutable_data_ptr()),
                                        static_cast<int32_t*>(index.mutable_data_ptr()), scratch.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> block_saliency(const Tensor& values, const Tensor& grad, const Tensor& index, int64_t rows,
                                          int64_t columns) {
  const char* op = "block_saliency";
  check_values(op, values, "values", values);
  check_beside(op, "grad", grad, values);
  check_same_dtype(op, "grad", grad, "values", values);
  check_same_shape(op, "grad", grad, "values", values);
  check_contiguous(op, "grad", grad);
  check_storage(op, "grad", grad);
  STD_TORCH_CHECK(aligned(grad), op, ": expected grad aligned to 16 bytes");
  check_block(op, values.size(1), values.size(2));
  const int64_t capacity = values.size(0), lists = lists_of_index(op, index, rows, capacity);
  const Blocks blocks = blocks_of(op, index, values, rows, columns, lists, capacity, values.size(1), values.size(2));
  const DType dtype = kernel_dtype(op, "values", values);
  const OnDevice device(values);
  const Tensor scratch = workspace(values, cuda::block_saliency_workspace(blocks));
  Tensor stats = torch::stable::new_empty(values, {4, rows * columns}, ScalarType::Float);
  Tensor neuron = new_sums(values, rows * blocks.bo);
  check_success(op, cuda::block_saliency(device.target, dtype, blocks, values.const_data_ptr(), grad.const_data_ptr(),
                                         floats(stats), floats(neuron), scratch.mutable_data_ptr()));
  return {stats, neuron};
}

}  // namespace
}  // namespace dynaprune::bindings

DYN_IMPLEMENT(m) {
  using namespace dynaprune::bindings;
  m.impl("layout_update", TORCH_BOX(&layout_update));
  m.impl("block_saliency", TORCH_BOX(&block_saliency));
}
