// Block saliency: per block and per neuron sums over values and gradient, one read of each.
//
// Two kernels. The first gives every live block to a group of threads and leaves its sums in the workspace, by entry of
// the row lists; the second adds up the blocks of a row in the order of the list. Every sum has one order.
#pragma once

#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda {

constexpr int kStatistics = 4;             // sum w^2, sum g^2, sum |w g|, sum w g
constexpr int kLargestBlockOutputs = 128;  // bo
constexpr int kSaliencyThreads = 256;

// The first kernel's results, by entry.
struct EntrySums {
  float* statistics;  // [capacity, 4]
  float* outputs;     // [capacity, bo]: sum over inputs of w g
};

// Sum over the lanes whose number has the same remainder by `stride`, a power of two; all of them get it.
DYN_DEVICE float sum_lanes(float value, int stride) {
  for (int mask = stride; mask < kWarp; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

// WARPS warps for each entry: 1 where blocks are small, all of the thread block where they are large.
// A thread holds one vector of E outputs and walks down the inputs: V = bo / E vectors side by side, V <= 32.
template <class T, int WARPS>
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kSaliencyThreads, 2)
    block_saliency_kernel(const T* __restrict__ values,    // [capacity, bi, bo]
                          const T* __restrict__ gradient,  // [capacity, bi, bo]
                          LayoutView view, int bi, int bo, EntrySums sums) {
  constexpr int E = Vector16<T>::kSize, kGroup = WARPS * kWarp, kEntries = kSaliencyThreads / kGroup;
  const int64_t entry = int64_t(block()) * kEntries + thread() / kGroup;
  if (!is_entry(view, entry)) return;  // whole warps, and with WARPS > 1 the whole thread block
  const int member = thread() % kGroup, vectors = bo / E;
  const int column = member % vectors * E;
  const int slot = view.row_slots[entry];
  const bool exists = is_slot(slot, view.capacity);  // otherwise its sums are 0
  const int64_t base = int64_t(exists ? slot : 0) * bi * bo + column;
  float outputs[E] = {}, w2 = 0.0f, g2 = 0.0f, absolute = 0.0f;
#pragma unroll 4
  for (int row = exists ? member / vectors : bi; row < bi; row += kGroup / vectors) {
    const Vector16<T> w = load16(values + base + row * bo), g = load16(gradient + base + row * bo);
    DYN_UNROLL
    for (int e = 0; e < E; ++e) {
      const float a = to_float(w.element[e]), b = to_float(g.element[e]), wg = a * b;
      w2 += a * a;
      g2 += b * b;
      absolute += wg < 0.0f ? -wg : wg;
      outputs[e] += wg;
    }
  }
  float signed_sum = 0.0f;
  DYN_UNROLL
  for (int e = 0; e < E; ++e) {
    signed_sum += outputs[e];
    outputs[e] = sum_lanes(outputs[e], vectors);
  }
  const float statistics[kStatistics] = {sum_lanes(w2, 1), sum_lanes(g2, 1), sum_lanes(absolute, 1),
                                         sum_lanes(signed_sum, 1)};
  float* to_outputs = sums.outputs + entry * bo;
  float* to_statistics = sums.statistics + entry * kStatistics;
  if constexpr (WARPS == 1) {
    if (lane() < vectors) {
      DYN_UNROLL
      for (int e = 0; e < E; ++e) to_outputs[column + e] = outputs[e];
    }
    if (lane() == 0) {
      DYN_UNROLL
      for (int k = 0; k < kStatistics; ++k) to_statistics[k] = statistics[k];
    }
  } else {
    float* by_warp = reinterpret_cast<float*>(shared_memory());  // [WARPS, bo + 4]
    const int width = bo + kStatistics;
    if (lane() < vectors) {
      DYN_UNROLL
      for (int e = 0; e < E; ++e) by_warp[warp() * width + column + e] = outputs[e];
    }
    if (lane() == 0) {
      DYN_UNROLL
      for (int k = 0; k < kStatistics; ++k) by_warp[warp() * width + bo + k] = statistics[k];
    }
    sync_block();
    if (thread() < width) {
      float total = 0.0f;
      DYN_UNROLL
      for (int w = 0; w < WARPS; ++w) total += by_warp[w * width + thread()];
      if (thread() < bo)
        to_outputs[thread()] = total;
      else
        to_statistics[thread() - bo] = total;
    }
  }
}

// One thread block for each block row: statistics of all its blocks, zeros where they are not listed, and its neurons.
DYN_GLOBAL void DYN_LAUNCH_BOUNDS(kSaliencyThreads, 2)
    neuron_saliency_kernel(LayoutView view, int bo, EntrySums sums,
                           float* stats,     // [4, rows * columns]
                           float* neuron) {  // [rows * bo]
  const int64_t row = block(), blocks = view.rows * view.columns;
  const auto [begin, end] = entries_of(view, view.row_ptr, row);
  for (int64_t column = thread(); column < view.columns; column += kSaliencyThreads)
    for (int k = 0; k < kStatistics; ++k) stats[k * blocks + row * view.columns + column] = 0.0f;
  // Thread t adds up output t % bo of every (kSaliencyThreads / bo)-th entry.
  const int output = thread() % bo, part = thread() / bo, parts = kSaliencyThreads / bo;
  float total = 0.0f;
#pragma unroll 4
  for (int64_t entry = begin + part; entry < end; entry += parts) total += sums.outputs[entry * bo + output];
  float* by_part = reinterpret_cast<float*>(shared_memory());  // [parts, bo]
  by_part[thread()] = total;
  sync_block();  // orders the zeros above before the statistics below, too
  for (int64_t entry = begin + thread(); entry < end; entry += kSaliencyThreads) {
    const int column = view.row_cols[entry];
    if (!is_column(column, view.columns)) continue;
    for (int k = 0; k < kStatistics; ++k)
      stats[k * blocks + row * view.columns + column] = sums.statistics[entry * kStatistics + k];
  }
  if (thread() < bo) {
    total = 0.0f;
    for (int p = 0; p < parts; ++p) total += by_part[p * bo + thread()];
    neuron[row * bo + thread()] = total;
  }
}

}  // namespace dynaprune::cuda
