// Forward and input gradient of a block-sparse linear layer, for the instruction set of simd.h.
//
// Both are one job: outputs [m, out_size] in blocks of `b_out`, each the sum over a list of (input block, slot).
#pragma once

#include "simd.h"

#include "dot_tile.h"
#include "kernels.h"
#include "microkernel.h"
#include "packing.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

struct Lists {
  int64_t count;          // output blocks
  const int32_t* ptr;     // [count + 1]
  const int32_t* inputs;  // input block of each entry
  const int32_t* slots;
  const int32_t* order;   // most entries first
  const int32_t* used;    // [input blocks + 1]: list pointer of the other direction; an empty list is an unread block
  int64_t in_size, out_size, b_in, b_out;
  int64_t longest() const { return count ? ptr[order[0] + 1] - ptr[order[0]] : 0; }
  int64_t live() const { return ptr[count]; }
};

Lists forward_lists(const LinearShape& s, const LayoutView& v) {
  return {v.rows, v.row_ptr, v.row_cols, v.row_slots, v.row_order, v.col_ptr, s.in, s.out, s.bi, s.bo};
}
Lists dgrad_lists(const LinearShape& s, const LayoutView& v) {
  return {v.columns, v.col_ptr, v.col_rows, v.col_slots, v.col_order, v.row_ptr, s.out, s.in, s.bo, s.bi};
}

// Rows at `x` (blocks of inputs `block_stride` elements apart, rows `ldx`) times one list, into `m` rows of y.
// `values` [entry or slot][b_in][b_out]: `by_entry` says which. Memory from `ahead` on will be read soon: every term asks
// for `lines` cache lines of it. Returns where it stopped asking.
template <class X, class V, class Y>
const char* multiply_list(const Lists& lists, int64_t list, const X* x, int64_t ldx, int64_t block_stride,
                          int64_t m, const V* values, int64_t first_entry, bool by_entry, const typename Num<V>::Acc* bias,
                          Y* y, int64_t ldy, Term<V>* terms, const char* ahead, int64_t lines) {
  constexpr int L = kLanes<V>;
  const int64_t size = lists.b_in * lists.b_out;
  const int64_t begin = lists.ptr[list], count = lists.ptr[list + 1] - begin;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t input = lists.inputs[begin + e];
    const int64_t where = by_entry ? begin + e - first_entry : int64_t(lists.slots[begin + e]);
    terms[e].values = values + where * size;
    terms[e].offset = input * block_stride;
    terms[e].depth = least(lists.b_in, lists.in_size - input * lists.b_in);
  }
  const int64_t out0 = list * lists.b_out;
  const int64_t vectors = divide_up(least(lists.b_out, lists.out_size - out0), L);
  const int64_t width = least(lists.b_out, lists.out_size - out0);
  const int64_t slabs = divide_up(vectors, kMaxVectors);
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t v0 = vectors * slab / slabs, v1 = vectors * (slab + 1) / slabs;
    const int nv = int(v1 - v0);
    const int last = int(least(L, width - (v1 - 1) * L));
    const int64_t o = v0 * L;
    const int64_t tiles = divide_up(m, tile_rows(nv));
    const int64_t tall = divide_up(m, tiles);
    const auto tall_tile = multiply_tile_for<X, V, Y>(int(tall), nv, last != L);
    const auto short_tile =
        m % tiles ? multiply_tile_for<X, V, Y>(int(tall - 1), nv, last != L) : tall_tile;
    const int64_t tall_count = m % tiles ? m % tiles : tiles;
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
      const bool is_tall = t < tall_count;
      (is_tall ? tall_tile : short_tile)(TileRows<X>{x + row * ldx, ldx, ahead, lines}, y + row * ldy + out0 + o, ldy,
                                         terms, count, lists.b_out, o, bias ? bias + out0 + o : nullptr, last);
      row += is_tall ? tall : tall - 1;
      ahead += count * lines * 64;
    }
  }
  return ahead;
}

