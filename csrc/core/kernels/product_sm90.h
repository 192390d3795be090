// Forward and dgrad on Hopper: products of a block-sparse weight with rows of an activation, 16-bit elements, blocks of
// 64 or 128.
#pragma once

#include "core/mainloop/pipeline_sm90.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda::sm90 {

// y = a W^T + bias, or for dgrad a W.
template <class T>
struct Product {
  LayoutView view;
  const T* bias;  // or null
  T* y;
};

struct ProductItem {
  int stages;
  int list, tile;
};

// A tile is y^T [OUTER outputs, 2 WIDTH rows of a]. It is transposed because a block may have only 64 outputs: the rows
// of a make the products wide.
//
// Two maps describe `values`, matrices [bi][bo], in boxes of 64 rows (dgrad: of bi rows). `values` describes them
// whole. `ragged` leaves out the padding of the blocks at the ragged end of the summed side. A weight's padding is not
// defined, and 0 x NaN is NaN.
//
// `Rows` says what a row of a is (gather/tokens_sm90.h, gather/pixels_sm90.h):
//   most(), inner(), width()        rows of the longest list, width of a block on the summed side, of a row of y
//   list(i, OUTER)                  list i of the index: its `count` rows, first `output` and `real` outputs from there
//   row(list, j), start(list, j)    which row of y gets row j; where copies from row j on begin
//   entry(view, e)                  what the index says of entry e
//   exists(view, entry)             whether there is such a block; there is one for Entry{}
//   block(entry)                    the block as copy() wants it
//   copy(to, list, start, block, k, barrier)       [2 WIDTH rows][64 elements of the summed side from the block's k on]
// Only the producer reads the index, every number once. It counts an item's stages before it looks at the blocks. A
// block that does not exist is copied as zeros, from beyond the last matrix of `values`.
template <class T, class Rows, int OUTER, int WIDTH>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kThreads, 1)
    product_sm90_kernel(const DYN_GRID_CONSTANT Rows rows, const DYN_GRID_CONSTANT TensorMap values,
                        const DYN_GRID_CONSTANT TensorMap ragged, Product<T> p) {
  using Mainloop = Pipeline<T, OUTER, WIDTH, ProductItem>;
  constexpr bool kDgrad = Rows::kDgrad;
  // values [bi][bo]: forward sums over bi, so outputs run along a row; dgrad sums over bo, along a row.
  constexpr Major kLeft = kDgrad ? Major::K : Major::MN;
  Mainloop::init_barriers();
  if (Mainloop::is_producer()) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if (thread() != kConsumers * kWarpgroup) return;
    rows.prefetch();
    prefetch(values);
    prefetch(ragged);
    const LayoutView& view = p.view;
    const int32_t* order = kDgrad ? view.col_order : view.row_order;
    const int32_t* pointers = kDgrad ? view.col_ptr : view.row_ptr;
    const int32_t* slots = kDgrad ? view.col_slots : view.row_slots;
    const int inner = rows.inner();
    const int64_t lists = kDgrad ? view.lists : view.rows, tiles = ceil_div(rows.most(), Mainloop::kColumns);
    typename Mainloop::Producer producer;
    for (int64_t program = block(); program < tiles * lists; program += grid()) {
      const TileOfProgram at = tile_of_program(program, tiles, lists);
      const int number = list_at(order, at.rank, lists);
      const auto [begin, end] = entries_of(view, pointers, number);
      const auto list = rows.list(number, OUTER);
      const int first = int(at.tile) * Mainloop::kColumns;
      if (first >= list.count) continue;  // phases of a strided convolution differ in size
      producer.post({(end - begin) * (inner / kDepth), number, int(at.tile)});
      const auto start = rows.start(list, first);
      auto next_entry = begin < end ? Rows::entry(view, begin) : typename Rows::Entry{};
      int next_slot = begin < end ? slots[begin] : 0;
      for (int entry = begin; entry < end; ++entry) {
        const bool exists = Rows::exists(view, next_entry) && is_slot(next_slot, view.capacity);
        const auto block = rows.block(exists ? next_entry : typename Rows::Entry{});
        const int slot = exists ? next_slot : int(view.capacity);
        if (entry + 1 < end) next_entry = Rows::entry(view, entry + 1), next_slot = slots[entry + 1];  // meanwhile
        const TensorMap& map = rows.is_ragged(block) ? ragged : values;
        for (int k0 = 0; k0 < inner; k0 += kDepth) {
          const int stage = producer.acquire(Mainloop::kStageBytes);
          uint64_t* full_barrier = producer.full_barrier(stage);
          unsigned char* left = Mainloop::left(stage);
          if (kDgrad) {
            tma_load(left, map, k0, 0, slot, full_barrier);  // [OUTER][64]
          } else {
            DYN_UNROLL
            for (int m = 0; m < OUTER / 64; ++m)  // [64][64] each
              tma_load(left + m * kPanelBytes, map, m * 64, k0, slot, full_barrier);
          }
          rows.copy(Mainloop::right(stage), list, start, block, k0, full_barrier);
        }
      }
    }
    producer.finish();
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    typename Mainloop::Consumer consumer;
    for (;;) {
      const ProductItem item = consumer.wait_item();
      if (item.stages < 0) break;
      typename Mainloop::Sums sums;
      consumer.template multiply<kLeft, Major::K>(sums, item.stages, true);

      const auto list = rows.list(item.list, OUTER);
      if (p.bias != nullptr) {
        DYN_UNROLL
        for (int m = 0; m < OUTER / 64; ++m)
          DYN_UNROLL
          for (int h = 0; h < 2; ++h) {
            const int output = consumer.row_of(m, 2 * h);
            const float bias = output < list.real ? to_float(p.bias[list.output + output]) : 0.0f;
            DYN_UNROLL
            for (int i = 2 * h; i < WIDTH / 2; i += 4) sums[m][i] += bias, sums[m][i + 1] += bias;
          }
      }
      const int width = rows.width();
      const bool vectors = width % 8 == 0;
      const int first = item.tile * Mainloop::kColumns + consumer.first_column();
      consumer.store_columns(sums, [&](int column, int output, const Vector16<T>& eight) {
        const int row = first + column;
        if (row >= list.count || output >= list.real) return;
        T* to = p.y + rows.row(list, row) * width + list.output + output;
        if (vectors) {
          store16(to, eight);
        } else {
          DYN_UNROLL
          for (int e = 0; e < 8; ++e)
            if (output + e < list.real) to[e] = eight.element[e];
        }
      });
      consumer.release_item();
    }
  }
}

}  // namespace dynaprune::cuda::sm90
