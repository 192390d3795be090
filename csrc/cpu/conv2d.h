// The convolution entry points of one instruction set. Include after simd.h.
#pragma once

#include "conv2d_gather.h"
#include "conv2d_tables.h"
#include "conv2d_wgrad.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

template <class T>
void conv2d_forward(const ConvShape& s, const LayoutView& v, const Workers& workers, const T* x, const T* values,
                    const T* bias, T* y) {
  typedef typename Num<T>::Acc A;
  const Grid grid = grid_of(s);
  const int64_t live = v.row_ptr[v.rows];
  const int64_t lists = s.groups * grid.channel_blocks * grid.phases;
  const int64_t pieces = divide_up(s.bi, plane_width(s.bi));

  Gather<T> g;
  Carver carver = {nullptr, 0};
  uint8_t* used = nullptr;
  int64_t* lookup = nullptr;
  ColumnPlace* columns = nullptr;
  TargetRow* rows = nullptr;
  GatherTerm<A>* terms = nullptr;
  A* start = nullptr;
  g.start_stride = round_up(s.bo, kLanes<T>);
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) carver = {static_cast<char*>(conv_scratch(kTables, carver.used)), 0};
    used = carver.take<uint8_t>(lists);
    lookup = carver.take<int64_t>(lists);
    columns = carver.take<ColumnPlace>(v.columns);
    g.set.planes = carver.take<Plane>(lists * pieces);
    rows = carver.take<TargetRow>(v.rows);
    terms = carver.take<GatherTerm<A>>(live * pieces);
    start = carver.take<A>(v.rows * g.start_stride);
  }

  place_columns(s, grid, columns);
  memset(used, 0, size_t(lists));
  for (int64_t row = 0; row < v.rows; ++row) {
    const int64_t list = first_list(s, grid, v.rows, row);
    for (int64_t e = v.row_ptr[row]; e < v.row_ptr[row + 1]; ++e) used[list + columns[v.row_cols[e]].list] = 1;
  }
  plan_input_planes(s, grid, used, g.set, lookup);
  g.images = s.images;
  g.virtual_rows = s.out_h;
  g.extra_rows = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
  plan_chunks(g, workers);

  const A* panels = nullptr;
  Panels<T> job = {values, v.row_slots, live, s.bi, s.bo, s.bo, false, nullptr};
  if constexpr (sizeof(T) == sizeof(A)) {
    if (s.bo % kLanes<T> != 0) panels = run_panels(job, workers);
  } else {
    panels = run_panels(job, workers);
  }
  g.values_stride = job.stride;

  int64_t term = 0;
  for (int64_t row = 0; row < v.rows; ++row) {
    const int64_t list = first_list(s, grid, v.rows, row);
    rows[row] = {term, term, 0, row * s.bo, least(s.bo, s.out - row * s.bo)};
    for (int64_t e = v.row_ptr[row]; e < v.row_ptr[row + 1]; ++e) {
      const ColumnPlace& p = columns[v.row_cols[e]];
      const A* block = panels + e * s.bi * job.stride;
      if constexpr (sizeof(T) == sizeof(A)) {
        if (panels == nullptr) block = values + v.row_slots[e] * s.bi * s.bo;
      }
      int64_t offset =
          lookup[list + p.list] * g.set.plane_size() + (p.row * g.set.cols + p.col) * g.set.width;
      for (int64_t i = 0; i < p.inputs; i += g.set.width, offset += g.set.plane_size())
        terms[term++] = {block + i * job.stride, offset, least(g.set.width, p.inputs - i)};
    }
    rows[row].end = term;
    for (int64_t o = 0; o < g.start_stride; ++o) {
      const bool real = bias != nullptr && o < rows[row].channels;
      start[row * g.start_stride + o] = real ? widen(bias[row * s.bo + o]) : A(0);
    }
  }

  const TargetPhase phase = {0, s.out_h, 0, s.out_w, 0, 0};
  g.source = x;
  g.target = y;
  g.rows = rows;
  g.row_count = v.rows;
  g.terms = terms;
  g.start = start;
  g.phases = &phase;
  g.phase_count = 1;
  g.target_channels = s.out;
  g.target_rows = s.out_h;
  g.target_cols = s.out_w;
  g.channels_last = s.y_channels_last;
  g.row_step = g.col_step = 1;
  run_gather(g, s.out_w, workers);
}

