// Kernels of block-sparse linear layers for Hopper, 16-bit elements, blocks of 64 or 128.
#pragma once

#include "core/packed_index.h"
#include "core/pipeline_sm90.h"

namespace dynaprune::cuda::sm90 {

// y [tokens, outer_size] = a [tokens, inner_size] W^T + bias, or for dgrad a W.
template <class T>
struct LinearProduct {
  LayoutView view;
  const T* bias;  // or null
  T* y;
  int tokens, inner_size, outer_size;
  int inner;  // width of a block on the summed side
};

struct ProductItem {
  int stages;
  int list, tile;
};

// Computes the transposed tile y^T [OUTER outputs, 2 WIDTH tokens]: with 64 outputs per block it is the tokens that
// make the products wide. Maps: `a` in boxes of 2 WIDTH tokens; values as matrices [bi][bo] in boxes of 64 rows, for
// dgrad of bi; `ragged` the same for the blocks at the ragged end of the summed side, less their padding: what a weight
// holds there is not defined, and 0 x NaN is NaN.
template <class T, int OUTER, int WIDTH, bool DGRAD>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kThreads, 1)
    linear_product_sm90_kernel(const DYN_GRID_CONSTANT TensorMap a, const DYN_GRID_CONSTANT TensorMap values,
                               const DYN_GRID_CONSTANT TensorMap ragged, LinearProduct<T> p) {
  using Machine = Pipeline<T, OUTER, WIDTH, ProductItem>;
  // values [bi][bo]: forward sums over bi, so outputs run along a row; dgrad sums over bo, along a row.
  constexpr Major kLeft = DGRAD ? Major::K : Major::MN;
  Machine::open();
  if (Machine::is_producer()) {
    give_registers<kProducerRegisters>();
    if (thread() != kConsumers * kWarpgroup) return;
    prefetch(a);
    prefetch(values);
    prefetch(ragged);
    const LayoutView& view = p.view;
    const int32_t* order = DGRAD ? view.col_order : view.row_order;
    const int32_t* pointers = DGRAD ? view.col_ptr : view.row_ptr;
    const int32_t* blocks = DGRAD ? view.col_rows : view.row_cols;
    const int32_t* slots = DGRAD ? view.col_slots : view.row_slots;
    const int last = p.inner_size / p.inner;  // the ragged block, where there is one
    const int64_t lists = DGRAD ? view.lists : view.rows, tiles = ceil_div(p.tokens, Machine::kColumns);
    typename Machine::Producer producer;
    for (int64_t program = block(); program < tiles * lists; program += grid()) {
      const TileOfProgram at = tile_of_program(program, tiles, lists);
      const int list = order[at.rank], begin = pointers[list], end = pointers[list + 1];
      producer.post({(end - begin) * (p.inner / kDepth), list, int(at.tile)});
      int next_block = begin < end ? blocks[begin] : 0, next_slot = begin < end ? slots[begin] : 0;
      for (int entry = begin; entry < end; ++entry) {
        const int block = next_block, slot = next_slot;
        if (entry + 1 < end) next_block = blocks[entry + 1], next_slot = slots[entry + 1];  // on the way meanwhile
        const TensorMap& map = block == last ? ragged : values;
        for (int k0 = 0; k0 < p.inner; k0 += kDepth) {
          const int stage = producer.next_stage(Machine::kStageBytes);
          uint64_t* full = producer.full(stage);
          unsigned char* left = Machine::left(stage);
          if (DGRAD) {
            tma_load(left, map, k0, 0, slot, full);  // [OUTER][64]
          } else {
            DYN_UNROLL
            for (int m = 0; m < OUTER / 64; ++m)  // [64][64] each
              tma_load(left + m * kPanelBytes, map, m * 64, k0, slot, full);
          }
          tma_load(Machine::right(stage), a, block * p.inner + k0, int(at.tile) * Machine::kColumns, 0, full);
        }
      }
    }
    producer.finish();
  } else {
    take_registers<kConsumerRegisters>();
    typename Machine::Consumer consumer;
    for (;;) {
      const ProductItem item = consumer.next();
      if (item.stages < 0) break;
      typename Machine::Sums sums;
      consumer.template multiply<kLeft, Major::K>(sums, item.stages, true);

      const int first = item.list * OUTER, real = p.outer_size - first;
      if (p.bias != nullptr) {
        DYN_UNROLL
        for (int m = 0; m < OUTER / 64; ++m)
          DYN_UNROLL
          for (int h = 0; h < 2; ++h) {
            const int row = consumer.row_of(m, 2 * h);
            const float bias = row < real ? to_float(p.bias[first + row]) : 0.0f;
            DYN_UNROLL
            for (int i = 2 * h; i < WIDTH / 2; i += 4) sums[m][i] += bias, sums[m][i + 1] += bias;
          }
      }
      const bool vectors = p.outer_size % 8 == 0;
      const int first_token = item.tile * Machine::kColumns + consumer.first_column();
      consumer.store_columns(sums, [&](int column, int row, const Vector16<T>& eight) {
        const int token = first_token + column;
        if (token >= p.tokens || row >= real) return;
        T* to = p.y + int64_t(token) * p.outer_size + first + row;
        if (vectors) {
          store16(to, eight);
        } else {
          DYN_UNROLL
          for (int e = 0; e < 8; ++e)
            if (row + e < real) to[e] = eight.element[e];
        }
      });
      consumer.done();
    }
  }
}

