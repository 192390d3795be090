// Forward and input gradient: every target pixel gathers over the live blocks of its row. Include after simd.h.
//
// Both are one loop nest. A target row (a block row of outputs; or a column list, that is a channel block at one
// stride phase) has a list of terms (plane, offset of the tap, values). A tile of kGroup neighbouring pixels times up
// to seven groups times one or two vectors of channels stays in registers across all terms of the row.
#pragma once

#include "conv2d_planes.h"
#include "conv2d_tile.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

constexpr int kTilesTogether = 4;  // that turn their sums into contiguous memory together

struct TargetRow {
  int64_t begin, end;         // terms
  int64_t phase;
  int64_t channel, channels;  // in the target tensor
};

// The target pixels that share their lists: rows [row, row_end) by columns [col, col_end) of the virtual grid, found
// in the target tensor at (i * row_step + row0, j * col_step + col0).
struct TargetPhase {
  int64_t row, row_end, col, col_end, row0, col0;
};

// Everything the parallel parts of one call share.
template <class T>
struct Gather {
  typedef typename Num<T>::Acc A;
  PlaneSet set;
  Chunks chunks;
  const T* source;
  T* target;
  const TargetRow* rows;
  int64_t row_count;
  const GatherTerm<A>* terms;
  int64_t values_stride;
  const A* start;        // what the sums start from (bias), start_stride a target row
  int64_t start_stride;
  const TargetPhase* phases;
  int64_t phase_count;
  int64_t images, virtual_rows, extra_rows;
  int64_t target_channels, target_rows, target_cols, row_step, col_step;
  bool channels_last;    // the target's memory
  GatherTile<A> tiles[2][7];
  // a worker's scratch: the planes, then the groups of every phase
  char* scratch;
  int64_t scratch_bytes, planes_bytes, groups;
  int64_t span;  // groups that all target rows pass over before the next ones

  // elements between neighbouring pixels and channels of the target
  int64_t pixel_step() const { return channels_last ? target_channels : 1; }
  int64_t channel_step() const { return channels_last ? 1 : target_rows * target_cols; }
};

// The groups of one phase in a chunk: where they read, where they write, how many of their pixels exist.
template <class T>
struct Groups {
  const typename Num<T>::Acc** source;
  T** target;
  int8_t* pixels;
  int64_t count;
  bool whole;  // no group has fewer than kGroup pixels
};

template <class T>
void list_groups(const Gather<T>& g, const TargetPhase& phase, const ChunkRange& r,
                 const typename Num<T>::Acc* planes, Groups<T>& groups) {
  groups.count = 0;
  groups.whole = (phase.col_end - phase.col) % kGroup == 0;
  const int64_t row = most(phase.row, r.row), row_end = least(phase.row_end, r.row_end);
  for (int64_t n = r.image; n < r.image_end; ++n)
    for (int64_t i = row; i < row_end; ++i) {
      const typename Num<T>::Acc* from =
          planes + (n - r.image) * g.set.image_size() + (i - r.row) * g.set.cols * g.set.width;
      T* to = g.target + n * g.target_channels * g.target_rows * g.target_cols +
              ((i * g.row_step + phase.row0) * g.target_cols + phase.col0) * g.pixel_step();
      for (int64_t j = phase.col; j < phase.col_end; j += kGroup) {
        groups.source[groups.count] = from + j * g.set.width;
        groups.target[groups.count] = to + j * g.col_step * g.pixel_step();
        groups.pixels[groups.count] = int8_t(least(kGroup, phase.col_end - j));
        ++groups.count;
      }
    }
}

// The lines of the targets, which are asked for while the tile is summed.
template <class T>
DYNAPRUNE_INLINE void prefetch_targets(T* const* target, int64_t groups, int64_t offset, int64_t step,
                                       int64_t outputs) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < groups; ++i)
    for (int64_t m = 0; m < kGroup; ++m)
      for (int64_t o = 0; o < outputs; o += kLine) __builtin_prefetch(target[i] + m * step + offset + o, 1);
}

