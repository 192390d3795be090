// Weight gradient of a block-sparse linear layer at its live blocks, and the probe of those that are not live.
//
// Rows are taken kWgradRows at a time: the chunk's columns of x, packed block by block, stay in the L2 cache, one block
// row of dy in the L1 cache; each block's tiles add the chunk to what the chunks before left, so the order of a sum
// depends on nothing but the number of rows.
#pragma once

#include "simd.h"

#include "kernels.h"
#include "microkernel.h"
#include "packing.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

constexpr int64_t kWgradRows = 64;
constexpr int64_t kWgradPanelBytes = int64_t(512) << 10;

// Where part `part` of `parts` begins among lists, for equal shares of work: a list costs 2 for each of its entries,
// and `panel` for the panel it needs (packing a block of x takes half as long as a multiplication with it).
int64_t boundary(const int32_t* ptr, int64_t lists, int64_t part, int64_t parts, int64_t panel) {
  const int64_t wanted = divide_up((int64_t(ptr[lists]) * 2 + lists * panel) * part, parts);
  int64_t low = 0, high = lists;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(ptr[middle]) * 2 + middle * panel < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return part == parts ? lists : part == 0 ? 0 : low;
}

template <class A>
A sum_of_products(const A* a, const A* b, int64_t n) {
  typename Num<A>::Vec sum = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) sum = load(a + i) * load(b + i) + sum;
  if (i < n) sum = load_partial(a + i, int(n - i)) * load_partial(b + i, int(n - i)) + sum;
  return sum_lanes(sum);
}

// sum of value * gradient over the part of a block that exists.
template <class T, class A>
A value_times_gradient(const T* values, const A* gradient, int64_t bo, int64_t depth, int64_t width) {
  typename Num<A>::Vec sum = {};
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < depth; ++i) {
    int64_t o = 0;
    for (; o + L <= width; o += L) sum = load(values + i * bo + o) * load(gradient + i * bo + o) + sum;
    if (o < width) {
      const int last = int(width - o);
      sum = load_partial(values + i * bo + o, last) * load_partial(gradient + i * bo + o, last) + sum;
    }
  }
  return sum_lanes(sum);
}

template <class T>
struct WeightGradient {
  typedef typename Num<T>::Acc A;
  LinearShape shape;
  LayoutView layout;
  const T* dy;
  const T* x;
  const T* values;  // null without saliency
  A* sums;          // dvalues, or (bfloat16) one block an entry
  bool by_entry;
  T* dvalues;
  A* wg;
  int64_t row_parts, col_parts;
  int64_t dy_rows;          // block rows of dy that are packed together
  int64_t x_size, dy_size;  // elements of a worker's panels
  A* x_panels;
  A* dy_panels;

  int64_t column(int64_t part) const { return boundary(layout.col_ptr, layout.columns, part, col_parts, 1); }

  static void body(void* context, int64_t item, int64_t worker) {
    const WeightGradient& c = *static_cast<WeightGradient*>(context);
    const LinearShape& s = c.shape;
    const LayoutView& v = c.layout;
    const int64_t size = s.bi * s.bo;
    const int64_t r0 = boundary(v.row_ptr, v.rows, item % c.row_parts, c.row_parts, 0);
    const int64_t r1 = boundary(v.row_ptr, v.rows, item % c.row_parts + 1, c.row_parts, 0);
    const int64_t c0 = c.column(item / c.row_parts), c1 = c.column(item / c.row_parts + 1);
    const int64_t dy_stride = round_up(s.bo, kLanes<A>);
    const int64_t x_distance = kWgradRows * s.bi + kPanelGap, dy_distance = kWgradRows * dy_stride + kPanelGap;
    A* xp = c.x_panels + worker * c.x_size;
    A* dyp = c.dy_panels + worker * c.dy_size;
    const int64_t tiles = (v.row_ptr[r1] - v.row_ptr[r0]) / c.col_parts * (s.bi / 8);
    for (int64_t m0 = 0; m0 < s.m; m0 += kWgradRows) {
      const int64_t rows = least(kWgradRows, s.m - m0);
      pack_blocks(c.x + m0 * s.in, s.in, s.in, rows, s.bi, c0, c1, v.col_ptr, xp, s.bi, x_distance);
      const int64_t next_rows = least(kWgradRows, s.m - m0 - rows);
      Ahead x_ahead = rectangle_ahead(c.x, s.in, m0 + rows, next_rows, c0 * s.bi, least(c1 * s.bi, s.in), tiles);
      Ahead dy_ahead = nothing_ahead();
      for (int64_t row = r0; row < r1; ++row) {
        const int64_t group_row = (row - r0) % c.dy_rows;
        if (group_row == 0) {
          const int64_t end = least(row + c.dy_rows, r1);
          pack_blocks(c.dy + m0 * s.out, s.out, s.out, rows, s.bo, row, end, v.row_ptr, dyp, dy_stride, dy_distance);
          const bool last = end == r1;  // the next group is the first one of the next rows
          const int64_t next = last ? r0 : end, next_end = least(next + c.dy_rows, r1);
          dy_ahead = rectangle_ahead(c.dy, s.out, last ? m0 + rows : m0, last ? next_rows : rows, next * s.bo,
                                     least(next_end * s.bo, s.out),
                                     (v.row_ptr[end] - v.row_ptr[row]) / c.col_parts * (s.bi / 8));
        }
        int64_t e = v.row_ptr[row];
        const int64_t end = v.row_ptr[row + 1], width = least(s.bo, s.out - row * s.bo);
        while (e < end && v.row_cols[e] < c0) ++e;
        for (; e < end && v.row_cols[e] < c1; ++e) {
          const int64_t col = v.row_cols[e], slot = v.row_slots[e];
          const int64_t depth = least(s.bi, s.in - col * s.bi);
          A* sum = c.sums + (c.by_entry ? e : slot) * size;
          if (m0 == 0 && (depth < s.bi || width < s.bo)) fill_zero(sum, size);
          outer_block(xp + (col - c0) * x_distance, s.bi, depth, dyp + group_row * dy_distance,
                      dy_stride, width, rows, sum, s.bo, m0 > 0, x_ahead, dy_ahead);
          if (m0 + rows == s.m) {
            if (c.values)
              c.wg[row * v.columns + col] = value_times_gradient(c.values + slot * size, sum, s.bo, depth, width);
            if (c.by_entry) convert_row(sum, size, c.dvalues + slot * size);
          }
        }
      }
    }
  }
};