template <class T>
void conv2d_dgrad(const ConvShape& s, const LayoutView& v, const Workers& workers, const T* dy, const T* values,
                  T* dx) {
  typedef typename Num<T>::Acc A;
  const Grid grid = grid_of(s);
  const int64_t live = v.row_ptr[v.rows];
  const int64_t pieces = divide_up(s.bo, plane_width(s.bo));

  Gather<T> g;
  Carver carver = {nullptr, 0};
  uint8_t* used = nullptr;
  int64_t* lookup = nullptr;
  ColumnPlace* columns = nullptr;
  TargetRow* rows = nullptr;
  GatherTerm<A>* terms = nullptr;
  TargetPhase* phases = nullptr;
  A* start = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) carver = {static_cast<char*>(conv_scratch(kTables, carver.used)), 0};
    used = carver.take<uint8_t>(v.rows);
    lookup = carver.take<int64_t>(v.rows);
    columns = carver.take<ColumnPlace>(v.columns);
    g.set.planes = carver.take<Plane>(v.rows * pieces);
    rows = carver.take<TargetRow>(v.lists);
    terms = carver.take<GatherTerm<A>>(live * pieces);
    phases = carver.take<TargetPhase>(grid.phases);
    start = carver.take<A>(round_up(s.bi, kLanes<T>));
  }

  // Input pixel i * stride + phase - padding gets its tap r from output i - (r * dilation - phase) / stride.
  const int64_t reach_rows = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
  const int64_t reach_cols = (s.kernel_w - 1) * s.dilation_w / s.stride_w;
  g.images = s.images;
  g.virtual_rows = (s.height - 1 + s.padding_h) / s.stride_h + 1;
  const int64_t virtual_cols = (s.width - 1 + s.padding_w) / s.stride_w + 1;
  g.extra_rows = reach_rows;
  g.set.count = 0;
  g.set.width = plane_width(s.bo);
  g.set.cols = virtual_cols + reach_cols;
  g.set.row_step = g.set.col_step = 1;
  g.set.channels = s.out;
  g.set.image_rows = s.out_h;
  g.set.image_cols = s.out_w;
  g.set.channels_last = s.y_channels_last;
  place_columns(s, grid, columns);
  for (int64_t row = 0; row < v.rows; ++row) used[row] = v.row_ptr[row + 1] > v.row_ptr[row];
  for (int64_t row = 0; row < v.rows; ++row)
    if (used[row])
      lookup[row] =
          add_planes(g.set, row * s.bo, least(s.bo, s.out - row * s.bo), -reach_rows, -reach_cols);
  plan_chunks(g, workers);

  Panels<T> job = {values, v.col_slots, live, s.bi, s.bo, s.bi, true, nullptr};
  const A* panels = run_panels(job, workers);
  g.values_stride = job.stride;

  int64_t term = 0;
  for (int64_t list = 0; list < v.lists; ++list) {
    const int64_t block = list / grid.phases % grid.channel_blocks, group = list / grid.phases / grid.channel_blocks;
    rows[list] = {term, term, list % grid.phases, group * grid.group_in + block * s.bi,
                  least(s.bi, grid.group_in - block * s.bi)};
    for (int64_t e = v.col_ptr[list]; e < v.col_ptr[list + 1]; ++e) {
      const int64_t row = v.col_rows[e], outputs = least(s.bo, s.out - row * s.bo);
      const ColumnPlace& p = columns[v.col_cols[e]];
      int64_t offset = lookup[row] * g.set.plane_size() +
                       ((reach_rows - p.row) * g.set.cols + reach_cols - p.col) * g.set.width;
      for (int64_t o = 0; o < outputs; o += g.set.width, offset += g.set.plane_size())
        terms[term++] = {panels + (e * s.bo + o) * job.stride, offset, least(g.set.width, outputs - o)};
    }
    rows[list].end = term;
  }
  for (int64_t phase = 0; phase < grid.phases; ++phase) {
    const int64_t row0 = phase / s.stride_w - s.padding_h, col0 = phase % s.stride_w - s.padding_w;
    phases[phase] = {divide_up(most(0, -row0), s.stride_h), floor_div(s.height - 1 - row0, s.stride_h) + 1,
                     divide_up(most(0, -col0), s.stride_w), floor_div(s.width - 1 - col0, s.stride_w) + 1,
                     row0, col0};
  }
  for (int64_t i = 0; i < round_up(s.bi, kLanes<T>); ++i) start[i] = 0;

  g.source = dy;
  g.target = dx;
  g.rows = rows;
  g.row_count = v.lists;
  g.terms = terms;
  g.start = start;
  g.start_stride = 0;
  g.phases = phases;
  g.phase_count = grid.phases;
  g.target_channels = s.in;
  g.target_rows = s.height;
  g.target_cols = s.width;
  g.channels_last = s.x_channels_last;
  g.row_step = s.stride_h;
  g.col_step = s.stride_w;
  run_gather(g, virtual_cols, workers);
}