// One target row of channels-last memory over groups [begin, end).
template <class T>
void gather_row(const Gather<T>& g, const TargetRow& row, const typename Num<T>::Acc* start, const Groups<T>& groups,
                int64_t begin, int64_t end) {
  typedef typename Num<T>::Acc A;
  constexpr int L = kLanes<T>;
  const int64_t step = g.col_step * g.target_channels;
  const GatherTerm<A>* terms = g.terms + row.begin;
  const int64_t count = row.end - row.begin;
  for (int64_t o = 0; o < row.channels;) {
    const int64_t vectors = least(2, divide_up(row.channels - o, L));
    const int64_t outputs = least(row.channels - o, vectors * L);
    const int64_t limit = kMaxGroups[vectors - 1];
    const int64_t tiles = divide_up(end - begin, limit);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = begin + (end - begin) * t / tiles, n = begin + (end - begin) * (t + 1) / tiles - first;
      const GatherTile<A> tile = g.tiles[vectors - 1][n - 1];
      prefetch_targets(groups.target + first, n, row.channel + o, step, outputs);
      if constexpr (sizeof(T) == sizeof(A)) {
        if (groups.whole && outputs == vectors * L) {
          tile(terms, count, o, g.values_stride, groups.source + first, start + o, groups.target + first,
               row.channel + o, step);
          continue;
        }
      }
      alignas(64) A sums[7 * kGroup * 2 * L];
      A* to[7];
      for (int64_t i = 0; i < n; ++i) to[i] = sums + i * kGroup * vectors * L;
      tile(terms, count, o, g.values_stride, groups.source + first, start + o, to, 0, vectors * L);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t m = 0; m < groups.pixels[first + i]; ++m) {
          T* pixel = groups.target[first + i] + m * step + row.channel + o;
          const A* sum = to[i] + m * vectors * L;
          for (int64_t v = 0; v < outputs; v += L) {
            if (outputs - v >= L)
              store(pixel + v, load(sum + v));
            else
              store_partial(pixel + v, load(sum + v), int(outputs - v));
          }
        }
    }
    o += outputs;
  }
}

// Groups from `begin` on that follow each other in the target: up to which, and how many pixels they have.
struct Run {
  int64_t end, pixels;
};
template <class T>
DYNAPRUNE_INLINE Run adjoining(const Groups<T>& groups, int64_t begin, int64_t end, int64_t col_step) {
  Run run = {begin + 1, groups.pixels[begin]};
  for (; run.end < end; ++run.end) {
    if (groups.target[run.end] != groups.target[run.end - 1] + groups.pixels[run.end - 1] * col_step) break;
    run.pixels += groups.pixels[run.end];
  }
  return run;
}

// One target row of contiguous memory over groups [begin, end), at most kTilesTogether tiles. The sums of all pixels
// are collected one behind the other, then turned.
template <class T>
void gather_row_contiguous(const Gather<T>& g, const TargetRow& row, const typename Num<T>::Acc* start,
                           const Groups<T>& groups, int64_t begin, int64_t end) {
  typedef typename Num<T>::Acc A;
  constexpr int L = kLanes<T>;
  constexpr int kPixels = kTilesTogether * kMaxGroups[0] * kGroup, kPixelPairs = kTilesTogether * kMaxGroups[1] * kGroup;
  constexpr int kMostPixels = (kPixels > 2 * kPixelPairs ? kPixels : 2 * kPixelPairs) + 2 * (kGroup + L);
  alignas(64) A sums[kMostPixels * L];
  const GatherTerm<A>* terms = g.terms + row.begin;
  for (int64_t o = 0; o < row.channels;) {
    const int64_t vectors = least(2, divide_up(row.channels - o, L));
    const int64_t outputs = least(row.channels - o, vectors * L), stride = vectors * L;
    const int64_t tiles = divide_up(end - begin, kMaxGroups[vectors - 1]);
    for (int64_t i = begin; i < end;) {  // the lines of the targets are asked for while the tiles are summed
      constexpr int64_t kLine = 64 / int64_t(sizeof(T));
      const Run run = adjoining(groups, i, end, g.col_step);
      T* target = groups.target[i] + (row.channel + o) * g.channel_step();
      for (int64_t c = 0; c < outputs; ++c, target += g.channel_step())
        for (int64_t j = 0; j < run.pixels * g.col_step; j += kLine) __builtin_prefetch(target + j, 1);
      i = run.end;
    }
    A* next = sums;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = begin + (end - begin) * t / tiles, n = begin + (end - begin) * (t + 1) / tiles - first;
      A* to[7];
      for (int64_t i = 0; i < n; ++i) {
        to[i] = next;
        next += groups.pixels[first + i] * stride;  // what a group sums of pixels that do not exist is overwritten
      }
      g.tiles[vectors - 1][n - 1](terms, row.end - row.begin, o, g.values_stride, groups.source + first, start + o, to,
                                  0, stride);
    }
    const A* from = sums;
    for (int64_t i = begin; i < end;) {
      const Run run = adjoining(groups, i, end, g.col_step);
      T* target = groups.target[i] + (row.channel + o) * g.channel_step();
      for (int64_t c = 0; c < outputs; c += L)  // a line of a channel is filled before the next channels
        for (int64_t j = 0; j < run.pixels; j += L)
          scatter_channels(from + j * stride + c, stride, int(least(L, outputs - c)), int(least(L, run.pixels - j)),
                           target + c * g.channel_step() + j * g.col_step, g.channel_step(), g.col_step);
      from += run.pixels * stride;
      i = run.end;
    }
    o += outputs;
  }
}

