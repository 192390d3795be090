// Block saliency: one pass over values and gradient. Include after simd.h.
#pragma once

#include "packing.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

template <class A>
struct BlockSums {
  typename Num<A>::Vec w2, g2, absolute, signed_sum;
};

template <class A>
DYNAPRUNE_INLINE typename Num<A>::Vec add_saliency(BlockSums<A>& sums, typename Num<A>::Vec w,
                                                   typename Num<A>::Vec g) {
  const typename Num<A>::Vec wg = w * g;
  sums.w2 = w * w + sums.w2;
  sums.g2 = g * g + sums.g2;
  sums.absolute = absolute(wg) + sums.absolute;
  sums.signed_sum = wg + sums.signed_sum;
  return wg;
}

template <class T>
struct Saliency {
  typedef typename Num<T>::Acc A;
  int64_t bi, bo;
  LayoutView layout;
  const T* values;
  const T* grad;
  A* stats;
  A* neuron;
  static void body(void* context, int64_t row, int64_t) {
    const Saliency& c = *static_cast<Saliency*>(context);
    typedef typename Num<A>::Vec Vec;
    constexpr int L = kLanes<A>;
    const LayoutView& v = c.layout;
    const int64_t blocks = v.rows * v.columns;
    A* neuron = c.neuron + row * c.bo;
    fill_zero(neuron, c.bo);
    for (int64_t k = 0; k < 4; ++k) fill_zero(c.stats + k * blocks + row * v.columns, v.columns);
    for (int64_t e = v.row_ptr[row]; e < v.row_ptr[row + 1]; ++e) {
      const T* w = c.values + int64_t(v.row_slots[e]) * c.bi * c.bo;
      const T* g = c.grad + int64_t(v.row_slots[e]) * c.bi * c.bo;
      BlockSums<A> sums = {Vec{}, Vec{}, Vec{}, Vec{}};
      int64_t o = 0;
      for (; o + L <= c.bo; o += L) {
        Vec outputs = load(neuron + o);
        for (int64_t i = 0; i < c.bi; ++i)
          outputs = outputs + add_saliency<A>(sums, load(w + i * c.bo + o), load(g + i * c.bo + o));
        store(neuron + o, outputs);
      }
      if (o < c.bo) {
        const int last = int(c.bo - o);
        Vec outputs = load_partial(neuron + o, last);
        for (int64_t i = 0; i < c.bi; ++i)
          outputs = outputs + add_saliency<A>(sums, load_partial(w + i * c.bo + o, last),
                                              load_partial(g + i * c.bo + o, last));
        store_partial(neuron + o, outputs, last);
      }
      A* stats = c.stats + row * v.columns + v.row_cols[e];
      stats[0] = sum_lanes(sums.w2);
      stats[blocks] = sum_lanes(sums.g2);
      stats[2 * blocks] = sum_lanes(sums.absolute);
      stats[3 * blocks] = sum_lanes(sums.signed_sum);
    }
  }
};

template <class T>
void block_saliency(int64_t bi, int64_t bo, const LayoutView& layout, const Workers& workers, const T* values,
                    const T* grad, typename Num<T>::Acc* stats, typename Num<T>::Acc* neuron) {
  Saliency<T> job{bi, bo, layout, values, grad, stats, neuron};
  run_items(workers, layout.header[0] * bi * bo > kShareWork, layout.rows, Saliency<T>::body, &job);
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