// dvalues given: gradients of live blocks, with their saliency if block_sums is given too. dvalues null: squared
// norms of the gradient at blocks that are not live.
template <class T>
void conv2d_wgrad(const ConvShape& s, const LayoutView& v, const Workers& workers, const T* dy, const T* x,
                  const T* values, T* dvalues, typename Num<T>::Acc* block_sums) {
  typedef typename Num<T>::Acc A;
  const Grid grid = grid_of(s);
  const int64_t lists = s.groups * grid.channel_blocks * grid.phases;
  const int64_t live = v.row_ptr[v.rows];
  const bool probe = dvalues == nullptr;

  Outer<T> g;
  Carver carver = {nullptr, 0};
  uint8_t *used = nullptr, *used_rows = nullptr, *listed = nullptr, *live_in_row = nullptr;
  int64_t *lookup = nullptr, *row_lookup = nullptr;
  ColumnPlace* columns = nullptr;
  OuterTerm* terms = nullptr;
  const int64_t most_terms = probe ? v.rows * v.columns - live : live;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) carver = {static_cast<char*>(conv_scratch(kTables, carver.used)), 0};
    used = carver.take<uint8_t>(lists);
    used_rows = carver.take<uint8_t>(v.rows);
    listed = carver.take<uint8_t>(v.capacity);
    live_in_row = carver.take<uint8_t>(v.columns);
    lookup = carver.take<int64_t>(lists);
    row_lookup = carver.take<int64_t>(v.rows);
    columns = carver.take<ColumnPlace>(v.columns);
    g.x_set.planes = carver.take<Plane>(lists * divide_up(s.bi, plane_width(s.bi)));
    g.dy_set.planes = carver.take<Plane>(v.rows);
    terms = carver.take<OuterTerm>(most_terms);
  }
  memset(used, 0, size_t(lists));
  memset(listed, 0, size_t(v.capacity));
  if (block_sums != nullptr) memset(block_sums, 0, size_t(v.rows * v.columns) * sizeof(A));

  // x_plane holds the list, x_place the column and dy_plane the block row until the planes are planned.
  place_columns(s, grid, columns);
  int64_t count = 0;
  for (int64_t row = 0; row < v.rows; ++row) {
    const int64_t outputs = least(s.bo, s.out - row * s.bo), list = first_list(s, grid, v.rows, row);
    const int64_t before = count;
    if (probe) {
      memset(live_in_row, 0, size_t(v.columns));
      for (int64_t e = v.row_ptr[row]; e < v.row_ptr[row + 1]; ++e) live_in_row[v.row_cols[e]] = 1;
      for (int64_t column = 0; column < v.columns; ++column)
        if (!live_in_row[column]) terms[count++] = {0, column, row, 0, outputs, row * v.columns + column, -1};
    } else {
      for (int64_t e = v.row_ptr[row]; e < v.row_ptr[row + 1]; ++e) {
        const int64_t column = v.row_cols[e];
        terms[count++] = {0, column, row, 0, outputs, row * v.columns + column, v.row_slots[e]};
        listed[v.row_slots[e]] = 1;
      }
    }
    used_rows[row] = count > before;
    for (int64_t t = before; t < count; ++t) {
      terms[t].x_plane = list + columns[terms[t].x_place].list;
      used[terms[t].x_plane] = 1;
    }
  }
  if (!probe)
    for (int64_t slot = 0; slot < v.capacity; ++slot)
      if (!listed[slot]) memset(dvalues + slot * s.bi * s.bo, 0, size_t(s.bi * s.bo) * sizeof(T));

  plan_input_planes(s, grid, used, g.x_set, lookup);
  g.dy_set.count = 0;
  g.dy_set.width = round_up(s.bo, kLanes<T>);
  g.dy_set.cols = s.out_w;
  g.dy_set.row_step = g.dy_set.col_step = 1;
  g.dy_set.channels = s.out;
  g.dy_set.image_rows = s.out_h;
  g.dy_set.image_cols = s.out_w;
  g.dy_set.channels_last = s.y_channels_last;
  for (int64_t row = 0; row < v.rows; ++row)
    if (used_rows[row])
      row_lookup[row] = add_planes(g.dy_set, row * s.bo, least(s.bo, s.out - row * s.bo), 0, 0);

  g.images = s.images;
  g.out_rows = s.out_h;
  g.out_cols = s.out_w;
  g.extra_rows = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
  g.term_count = count;
  g.bi = s.bi;
  g.bo = s.bo;
  g.sum_rows = round_up(s.bi, g.x_set.width);
  g.sum_cols = g.dy_set.width;
  plan_chunks(g);
  for (int64_t t = 0; t < count; ++t) {
    const ColumnPlace& p = columns[terms[t].x_place];
    terms[t].x_plane = lookup[terms[t].x_plane];
    terms[t].x_place = (p.row * g.x_set.cols + p.col) * g.x_set.width;
    terms[t].dy_plane = row_lookup[terms[t].dy_plane];
    terms[t].inputs = p.inputs;
  }

  g.x = x;
  g.dy = dy;
  g.values = values;
  g.dvalues = dvalues;
  g.block_sums = block_sums;
  g.terms = terms;
  run_outer(g, workers);
}

template <class T>
void conv2d_probe(const ConvShape& s, const LayoutView& v, const Workers& workers, const T* dy, const T* x,
                  typename Num<T>::Acc* squares) {
  conv2d_wgrad<T>(s, v, workers, dy, x, nullptr, nullptr, squares);
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