template <class T>
struct ZeroSlots {
  const unsigned char* listed;
  int64_t size;
  T* dvalues;
  static void body(void* context, int64_t item, int64_t) {
    const ZeroSlots& c = *static_cast<ZeroSlots*>(context);
    if (!c.listed[item]) fill_zero(c.dvalues + item * c.size, c.size);
  }
};

template <class T>
void linear_wgrad(const LinearShape& shape, const LayoutView& layout, const Workers& workers, const T* dy, const T* x,
                  const T* values, T* dvalues, typename Num<T>::Acc* wg) {
  typedef typename Num<T>::Acc A;
  const int64_t size = shape.bi * shape.bo, live = layout.header[0];
  if (wg) fill_zero(wg, layout.rows * layout.columns);
  if (shape.m == 0) {
    fill_zero(dvalues, layout.capacity * size);
    return;
  }
  const Scratch listed(layout.capacity);
  fill_zero(static_cast<unsigned char*>(listed.data()), layout.capacity);
  for (int64_t e = 0; e < live; ++e) static_cast<unsigned char*>(listed.data())[layout.row_slots[e]] = 1;
  ZeroSlots<T> zeros{static_cast<unsigned char*>(listed.data()), size, dvalues};
  run_items(workers, (layout.capacity - live) * size > kShareWork, live < layout.capacity ? layout.capacity : 0,
            ZeroSlots<T>::body, &zeros);
  if (live == 0) return;

  WeightGradient<T> job;
  job.shape = shape;
  job.layout = layout;
  job.dy = dy;
  job.x = x;
  job.values = values;
  job.dvalues = dvalues;
  job.wg = wg;
  job.by_entry = sizeof(T) != sizeof(A);
  const bool share = shape.m * live * size > kShareWork;
  const int64_t parts = share ? workers.count : 1;
  const int64_t most_columns = most(1, kWgradPanelBytes / (kWgradRows * shape.bi * int64_t(sizeof(A))));
  job.col_parts = divide_up(layout.columns, most_columns);
  job.row_parts = divide_up(parts, job.col_parts);
  if (job.row_parts > layout.rows) job.row_parts = layout.rows;
  int64_t widest = 0;
  for (int64_t part = 0; part < job.col_parts; ++part) widest = most(widest, job.column(part + 1) - job.column(part));
  job.x_size = widest * (kWgradRows * shape.bi + kPanelGap);
  const int64_t dy_row_size = kWgradRows * round_up(shape.bo, kLanes<A>) + kPanelGap;
  job.dy_rows = most(1, kWgradPanelBytes / 2 / (dy_row_size * int64_t(sizeof(A))));
  job.dy_size = job.dy_rows * dy_row_size;
  const Scratch sums(job.by_entry ? live * size * int64_t(sizeof(A)) : 0);
  const Scratch x_panels(workers.count * job.x_size * int64_t(sizeof(A)));
  const Scratch dy_panels(workers.count * job.dy_size * int64_t(sizeof(A)));
  job.sums = job.by_entry ? static_cast<A*>(sums.data()) : reinterpret_cast<A*>(dvalues);
  job.x_panels = static_cast<A*>(x_panels.data());
  job.dy_panels = static_cast<A*>(dy_panels.data());
  run_items(workers, share, job.row_parts * job.col_parts, WeightGradient<T>::body, &job);
}