// Few rows: every list reads the activation where it lies and the values as they are stored.
template <class T>
struct SmallForward {
  Lists lists;
  int64_t m;
  const T* x;
  const T* values;
  const typename Num<T>::Acc* bias;
  T* y;
  Term<T>* terms;  // [workers][longest]
  static void body(void* context, int64_t item, int64_t worker) {
    const SmallForward& c = *static_cast<SmallForward*>(context);
    multiply_list<T, T, T>(c.lists, c.lists.order[item], c.x, c.lists.in_size, c.lists.b_in, c.m, c.values, 0, false,
                           c.bias, c.y, c.lists.out_size, c.terms + worker * c.lists.longest(), nullptr, 0);
  }
};

// Many rows: a panel of rows at a time is cut into blocks of columns (and widened), small enough for the L2 cache.
template <class T>
struct PanelMultiply {
  typedef typename Num<T>::Acc A;
  Lists lists;
  int64_t m;
  const T* x;
  const A* values;
  int64_t first_entry;
  bool by_entry;
  const A* bias;
  T* y;
  int64_t list_begin, list_end;
  int64_t panel_rows, panels;
  int64_t strips;  // runs of panels that one worker takes in order, asking for the next one while it works
  int64_t chunks;  // parts of the lists
  int64_t panel_size;   // elements of one worker's panel
  A* packed;            // [workers][panel_size]
  int64_t* packed_row;  // [workers] first row of the panel that is packed, -1 for none
  Term<A>* terms;       // [workers][longest]

  static void body(void* context, int64_t item, int64_t worker) {
    const PanelMultiply& c = *static_cast<PanelMultiply*>(context);
    const int64_t strip = item % c.strips;
    const int64_t end = c.panels * (strip + 1) / c.strips;
    for (int64_t panel = c.panels * strip / c.strips; panel < end; ++panel)
      c.multiply(panel, item / c.strips, panel + 1 < end, worker);
  }

  void multiply(int64_t panel, int64_t chunk, bool has_next, int64_t worker) const {
    const int64_t row0 = m * panel / panels, row1 = m * (panel + 1) / panels, rows = row1 - row0;
    const int64_t block_stride = panel_rows * lists.b_in + kPanelGap;
    A* cut = packed + worker * panel_size;
    if (packed_row[worker] != row0) {
      pack_blocks(x + row0 * lists.in_size, lists.in_size, lists.in_size, rows, lists.b_in, 0,
                  divide_up(lists.in_size, lists.b_in), lists.used, cut, lists.b_in, block_stride);
      packed_row[worker] = row0;
    }
    const char* ahead = reinterpret_cast<const char*>(x + row1 * lists.in_size);
    const char* ahead_end = ahead + panel_rows * lists.in_size * int64_t(sizeof(T));
    const int64_t tiles = divide_up(rows, tile_rows(int(least(kMaxVectors, divide_up(lists.b_out, kLanes<T>)))));
    const int64_t requests = most(1, (lists.ptr[list_end] - lists.ptr[list_begin]) * tiles);
    const int64_t lines = divide_up((ahead_end - ahead) / 64, requests);
    for (int64_t list = list_begin + chunk; list < list_end; list += chunks)
      ahead = multiply_list<A, A, T>(lists, list, cut, lists.b_in, block_stride, rows, values, first_entry, by_entry,
                                     bias, y + row0 * lists.out_size, lists.out_size, terms + worker * lists.longest(),
                                     ahead, has_next && ahead < ahead_end ? lines : 0);
  }
};

// Copies blocks of values in list order, widened and, for the input gradient, transposed to [outputs][inputs].
template <class T>
struct PrepareValues {
  typedef typename Num<T>::Acc A;
  const int32_t* slots;
  int64_t first_entry;
  int64_t bi, bo;
  bool transpose;
  const T* values;
  A* prepared;
  static void body(void* context, int64_t item, int64_t) {
    const PrepareValues& c = *static_cast<PrepareValues*>(context);
    const int64_t size = c.bi * c.bo;
    const T* from = c.values + int64_t(c.slots[c.first_entry + item]) * size;
    A* to = c.prepared + item * size;
    if (c.transpose)
      transpose_block(from, c.bi, c.bo, to);
    else
      convert_row(from, size, to);
  }
};