template <class T>
void gather_chunk(void* context, int64_t chunk, int64_t worker) {
  typedef typename Num<T>::Acc A;
  const Gather<T>& g = *static_cast<const Gather<T>*>(context);
  const ChunkRange r = chunk_range(g.chunks, g.images, g.virtual_rows, chunk);
  char* scratch = g.scratch + worker * g.scratch_bytes;
  A* planes = reinterpret_cast<A*>(scratch);
  for (int64_t n = r.image; n < r.image_end; ++n)
    pack_image(g.set, g.source, n, r.row, r.row_end - r.row + g.extra_rows,
               planes + (n - r.image) * g.set.image_size());
  memset(planes + (r.image_end - r.image) * g.set.image_size(), 0, size_t(kGroup * g.set.width) * sizeof(A));
  Groups<T> groups;
  groups.source = reinterpret_cast<const A**>(scratch + g.planes_bytes);
  groups.target = (T**)(groups.source + g.groups);
  groups.pixels = reinterpret_cast<int8_t*>(groups.target + g.groups);
  for (int64_t phase = 0; phase < g.phase_count; ++phase) {
    list_groups(g, g.phases[phase], r, planes, groups);
    const int64_t spans = divide_up(groups.count, g.span);
    for (int64_t span = 0; span < spans; ++span)
      for (int64_t i = 0; i < g.row_count; ++i) {
        if (g.rows[i].phase != phase) continue;
        const auto* start = g.start + i * g.start_stride;
        if (g.channels_last)
          gather_row(g, g.rows[i], start, groups, groups.count * span / spans, groups.count * (span + 1) / spans);
        else  // whole spans, since they end where a cache line does in most tensors
          gather_row_contiguous(g, g.rows[i], start, groups, span * g.span, least(groups.count, (span + 1) * g.span));
      }
  }
}

// Cuts the work into chunks, which fixes the size of the planes (the terms' offsets depend on it).
template <class T>
void plan_chunks(Gather<T>& g, const Workers& workers) {
  constexpr int64_t kBudget = 768 << 10;
  const int64_t row_bytes =
      most(1, g.set.count) * g.set.cols * g.set.width * int64_t(sizeof(typename Num<T>::Acc));
  g.chunks = choose_chunks(g.images, g.virtual_rows, g.extra_rows, row_bytes, kBudget, 2 * workers.count);
  g.set.rows = g.chunks.band + g.extra_rows;
}

template <class T>
void run_gather(Gather<T>& g, int64_t virtual_cols, const Workers& workers) {
  typedef typename Num<T>::Acc A;
  // a last group reads up to kGroup - 1 pixels past its row; what it computes from them is not stored
  g.planes_bytes = round_up(
      (g.chunks.images * g.set.image_size() + kGroup * g.set.width) * int64_t(sizeof(A)), 64);
  g.groups = round_up(g.chunks.images * g.chunks.band * divide_up(virtual_cols, kGroup), 8);
  g.scratch_bytes = round_up(g.planes_bytes + g.groups * int64_t(sizeof(A*) + sizeof(T*) + 1), 64);
  g.scratch = static_cast<char*>(conv_scratch(kWorkers, workers.count * g.scratch_bytes));
  for (int v = 1; v <= 2; ++v)
    for (int n = 1; n <= kMaxGroups[v - 1]; ++n)
      g.tiles[v - 1][n - 1] = g.set.width == 8 ? gather_tile_for<A, 8>(n, v) : gather_tile_for<A, 16>(n, v);
  const bool pairs = g.values_stride > kLanes<T>;
  g.span = g.channels_last ? 2 * (pairs ? kMaxGroups[1] * 2 : kMaxGroups[0])
                           : kTilesTogether * kMaxGroups[pairs ? 1 : 0];
  workers.run(g.chunks.count, gather_chunk<T>, &g);
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
