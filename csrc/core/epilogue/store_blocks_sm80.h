// Where wgrad writes the gradients of a chunk of live blocks, and their saliency.
#pragma once

#include "core/epilogue/block_sums_sm80.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

// Where gradients of blocks go. With `partial` (float, [capacity, bi, bo] of this split) there only.
template <class T>
struct GradientOutput {
  float* partial;
  T* dvalues;
  const T* values;  // null: no saliency
  float* wg;        // [rows * columns]
};

// Writes the blocks of a chunk, each 1 << log_bi inputs high, exact zeros in their padding: beyond rows.real() inputs
// or `real_outputs` outputs.
template <class Tile, class Rows>
DYN_DEVICE void store_blocks(const typename Tile::Sums& sums, const Rows& rows, const LayoutView& view, Chunk chunk,
                             int log_bi, int real_outputs, const GradientOutput<typename Tile::Element>& out,
                             unsigned char* shared) {
  using T = typename Tile::Element;
  const bool salient = out.partial == nullptr && out.values != nullptr;
  float weighted[Tile::kM][Tile::kN / 2];
  DYN_UNROLL
  for (int i = 0; i < Tile::kM; ++i) {
    DYN_UNROLL
    for (int j = 0; j < Tile::kN / 2; ++j) weighted[i][j] = 0.0f;
    const int entry = chunk.begin + ((Tile::first_m() + 16 * i) >> log_bi);
    if (entry >= chunk.end) continue;
    const int slot = view.row_slots[entry];
    const auto place = rows.entry(entry);
    if (!is_slot(slot, view.capacity) || !rows.exists(place)) continue;
    const int64_t block = int64_t(slot) * Tile::kOutputs << log_bi;
    const int real_inputs = rows.real(place);
    DYN_UNROLL
    for (int j = 0; j < Tile::kN; ++j)
      DYN_UNROLL
      for (int e = 0; e < 4; e += 2) {
        const int m = Tile::m(i, e) & ((1 << log_bi) - 1), n = Tile::n(j);
        const bool real[2] = {m < real_inputs && n < real_outputs, m < real_inputs && n + 1 < real_outputs};
        const float sum[2] = {real[0] ? sums[i][j][e] : 0.0f, real[1] ? sums[i][j][e + 1] : 0.0f};
        const int64_t at = block + m * Tile::kOutputs + n;
        if (out.partial != nullptr) {
          *reinterpret_cast<Pair<float>*>(out.partial + at) = {{sum[0], sum[1]}};
          continue;
        }
        *reinterpret_cast<Pair<T>*>(out.dvalues + at) = {{from_float<T>(sum[0]), from_float<T>(sum[1])}};
        if (!salient) continue;
        const Pair<T> weight = *reinterpret_cast<const Pair<T>*>(out.values + at);
        DYN_UNROLL
        for (int p = 0; p < 2; ++p)  // the weight's padding may hold anything
          if (real[p]) weighted[i][j / 2] += sum[p] * to_float(weight.element[p]);
      }
  }
  if (!salient) return;
  float* cells = reinterpret_cast<float*>(shared);
  sync_block();  // the operands have been read
  store_cells<Tile>(weighted, cells);
  sync_block();
  const int entry = chunk.begin + thread(), height = (1 << log_bi) / 16;
  if (entry >= chunk.end) return;
  const int column = view.row_cols[entry];
  if (is_column(column, view.columns))
    out.wg[chunk.row * view.columns + column] =
        sum_of_cells<Tile>(cells, thread() * height, height, 0, Tile::kOutputs / 16);
}

}  // namespace dynaprune::cuda