// Bytes of prepared values held at a time: below the size from which an allocator maps fresh pages every time.
constexpr int64_t kPreparedBytes = int64_t(24) << 20;
// Bytes of all values that stay in a common L2 cache beside a panel, and of a packed panel.
constexpr int64_t kResidentBytes = int64_t(1280) << 10;
constexpr int64_t kPanelBytes = int64_t(1280) << 10;

template <class T>
void multiply_panels(const Lists& lists, bool transpose, int64_t m, const T* x, const T* values,
                     const typename Num<T>::Acc* bias, T* y, const Workers& workers) {
  typedef typename Num<T>::Acc A;
  const bool prepare = transpose || sizeof(T) != sizeof(A);
  const int64_t size = lists.b_in * lists.b_out;
  const int64_t blocks = divide_up(lists.in_size, lists.b_in);
  const int64_t limit = prepare ? most(lists.longest(), kPreparedBytes / int64_t(sizeof(A)) / size) : lists.live();
  const Scratch prepared(prepare ? least(limit, lists.live()) * size * int64_t(sizeof(A)) : 0);

  PanelMultiply<T> job;
  job.lists = lists;
  job.m = m;
  job.x = x;
  job.bias = bias;
  job.y = y;
  job.by_entry = prepare;
  const int64_t row_bytes = blocks * lists.b_in * int64_t(sizeof(A));
  // Values that stay in the L2 cache from one panel to the next leave room for short panels, whose next rows arrive
  // while they are multiplied; others are read again from memory for every panel, so panels are tall.
  const bool resident = lists.live() * size * int64_t(sizeof(A)) <= kResidentBytes;
  const int64_t wanted = most(12, least(resident ? 24 : 96, kPanelBytes / row_bytes / 12 * 12));
  job.panels = divide_up(m, wanted);
  if (job.panels > 1) job.panels = least(m, round_up(job.panels, workers.count));
  job.panel_rows = divide_up(m, job.panels);
  job.chunks = most(1, least(lists.count, divide_up(2 * workers.count, job.panels)));
  if (job.panels >= workers.count) job.chunks = 1;
  job.strips = workers.count == 1 ? 1 : least(job.panels, 8 * workers.count);
  job.panel_size = round_up((job.panel_rows * lists.b_in + kPanelGap) * blocks, 16);
  const Scratch packed(workers.count * job.panel_size * int64_t(sizeof(A)));
  const Scratch packed_row(workers.count * int64_t(sizeof(int64_t)));
  const Scratch terms(workers.count * lists.longest() * int64_t(sizeof(Term<A>)));
  job.packed = static_cast<A*>(packed.data());
  job.packed_row = static_cast<int64_t*>(packed_row.data());
  job.terms = static_cast<Term<A>*>(terms.data());
  for (int64_t w = 0; w < workers.count; ++w) job.packed_row[w] = -1;

  for (int64_t begin = 0, end; begin < lists.count; begin = end) {
    for (end = begin + 1; end < lists.count && lists.ptr[end + 1] - lists.ptr[begin] <= limit;) ++end;
    const int64_t entries = lists.ptr[end] - lists.ptr[begin];
    if (prepare) {
      PrepareValues<T> preparation{lists.slots,
                                   lists.ptr[begin],
                                   transpose ? lists.b_out : lists.b_in,
                                   transpose ? lists.b_in : lists.b_out,
                                   transpose,
                                   values,
                                   static_cast<A*>(prepared.data())};
      run_items(workers, entries * size > kShareWork, entries, PrepareValues<T>::body, &preparation);
      job.values = static_cast<const A*>(prepared.data());
    } else {
      job.values = reinterpret_cast<const A*>(values);
    }
    job.first_entry = lists.ptr[begin];
    job.list_begin = begin;
    job.list_end = end;
    run_items(workers, m * entries * size > kShareWork, job.strips * job.chunks, PanelMultiply<T>::body, &job);
  }
}

