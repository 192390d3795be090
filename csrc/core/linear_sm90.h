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
  int bi, bo;
};

struct ProductItem {
  uint32_t position;
  int stages;
  int list, tile;
  int real;  // of its stages * 64 summed elements: less where the last block of the list is ragged
};

// Computes the transposed tile y^T [OUTER outputs, WIDTH tokens]: with 64 outputs per block it is the tokens that make
// the product wide enough. Maps: `a` in boxes of WIDTH tokens; the values as [capacity * bi, bo] in boxes of 64 rows,
// for dgrad of bi.
template <class T, int OUTER, int WIDTH, bool DGRAD>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kThreads, 1)
    linear_product_sm90_kernel(const DYN_GRID_CONSTANT TensorMap a, const DYN_GRID_CONSTANT TensorMap values,
                               LinearProduct<T> p) {
  using Machine = Pipeline<T, OUTER, WIDTH, ProductItem>;
  // values [bi][bo]: forward sums over bi, so outputs run along a row; dgrad sums over bo, along a row.
  constexpr Major kLeft = DGRAD ? Major::K : Major::MN;
  Machine::open();
  if (Machine::is_producer()) {
    give_registers<kProducerRegisters>();
    if (thread() != kConsumers * kWarpgroup) return;
    prefetch(a);
    prefetch(values);
    const LayoutView& view = p.view;
    const int32_t* order = DGRAD ? view.col_order : view.row_order;
    const int32_t* pointers = DGRAD ? view.col_ptr : view.row_ptr;
    const int32_t* blocks = DGRAD ? view.col_rows : view.row_cols;
    const int32_t* slots = DGRAD ? view.col_slots : view.row_slots;
    const int inner = DGRAD ? p.bo : p.bi, ragged = p.inner_size % inner, last = p.inner_size / inner;
    const int64_t lists = DGRAD ? view.lists : view.rows, tiles = ceil_div(p.tokens, WIDTH);
    typename Machine::Producer producer;
    for (int64_t program = block(); program < tiles * lists; program += grid()) {
      const TileOfProgram at = tile_of_program(program, tiles, lists);
      const int list = order[at.rank], begin = pointers[list], end = pointers[list + 1];
      const int length = (end - begin) * inner;
      const bool has_ragged = ragged != 0 && begin < end && blocks[end - 1] == last;
      producer.post({0, length / kDepth, list, int(at.tile), has_ragged ? length - inner + ragged : length});
      int next_block = begin < end ? blocks[begin] : 0, next_slot = begin < end ? slots[begin] : 0;
      for (int entry = begin; entry < end; ++entry) {
        const int block = next_block, slot = next_slot;
        if (entry + 1 < end) next_block = blocks[entry + 1], next_slot = slots[entry + 1];  // on the way meanwhile
        for (int k0 = 0; k0 < inner; k0 += kDepth) {
          const int stage = producer.next_stage(Machine::kStageBytes);
          uint64_t* full = producer.full(stage);
          unsigned char* left = Machine::left(stage);
          if (DGRAD) {
            tma_load(left, values, k0, slot * p.bi, full);  // [OUTER][64]
          } else {
            DYN_UNROLL
            for (int m = 0; m < OUTER / 64; ++m)  // [64][64] each
              tma_load(left + m * kPanelBytes, values, m * 64, slot * p.bi + k0, full);
          }
          tma_load(Machine::right(stage), a, block * inner + k0, int(at.tile) * WIDTH, full);  // [WIDTH][64]
        }
      }
    }
    producer.finish();
  } else {
    take_registers<kConsumerRegisters>();
    typename Machine::Consumer consumer;
    for (;;) {
      const ProductItem item = consumer.next();
      consumer.done();
      if (item.stages < 0) break;

      // What the weight holds in its padding is not defined, and 0 x NaN is NaN: zeros instead.
      const auto clear_padding = [&](int step, unsigned char* left) {
        const int real = item.real - step * kDepth;  // summed elements of this stage
        if (real >= kDepth) return;
        const T zero = from_float<T>(0.0f);
        for (int piece = thread() % kWarpgroup; piece < OUTER * 8; piece += kWarpgroup) {
          T* eight = reinterpret_cast<T*>(left + piece * 16);
          const int row = piece / 8 % 64, first = (piece % 8 ^ (row & 7)) * 8;  // the swizzle undone
          for (int e = 0; e < 8; ++e)
            if ((DGRAD ? first + e : row) >= real) eight[e] = zero;
        }
        consumer.stored_operand();
      };
      typename Machine::Sums sums;
      consumer.template multiply<kLeft, Major::K>(sums, item.position, item.stages, clear_padding);

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
      consumer.store_columns(sums, [&](int column, int row, const Vector16<T>& eight) {
        const int token = item.tile * WIDTH + column;
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

// WIDTH / bi live blocks of one row, side by side.
template <int WIDTH>
struct GradientItem {
  uint32_t position;
  int stages;
  int row, blocks, split;
  int columns[WIDTH / 64], slots[WIDTH / 64];
};

// Computes transposed blocks dW [OUTER outputs, inputs], WIDTH inputs of one row's next live blocks at a time, which
// share dy. Maps: x and dy in boxes of 64 tokens.
template <class T, int OUTER, int WIDTH>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kThreads, 1)
    linear_wgrad_sm90_kernel(const DYN_GRID_CONSTANT TensorMap x, const DYN_GRID_CONSTANT TensorMap dy,
                             LinearGradient<T> p) {
  using Item = GradientItem<WIDTH>;
  using Machine = Pipeline<T, OUTER, WIDTH, Item>;
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
      const Chunk chunk = chunk_of_program(view, int(program % p.programs), WIDTH >> p.log_bi);
      if (chunk.begin >= chunk.end) continue;
      Item item;
      item.split = int(program / p.programs);
      const int first = item.split * steps_per_split, left_over = steps - first;
      item.stages = left_over < 0 ? 0 : left_over < steps_per_split ? left_over : steps_per_split;
      item.row = chunk.row;
      item.blocks = chunk.end - chunk.begin;
      DYN_UNROLL
      for (int b = 0; b < WIDTH / 64; ++b) {
        const bool listed = b < item.blocks;
        item.columns[b] = listed ? view.row_cols[chunk.begin + b] : 0;
        item.slots[b] = listed ? view.row_slots[chunk.begin + b] : 0;
      }
      const Item& posted = producer.post(item);
      const int panels = posted.blocks << p.log_bi >> 6;
      for (int step = first; step < first + posted.stages; ++step) {
        const int stage = producer.next_stage(Machine::kLeftBytes + panels * kPanelBytes);
        uint64_t* full = producer.full(stage);
        DYN_UNROLL
        for (int m = 0; m < OUTER / 64; ++m)  // [64 tokens][64 outputs] each
          tma_load(Machine::left(stage) + m * kPanelBytes, dy, chunk.row * OUTER + m * 64, step * kDepth, full);
        // [64 tokens][64 inputs] each; what panels of missing blocks hold ends in sums that are not stored
        for (int panel = 0; panel < panels; ++panel) {
          const int input = panel * 64;
          tma_load(Machine::right(stage) + panel * kPanelBytes, x,
                   (posted.columns[input >> p.log_bi] << p.log_bi) + (input & (bi - 1)), step * kDepth, full);
        }
      }
    }
    producer.finish();
  } else {
    take_registers<kConsumerRegisters>();
    typename Machine::Consumer consumer;
    for (;;) {
      const Item& item = consumer.next();
      if (item.stages < 0) break;
      typename Machine::Sums sums;
      consumer.template multiply<Major::MN, Major::MN>(sums, item.position, item.stages, [](int, unsigned char*) {});

      // The padding of a block gets zeros whatever dy holds: zeros of x times infinity would be NaN.
      const int real_outputs = p.out - item.row * OUTER;
      const auto real_inputs = [&](int b) { return p.in - (item.columns[b] << p.log_bi); };
      if (real_outputs < OUTER || real_inputs(item.blocks - 1) < bi) {  // columns ascend: only the last can be ragged
        DYN_UNROLL
        for (int i = 0; i < WIDTH / 2; ++i) {
          const int column = consumer.column_of(i), b = column >> p.log_bi;
          const bool real = b < item.blocks && (column & (bi - 1)) < real_inputs(b);
          DYN_UNROLL
          for (int m = 0; m < OUTER / 64; ++m)
            if (!real || consumer.row_of(m, i) >= real_outputs) sums[m][i] = 0.0f;
        }
      }

      const auto at = [&](int column) {  // of a column of the tile, in dvalues
        return ((int64_t(item.slots[column >> p.log_bi]) << p.log_bi) + (column & (bi - 1))) * OUTER;
      };
      if (p.partial != nullptr) {
        float* partial = p.partial + (int64_t(item.split) * view.capacity << p.log_bi) * OUTER;
        DYN_UNROLL
        for (int i = 0; i < WIDTH / 2; ++i) {
          const int column = consumer.column_of(i);
          if (column >> p.log_bi >= item.blocks) continue;
          float* to = partial + at(column);
          DYN_UNROLL
          for (int m = 0; m < OUTER / 64; ++m) to[consumer.row_of(m, i)] = sums[m][i];  // eight lanes: 32 bytes
        }
      } else {
        if (p.values != nullptr) {
          // Sum of weight x gradient: per panel of 64 inputs in this thread, then over the warp, then over the block.
          float weighted[WIDTH / 64] = {};
          DYN_UNROLL
          for (int i = 0; i < WIDTH / 2; ++i) {
            const int column = consumer.column_of(i), b = column >> p.log_bi;
            if (b >= item.blocks || (column & (bi - 1)) >= real_inputs(b)) continue;
            const T* weights = p.values + at(column);
            DYN_UNROLL
            for (int m = 0; m < OUTER / 64; ++m) {
              const int row = consumer.row_of(m, i);
              if (row < real_outputs) weighted[i / 32] += sums[m][i] * to_float(weights[row]);
            }
          }
          auto& warp_sums = Machine::control().warp_sums[consumer.index()];
          DYN_UNROLL
          for (int panel = 0; panel < WIDTH / 64; ++panel) {
            float sum = weighted[panel];
            DYN_UNROLL
            for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
            if (lane() == 0) warp_sums[warp() % 4][panel] = sum;
          }
          consumer.meet();
          const int b = thread() % kWarpgroup;
          if (b < item.blocks) {
            float sum = 0.0f;
            for (int panel = b * bi / 64; panel < (b + 1) * bi / 64; ++panel)
              sum += (warp_sums[0][panel] + warp_sums[1][panel]) + (warp_sums[2][panel] + warp_sums[3][panel]);
            p.wg[item.row * view.columns + item.columns[b]] = sum;
          }
        }
        consumer.store_columns(sums, [&](int column, int row, const Vector16<T>& eight) {
          if (column >> p.log_bi < item.blocks) store16(p.dvalues + at(column) + row, eight);
        });
      }
      consumer.done();
    }
  }
}

}  // namespace dynaprune::cuda::sm90