// dvalues [capacity, bi, OUTER] = x^T dy at listed blocks.
template <class T>
struct LinearGradient {
  LayoutView view;
  int tokens, in, out, log_bi;
  int programs, splits;  // chunks of a row's blocks, parts of the sum over tokens
  float* partial;        // [splits, capacity, bi, OUTER], or null: then straight to dvalues and wg
  T* dvalues;
  const T* values;  // null: no saliency
  float* wg;        // [rows * columns], or null
};

// Live blocks of one row, side by side, up to 256 inputs.
struct GradientItem {
  int stages;
  int row, blocks, split;
  int columns[4], slots[4];
};

// Computes transposed blocks dW [OUTER outputs, inputs], 256 inputs of one row's next live blocks at a time, which
// share dy. Maps: x and dy in boxes of 64 tokens.
template <class T, int OUTER>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kThreads, 1)
    linear_wgrad_sm90_kernel(const DYN_GRID_CONSTANT TensorMap x, const DYN_GRID_CONSTANT TensorMap dy,
                             LinearGradient<T> p) {
  constexpr int kWidth = 128, kPanels = 2;  // of a consumer: never less than a block
  using Machine = Pipeline<T, OUTER, kWidth, GradientItem>;
  const LayoutView& view = p.view;
  const int bi = 1 << p.log_bi;
  Machine::open();
  zero_unlisted(view, block(), grid(), int64_t(OUTER) << p.log_bi, p.dvalues, p.wg);
  if (Machine::is_producer()) {
    give_registers<kProducerRegisters>();
    if (thread() != kConsumers * kWarpgroup) return;
    prefetch(x);
    prefetch(dy);
    const int steps = ceil_div(p.tokens, kDepth), steps_per_split = ceil_div(steps, p.splits);
    typename Machine::Producer producer;
    for (int64_t program = block(); program < int64_t(p.programs) * p.splits; program += grid()) {
      const Chunk chunk = chunk_of_program(view, int(program % p.programs), Machine::kColumns >> p.log_bi);
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
        item.columns[b] = listed ? view.row_cols[chunk.begin + b] : 0;
        item.slots[b] = listed ? view.row_slots[chunk.begin + b] : 0;
      }
      const GradientItem& posted = producer.post(item);
      const int panels = posted.blocks << p.log_bi >> 6;
      for (int step = first; step < first + posted.stages; ++step) {
        const int stage = producer.next_stage(Machine::kLeftBytes + panels * kPanelBytes);
        uint64_t* full = producer.full(stage);
        DYN_UNROLL
        for (int m = 0; m < OUTER / 64; ++m)  // [64 tokens][64 outputs] each
          tma_load(Machine::left(stage) + m * kPanelBytes, dy, chunk.row * OUTER + m * 64, step * kDepth, 0, full);
        // [64 tokens][64 inputs] each; what panels of missing blocks hold ends in sums that are not stored
        for (int panel = 0; panel < panels; ++panel) {
          const int input = panel * 64;
          tma_load(Machine::right(stage) + panel * kPanelBytes, x,
                   (posted.columns[input >> p.log_bi] << p.log_bi) + (input & (bi - 1)), step * kDepth, 0, full);
        }
      }
    }
    producer.finish();
  } else {
    take_registers<kConsumerRegisters>();
    typename Machine::Consumer consumer;
    for (;;) {
      const GradientItem& item = consumer.next();
      if (item.stages < 0) break;
      const int first_block = consumer.first_column() >> p.log_bi;
      const bool has_blocks = first_block < item.blocks;
      typename Machine::Sums sums;
      consumer.template multiply<Major::MN, Major::MN>(sums, item.stages, has_blocks);
      if (!has_blocks) {
        consumer.done();
        continue;
      }
      const auto block_of = [&](int column) { return first_block + (column >> p.log_bi); };

      // The padding of a block gets zeros whatever dy holds: zeros of x times infinity would be NaN.
      const int real_outputs = p.out - item.row * OUTER;
      const auto real_inputs = [&](int b) { return p.in - (item.columns[b] << p.log_bi); };
      if (real_outputs < OUTER || real_inputs(item.blocks - 1) < bi) {  // columns ascend: only the last can be ragged
        DYN_UNROLL
        for (int i = 0; i < kWidth / 2; ++i) {
          const int column = consumer.column_of(i), b = block_of(column);
          const bool real = b < item.blocks && (column & (bi - 1)) < real_inputs(b);
          DYN_UNROLL
          for (int m = 0; m < OUTER / 64; ++m)
            if (!real || consumer.row_of(m, i) >= real_outputs) sums[m][i] = 0.0f;
        }
      }

      const auto at = [&](int column) {  // of a column of the tile, in dvalues
        return ((int64_t(item.slots[block_of(column)]) << p.log_bi) + (column & (bi - 1))) * OUTER;
      };
      if (p.partial != nullptr) {
        float* partial = p.partial + (int64_t(item.split) * view.capacity << p.log_bi) * OUTER;
        DYN_UNROLL
        for (int i = 0; i < kWidth / 2; ++i) {
          const int column = consumer.column_of(i);
          if (block_of(column) >= item.blocks) continue;
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
            const int column = consumer.column_of(i), b = block_of(column);
            if (b >= item.blocks || (column & (bi - 1)) >= real_inputs(b)) continue;
            const T* weights = p.values + at(column);
            DYN_UNROLL
            for (int m = 0; m < OUTER / 64; ++m) {
              const int row = consumer.row_of(m, i);
              if (row < real_outputs) weighted[i / 32] += sums[m][i] * to_float(weights[row]);
            }
          }
          float(*warp_sums)[kPanels] = &Machine::control().warp_sums[consumer.index() * 4];
          DYN_UNROLL
          for (int panel = 0; panel < kPanels; ++panel) {
            float sum = weighted[panel];
            DYN_UNROLL
            for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
            if (lane() == 0) warp_sums[warp() % 4][panel] = sum;
          }
          consumer.meet();
          const int mine = thread() % kWarpgroup, b = first_block + mine;
          if (mine < kWidth >> p.log_bi && b < item.blocks) {
            float sum = 0.0f;
            for (int panel = mine * bi / 64; panel < (mine + 1) * bi / 64; ++panel)
              sum += (warp_sums[0][panel] + warp_sums[1][panel]) + (warp_sums[2][panel] + warp_sums[3][panel]);
            p.wg[item.row * view.columns + item.columns[b]] = sum;
          }
        }
        consumer.store_columns(sums, [&](int column, int row, const Vector16<T>& eight) {
          if (block_of(column) < item.blocks) store16(p.dvalues + at(column) + row, eight);
        });
      }
      consumer.done();
    }
  }
}

}  // namespace dynaprune::cuda::sm90