// Squares of R by C groups of blocks at a time; a group's sums live in a worker's scratch and are reduced at the end.
template <class T>
struct GradientProbe {
  typedef typename Num<T>::Acc A;
  LinearShape shape;
  LayoutView layout;
  const T* dy;
  const T* x;
  const unsigned char* live;
  A* squares;
  int64_t side;  // blocks of a group along rows and columns
  int64_t x_size, dy_size, sums_size;
  A* x_panels;
  A* dy_panels;
  A* sums;

  static void body(void* context, int64_t item, int64_t worker) {
    const GradientProbe& c = *static_cast<GradientProbe*>(context);
    const LinearShape& s = c.shape;
    const LayoutView& v = c.layout;
    const int64_t size = s.bi * s.bo, groups = divide_up(v.columns, c.side);
    const int64_t r0 = item / groups * c.side, r1 = least(v.rows, r0 + c.side);
    const int64_t c0 = item % groups * c.side, c1 = least(v.columns, c0 + c.side);
    const int64_t dy_stride = round_up(s.bo, kLanes<A>);
    const int64_t x_distance = kWgradRows * s.bi + kPanelGap, dy_distance = kWgradRows * dy_stride + kPanelGap;
    A* xp = c.x_panels + worker * c.x_size;
    A* dyp = c.dy_panels + worker * c.dy_size;
    A* sums = c.sums + worker * c.sums_size;
    fill_zero(sums, c.sums_size);
    Ahead x_ahead = nothing_ahead(), dy_ahead = nothing_ahead();
    for (int64_t m0 = 0; m0 < s.m; m0 += kWgradRows) {
      const int64_t rows = least(kWgradRows, s.m - m0);
      pack_blocks(c.x + m0 * s.in, s.in, s.in, rows, s.bi, c0, c1, nullptr, xp, s.bi,
                  x_distance);
      pack_blocks(c.dy + m0 * s.out, s.out, s.out, rows, s.bo, r0, r1, nullptr, dyp, dy_stride,
                  dy_distance);
      for (int64_t row = r0; row < r1; ++row) {
        const int64_t width = least(s.bo, s.out - row * s.bo);
        for (int64_t col = c0; col < c1; ++col)
          if (!c.live[row * v.columns + col])
            outer_block(xp + (col - c0) * x_distance, s.bi, least(s.bi, s.in - col * s.bi),
                        dyp + (row - r0) * dy_distance, dy_stride, width, rows,
                        sums + ((row - r0) * c.side + col - c0) * size, s.bo, m0 > 0, x_ahead, dy_ahead);
      }
    }
    for (int64_t row = r0; row < r1; ++row)
      for (int64_t col = c0; col < c1; ++col) {
        const A* sum = sums + ((row - r0) * c.side + col - c0) * size;
        c.squares[row * v.columns + col] =
            c.live[row * v.columns + col] || s.m == 0 ? A(0) : sum_of_products(sum, sum, size);
      }
  }
};

template <class T>
void linear_probe(const LinearShape& shape, const LayoutView& layout, const Workers& workers, const T* dy, const T* x,
                  typename Num<T>::Acc* squares) {
  typedef typename Num<T>::Acc A;
  const int64_t blocks = layout.rows * layout.columns;
  const Scratch live(blocks);
  unsigned char* flags = static_cast<unsigned char*>(live.data());
  fill_zero(flags, blocks);
  for (int64_t row = 0; row < layout.rows; ++row)
    for (int64_t e = layout.row_ptr[row]; e < layout.row_ptr[row + 1]; ++e)
      flags[row * layout.columns + layout.row_cols[e]] = 1;

  GradientProbe<T> job;
  job.shape = shape;
  job.layout = layout;
  job.dy = dy;
  job.x = x;
  job.live = flags;
  job.squares = squares;
  job.side = most(1, 256 / most(shape.bi, shape.bo));
  job.x_size = job.side * (kWgradRows * shape.bi + kPanelGap);
  job.dy_size = job.side * (kWgradRows * round_up(shape.bo, kLanes<A>) + kPanelGap);
  job.sums_size = job.side * job.side * shape.bi * shape.bo;
  const Scratch x_panels(workers.count * job.x_size * int64_t(sizeof(A)));
  const Scratch dy_panels(workers.count * job.dy_size * int64_t(sizeof(A)));
  const Scratch sums(workers.count * job.sums_size * int64_t(sizeof(A)));
  job.x_panels = static_cast<A*>(x_panels.data());
  job.dy_panels = static_cast<A*>(dy_panels.data());
  job.sums = static_cast<A*>(sums.data());
  const int64_t work = shape.m * (blocks - layout.header[0]) * shape.bi * shape.bo;
  run_items(workers, work > kShareWork, divide_up(layout.rows, job.side) * divide_up(layout.columns, job.side),
            GradientProbe<T>::body, &job);
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
