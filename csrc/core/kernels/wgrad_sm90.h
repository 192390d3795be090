// Gradients of blocks on Hopper, and their saliency: sums over the rows of two activations, 16-bit elements, blocks of
// 64 or 128.
#pragma once

#include "core/mainloop/pipeline_sm90.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda::sm90 {

// dvalues [capacity, bi, OUTER] = x^T dy at listed blocks.
template <class T>
struct Gradient {
  LayoutView view;
  int tokens, out, log_bi;  // tokens: or output pixels
  int programs, splits;     // chunks of a row's blocks, parts of the sum over tokens
  float* partial;        // [splits, capacity, bi, OUTER], or null: then straight to dvalues and wg
  T* dvalues;
  const T* values;  // null: no saliency
  float* wg;        // [rows * columns], or null
};

// Live blocks of one row, side by side, up to 256 inputs.
struct GradientItem {
  int stages;
  int row, blocks, split;
  int columns[4], slots[4], inputs[4];  // slots: none where no block is; inputs: without the block's padding
};

// Computes transposed blocks dW [OUTER outputs, inputs], 256 inputs of one row's next live blocks at a time, which
// share dy. Map: dy in boxes of 64 rows. The producer reads the lists, every number once; consumers compare slots.
//
// `Inputs` says what a row of x is (gather/tokens_sm90.h, gather/pixels_sm90.h):
//   inputs(column)                   how many a block of the column has, without padding
//   panel(row, column, first)        64 inputs of the block, from its first-th on
//   start(j)                         where copies from row j on begin
//   copy(to, start, panel, barrier)  [64 rows][64 inputs]
template <class T, class Inputs, int OUTER>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kThreads, 1)
    wgrad_sm90_kernel(const DYN_GRID_CONSTANT Inputs x, const DYN_GRID_CONSTANT TensorMap dy, Gradient<T> p) {
  constexpr int kWidth = 128, kPanels = kWidth / 64;  // of a consumer: never less than a block
  using Mainloop = Pipeline<T, OUTER, kWidth, GradientItem>;
  const LayoutView& view = p.view;
  const int bi = 1 << p.log_bi;
  Mainloop::init_barriers();
  zero_unlisted(view, block(), grid(), int64_t(OUTER) << p.log_bi, p.dvalues, p.wg);
  if (Mainloop::is_producer()) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if (thread() != kConsumers * kWarpgroup) return;
    x.prefetch();
    prefetch(dy);
    const int steps = ceil_div(p.tokens, kDepth), steps_per_split = ceil_div(steps, p.splits);
    typename Mainloop::Producer producer;
    for (int64_t program = block(); program < int64_t(p.programs) * p.splits; program += grid()) {
      const Chunk chunk = chunk_of_program(view, int(program % p.programs), Mainloop::kColumns >> p.log_bi);
      if (chunk.begin >= chunk.end) continue;
      GradientItem item;
      item.split = int(program / p.programs);
      const int first = item.split * steps_per_split, left_over = steps - first;
      item.stages = left_over < 0 ? 0 : left_over < steps_per_split ? left_over : steps_per_split;
      item.row = chunk.row;
      item.blocks = chunk.end - chunk.begin;
      DYN_UNROLL
      for (int b = 0; b < 4; ++b) {
        const bool listed = b < item.blocks;
        const int column = listed ? view.row_cols[chunk.begin + b] : 0;
        item.columns[b] = is_column(column, view.columns) ? column : 0;  // registers do not suffice to leave it out
        item.slots[b] = listed ? view.row_slots[chunk.begin + b] : -1;
        item.inputs[b] = listed ? x.inputs(item.columns[b]) : 0;
      }
      const GradientItem& posted = producer.post(item);
      const int count = posted.blocks << p.log_bi >> 6;
      typename Inputs::Panel panels[kConsumers * kPanels];
      DYN_UNROLL
      for (int i = 0; i < kConsumers * kPanels; ++i)
        panels[i] = x.panel(chunk.row, posted.columns[(i * 64) >> p.log_bi], (i * 64) & (bi - 1));
      for (int step = first; step < first + posted.stages; ++step) {
        const auto start = x.start(step * kDepth);
        const int stage = producer.acquire(Mainloop::kLeftBytes + count * kPanelBytes);
        uint64_t* full_barrier = producer.full_barrier(stage);
        DYN_UNROLL
        for (int m = 0; m < OUTER / 64; ++m)  // [64 rows][64 outputs] each
          tma_load(Mainloop::left(stage) + m * kPanelBytes, dy, chunk.row * OUTER + m * 64, step * kDepth, 0,
                   full_barrier);
        DYN_UNROLL  // what panels of missing blocks hold ends in sums that are not stored
        for (int i = 0; i < kConsumers * kPanels; ++i)
          if (i < count) x.copy(Mainloop::right(stage) + i * kPanelBytes, start, panels[i], full_barrier);
      }
    }
    producer.finish();
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    typename Mainloop::Consumer consumer;
    for (;;) {
      const GradientItem& item = consumer.wait_item();
      if (item.stages < 0) break;
      const int first_block = consumer.first_column() >> p.log_bi;
      const bool has_blocks = first_block < item.blocks;
      typename Mainloop::Sums sums;
      consumer.template multiply<Major::MN, Major::MN>(sums, item.stages, has_blocks);
      if (!has_blocks) {
        consumer.release_item();
        continue;
      }
      const auto block_of = [&](int column) { return first_block + (column >> p.log_bi); };
      const auto exists = [&](int block) { return is_slot(item.slots[block], view.capacity); };

      // The padding of a block gets zeros whatever dy holds: zeros of x times infinity would be NaN.
      const int real_outputs = p.out - item.row * OUTER;
      int real_inputs[kPanels];  // of 64, counted from this thread's first; missing blocks have none
      bool ragged = real_outputs < OUTER;
      DYN_UNROLL
      for (int panel = 0; panel < kPanels; ++panel) {
        const int real = item.inputs[block_of(panel * 64)] - ((panel * 64) & (bi - 1));
        real_inputs[panel] = real - consumer.column_of(0);
        ragged = ragged || real < 64;
      }
      const auto is_real = [&](int i) { return i % 32 / 4 * 8 + i % 2 < real_inputs[i / 32]; };  // see column_of()
      if (ragged) {
        DYN_UNROLL
        for (int i = 0; i < kWidth / 2; ++i)
          DYN_UNROLL
          for (int m = 0; m < OUTER / 64; ++m)
            if (!is_real(i) || consumer.row_of(m, i) >= real_outputs) sums[m][i] = 0.0f;
      }

      const auto at = [&](int column) {  // of a column of the tile, in dvalues
        return ((int64_t(item.slots[block_of(column)]) << p.log_bi) + (column & (bi - 1))) * OUTER;
      };
      if (p.partial != nullptr) {
        float* partial = p.partial + (int64_t(item.split) * view.capacity << p.log_bi) * OUTER;
        DYN_UNROLL
        for (int i = 0; i < kWidth / 2; ++i) {
          const int column = consumer.column_of(i);
          if (!exists(block_of(column))) continue;
          float* to = partial + at(column);
          DYN_UNROLL
          for (int m = 0; m < OUTER / 64; ++m) to[consumer.row_of(m, i)] = sums[m][i];  // eight lanes: 32 bytes
        }
      } else {
        if (p.values != nullptr) {
          // Sum of weight x gradient: per panel of 64 inputs in this thread, then over the warp, then over the block.
          float weighted[kPanels] = {};
          DYN_UNROLL
          for (int i = 0; i < kWidth / 2; ++i) {
            if (!is_real(i) || !exists(block_of(consumer.column_of(i)))) continue;
            const T* weights = p.values + at(consumer.column_of(i));
            DYN_UNROLL
            for (int m = 0; m < OUTER / 64; ++m) {
              const int row = consumer.row_of(m, i);
              if (row < real_outputs) weighted[i / 32] += sums[m][i] * to_float(weights[row]);
            }
          }
          float(*warp_sums)[kPanels] = &Mainloop::control().warp_sums[consumer.index() * 4];
          DYN_UNROLL
          for (int panel = 0; panel < kPanels; ++panel) {
            float sum = weighted[panel];
            DYN_UNROLL
            for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
            if (lane() == 0) warp_sums[warp() % 4][panel] = sum;
          }
          consumer.sync_warpgroup();
          const int mine = thread() % kWarpgroup, b = first_block + mine;
          if (mine < kWidth >> p.log_bi && exists(b)) {
            float sum = 0.0f;
            for (int panel = mine * bi / 64; panel < (mine + 1) * bi / 64; ++panel)
              sum += (warp_sums[0][panel] + warp_sums[1][panel]) + (warp_sums[2][panel] + warp_sums[3][panel]);
            p.wg[item.row * view.columns + item.columns[b]] = sum;
          }
        }
        consumer.store_columns(sums, [&](int column, int row, const Vector16<T>& eight) {
          if (exists(block_of(column))) store16(p.dvalues + at(column) + row, eight);
        });
      }
      consumer.release_item();
    }
  }
}

}  // namespace dynaprune::cuda::sm90
