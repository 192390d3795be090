// The second pass of a sum over tokens or pixels that was cut into parts: adds the parts in a fixed order.
#pragma once

#include "core/problem.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

struct SplitSums {
  const float* partial;  // [splits, capacity, bi, bo]
  int splits;
  int bi, bo;
  int channel_blocks;             // block columns of one tap; of a linear layer all of them
  int64_t inner_size, outer_size;  // real inputs (of a group) and outputs
};

// One thread block per listed block; with `values`, wg gets its sum of weight x gradient. Static: the files that use it
// are compiled for different architectures, and before CUDA 13 the linker would take one file's kernel for all.
template <class T>
static DYN_GLOBAL void DYN_LAUNCH_BOUNDS(128, 1)
    sum_splits_kernel(LayoutView view, SplitSums sums, const T* values, T* dvalues, float* wg) {
  struct alignas(4 * sizeof(T)) Four {
    T element[4];
  };
  const int entry = block();
  if (!is_entry(view, entry)) return;
  const int listed = view.row_slots[entry], column = view.row_cols[entry];
  if (!is_slot(listed, view.capacity) || !is_column(column, view.columns)) return;
  const int at = view.block_of_slot[listed];
  if (!is_block(at, view)) return;
  const int64_t slot = listed, row = at / view.columns;
  const int elements = sums.bi * sums.bo;
  float weighted = 0.0f;
  for (int e = thread() * 4; e < elements; e += threads() * 4) {
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int split = 0; split < sums.splits; ++split) {
      const auto part = load16(sums.partial + (split * view.capacity + slot) * elements + e);
      for (int i = 0; i < 4; ++i) total[i] += part.element[i];
    }
    Four rounded;
    for (int i = 0; i < 4; ++i) rounded.element[i] = from_float<T>(total[i]);
    *reinterpret_cast<Four*>(dvalues + slot * elements + e) = rounded;
    if (values == nullptr || column % sums.channel_blocks * sums.bi + e / sums.bo >= sums.inner_size) continue;
    const Four weight = *reinterpret_cast<const Four*>(values + slot * elements + e);
    for (int i = 0; i < 4; ++i)  // the weight's padding may hold anything
      if (row * sums.bo + e % sums.bo + i < sums.outer_size) weighted += total[i] * to_float(weight.element[i]);
  }
  if (values == nullptr) return;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) weighted += shuffle_xor(weighted, mask);
  float* warps = reinterpret_cast<float*>(shared_memory());
  if (lane() == 0) warps[warp()] = weighted;
  sync_block();
  if (thread() == 0) wg[row * view.columns + column] = (warps[0] + warps[1]) + (warps[2] + warps[3]);
}

template <class T>
cudaError_t sum_splits(const Target& target, const LayoutView& view, const SplitSums& sums, const T* values, T* dvalues,
                       float* wg) {
  return launch(sum_splits_kernel<T>, {unsigned(view.capacity)}, 128, 16, target.stream, view, sums, values, dvalues,
                wg);
}

}  // namespace dynaprune::cuda
