// Layout update and block saliency, the two ops on a layer's blocks themselves.
#include "bindings/common.h"
#include "cpu/kernels.h"
#include "cpu/layout_update.h"

namespace dynaprune::bindings {
namespace {

void layout_update(Tensor mask, Tensor slot_of_block, Tensor index, int64_t capacity, int64_t groups, Ints kernel,
                   Ints stride, Ints dilation, bool release) {
  const char* op = "layout_update";
  check_cpu(op, "mask", mask);
  check_cpu(op, "slot_of_block", slot_of_block);
  const auto shape =
      layout_shape<cpu::LayoutShape>(op, mask, slot_of_block, capacity, groups, kernel, stride, dilation);
  check_cpu(op, "index", index);
  check_index(op, index, shape.rows, shape.columns, shape.lists(), capacity);
  check_disjoint(op, "mask", mask, "slot_of_block", slot_of_block);
  check_disjoint(op, "mask", mask, "index", index);
  check_disjoint(op, "slot_of_block", slot_of_block, "index", index);
  cpu::layout_update(shape, release, static_cast<unsigned char*>(mask.mutable_data_ptr()),
                     static_cast<int32_t*>(slot_of_block.mutable_data_ptr()),
                     static_cast<int32_t*>(index.mutable_data_ptr()));
}

// What a kernel does before it walks along the row lists, or along the column lists; `repeats` times, to be timed.
void check_packed_index(const Tensor& index, int64_t rows, int64_t columns, int64_t capacity, const Ints& conv,
                        bool by_column, int64_t repeats) {
  const char* op = "check_index";
  check_conv(op, conv);
  const int64_t groups = conv[8], taps = conv[0] * conv[1];
  check_grid(op, rows, columns, 0, capacity);
  STD_TORCH_CHECK(rows % groups == 0 && columns % taps == 0, op, ": expected block rows divisible by ", groups,
                  " groups and block columns divisible by ", taps, " taps, got ", rows, " and ", columns);
  const int64_t channel_blocks = columns / taps;
  const int64_t lists = checked_product(op, "column lists", {groups, channel_blocks, conv[2], conv[3]});
  const cpu::ListGeometry geometry{groups, channel_blocks, conv[1], conv[2], conv[3], conv[6], conv[7]};
  for (int64_t i = 0; i < repeats; ++i)
    view_index(op, index, rows, columns, lists, capacity, by_column ? cpu::Lists::columns : cpu::Lists::rows,
               &geometry);
}

std::tuple<Tensor, Tensor> block_saliency(const Tensor& values, const Tensor& grad, const Tensor& index, int64_t rows,
                                          int64_t columns) {
  const char* op = "block_saliency";
  const DType dtype = kernel_dtype(op, "values", values);
  check_values(op, "values", values, "values", values);
  check_cpu(op, "grad", grad);
  check_storage(op, "grad", grad);
  check_same_dtype(op, "grad", grad, "values", values);
  check_same_shape(op, "grad", grad, "values", values);
  const int64_t capacity = values.size(0), lists = lists_of_index(op, index, rows, capacity);
  const LayoutView layout = view_index(op, index, rows, columns, lists, capacity, cpu::Lists::rows, nullptr);
  const Tensor gradient = torch::stable::contiguous(grad);
  Tensor stats = torch::stable::new_empty(values, {4, rows * columns}, sum_dtype(dtype));
  Tensor neuron = torch::stable::new_empty(values, {rows * values.size(2)}, sum_dtype(dtype));
  cpu::kernels().block_saliency(dtype, values.size(1), values.size(2), layout, TorchWorkers(), values.const_data_ptr(),
                                gradient.const_data_ptr(), stats.mutable_data_ptr(), neuron.mutable_data_ptr());
  return {stats, neuron};
}

}  // namespace
}  // namespace dynaprune::bindings

STABLE_TORCH_LIBRARY_IMPL(dynaprune_cpu, CPU, m) {
  using namespace dynaprune::bindings;
  m.impl("check_index", TORCH_BOX(&check_packed_index));
  m.impl("layout_update", TORCH_BOX(&layout_update));
  m.impl("block_saliency", TORCH_BOX(&block_saliency));
}