// Few rows of dy: dx = dy W by dot products along the outputs, in which order the values are stored.
template <class T>
struct SmallDgrad {
  Lists lists;
  int64_t m;
  const T* dy;
  const T* values;
  T* dx;
  Term<T>* terms;  // [workers][longest]
  static void body(void* context, int64_t item, int64_t worker) {
    const SmallDgrad& c = *static_cast<SmallDgrad*>(context);
    const Lists& lists = c.lists;
    const int64_t list = lists.order[item], begin = lists.ptr[list], count = lists.ptr[list + 1] - begin;
    Term<T>* terms = c.terms + worker * lists.longest();
    for (int64_t e = 0; e < count; ++e) {
      const int64_t input = lists.inputs[begin + e];
      terms[e].values = c.values + int64_t(lists.slots[begin + e]) * lists.b_in * lists.b_out;
      terms[e].offset = input * lists.b_in;
      terms[e].depth = least(lists.b_in, lists.in_size - terms[e].offset);
    }
    const int64_t out0 = list * lists.b_out, width = least(lists.b_out, lists.out_size - out0);
    for (int64_t i = 0; i < width; i += kDotInputs)
      for (int64_t m = 0; m < c.m; m += kDotRows)
        dot_tile_for<T>(int(least(kDotRows, c.m - m)), int(least(kDotInputs, width - i)))(
            c.dy + m * lists.in_size, lists.in_size, terms, count, i * lists.b_in, lists.b_in,
            c.dx + m * lists.out_size + out0 + i, lists.out_size);
  }
};

// Rows up to which the activation is read where it lies. A dot product ends in a sum over lanes, a panel begins with
// transposing the values: long dot products pay for more rows.
constexpr int64_t kSmallForwardRows = 32;
constexpr int64_t kLongDot = 256;
int64_t small_dgrad_rows(const Lists& lists) {
  return lists.live() * lists.b_in * lists.b_out >= kLongDot * lists.out_size ? 48 : 32;
}

template <class T>
void linear_forward(const LinearShape& shape, const LayoutView& layout, const Workers& workers, const T* x,
                    const T* values, const T* bias, T* y) {
  typedef typename Num<T>::Acc A;
  const Lists lists = forward_lists(shape, layout);
  if (shape.m == 0 || shape.out == 0) return;
  const bool widen_bias = bias && sizeof(T) != sizeof(A);
  const Scratch wide_bias(widen_bias ? shape.out * int64_t(sizeof(A)) : 0);
  const A* used_bias = widen_bias ? static_cast<const A*>(wide_bias.data()) : reinterpret_cast<const A*>(bias);
  if (widen_bias) convert_row(bias, shape.out, static_cast<A*>(wide_bias.data()));
  if (shape.m > kSmallForwardRows) return multiply_panels(lists, false, shape.m, x, values, used_bias, y, workers);
  const Scratch terms(workers.count * lists.longest() * int64_t(sizeof(Term<T>)));
  SmallForward<T> job{lists, shape.m, x, values, used_bias, y, static_cast<Term<T>*>(terms.data())};
  const int64_t work = shape.m * lists.live() * shape.bi * shape.bo;
  run_items(workers, work > kShareWork, lists.count, SmallForward<T>::body, &job);
}

template <class T>
void linear_dgrad(const LinearShape& shape, const LayoutView& layout, const Workers& workers, const T* dy,
                  const T* values, T* dx) {
  const Lists lists = dgrad_lists(shape, layout);
  if (shape.m == 0 || shape.in == 0) return;
  if (shape.m > small_dgrad_rows(lists))
    return multiply_panels<T>(lists, true, shape.m, dy, values, nullptr, dx, workers);
  const Scratch terms(workers.count * lists.longest() * int64_t(sizeof(Term<T>)));
  SmallDgrad<T> job{lists, shape.m, dy, values, dx, static_cast<Term<T>*>(terms.data())};
  const int64_t work = shape.m * lists.live() * shape.bi * shape.bo;
  run_items(workers, work > kShareWork, lists.count, SmallDgrad<T>::body, &job);
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
