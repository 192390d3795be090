// Layout update and block saliency, the two ops on a layer's blocks themselves.
#include "bindings/common.h"
#include "cpu/capability.h"
#include "cpu/layout_update.h"
#include "cpu/saliency.h"

namespace dynaprune::bindings {
namespace {

using Ints = std::vector<int64_t>;

void check_pair(const char* name, const Ints& pair) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= 1 && pair[1] >= 1,
                  "layout_update: expected two positive integers as ", name, ", got ", pair.size(),
                  pair.empty() ? "" : " of which the first is ", pair.empty() ? int64_t(0) : pair[0]);
}

void layout_update(Tensor mask, Tensor slot_of_block, Tensor index, int64_t capacity, int64_t groups, Ints kernel,
                   Ints stride, Ints dilation, bool release) {
  const char* op = "layout_update";
  check_cpu(op, "mask", mask);
  check_dim(op, "mask", mask, 2, "[rows, columns]");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": expected a bool mask, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  check_contiguous(op, "mask", mask);
  check_cpu(op, "slot_of_block", slot_of_block);
  STD_TORCH_CHECK(slot_of_block.scalar_type() == ScalarType::Int, op, ": expected an int32 slot_of_block, got ",
                  torch::headeronly::toString(slot_of_block.scalar_type()));
  STD_TORCH_CHECK(shape_of(slot_of_block) == shape_of(mask), op, ": expected slot_of_block of the mask's shape ",
                  shape_of(mask), ", got ", shape_of(slot_of_block));
  check_contiguous(op, "slot_of_block", slot_of_block);
  check_pair("kernel", kernel);
  check_pair("stride", stride);
  check_pair("dilation", dilation);
  STD_TORCH_CHECK(capacity >= 0 && groups >= 1, op, ": expected capacity >= 0 and groups >= 1, got ", capacity, " and ",
                  groups);
  const cpu::LayoutShape shape{mask.size(0), mask.size(1), capacity,  groups,      kernel[0],  kernel[1],
                               stride[0],    stride[1],    dilation[0], dilation[1]};
  STD_TORCH_CHECK(shape.rows % groups == 0, op, ": expected block rows divisible by groups = ", groups, ", got ",
                  shape.rows);
  STD_TORCH_CHECK(shape.columns % shape.taps() == 0, op, ": expected block columns divisible by the kernel's ",
                  shape.taps(), " taps, got ", shape.columns);
  STD_TORCH_CHECK(mask.numel() <= INT32_MAX, op, ": expected fewer than 2^31 blocks, got ", mask.numel());
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
  STD_TORCH_CHECK(shape_of(grad) == shape_of(values), op, ": expected grad of the shape of values ", shape_of(values),
                  ", got ", shape_of(grad));
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": expected rows and columns >= 0, got ", rows, " and ", columns);
  check_index(op, index);
  const int64_t capacity = values.size(0);
  const int64_t rest = index.numel() - packed_index_size(rows, 0, capacity);
  STD_TORCH_CHECK(rest >= 0 && rest % 2 == 0, op, ": expected an index of ",
                  packed_index_size(rows, 0, capacity), " + 2 x lists elements for ", rows,
                  " block rows and capacity ", capacity, ", got ", index.numel());
  const LayoutView layout = view_index(op, index, rows, columns, rest / 2, capacity);
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
