// What Hopper's kernels multiply in a linear layer: rows of tokens.
#pragma once

#include "core/ptx/tma_sm90.h"
#include "core/scheduler/packed_index.h"

namespace dynaprune::cuda::sm90 {

// Forward, a = x, and dgrad, a = dy: y [tokens, outer_size] from a [tokens, inner_size].
template <bool DGRAD>
struct Tokens {
  static constexpr bool kDgrad = DGRAD;
  TensorMap a;  // in boxes of a tile's tokens
  int tokens, outer_size;
  int inner_width;  // of a block on the summed side
  int ragged;       // the ragged block of that side, where there is one

  struct List {
    int count, output, real;
  };
  using Start = int;
  using Entry = int;

  DYN_DEVICE void prefetch() const { sm90::prefetch(a); }
  DYN_DEVICE int most() const { return tokens; }
  DYN_DEVICE int inner() const { return inner_width; }
  DYN_DEVICE int width() const { return outer_size; }

  DYN_DEVICE List list(int number, int outer) const { return {tokens, number * outer, outer_size - number * outer}; }
  static DYN_DEVICE int64_t row(const List&, int token) { return token; }
  static DYN_DEVICE Start start(const List&, int token) { return token; }
  static DYN_DEVICE Entry entry(const LayoutView& view, int e) { return DGRAD ? view.col_rows[e] : view.row_cols[e]; }
  static DYN_DEVICE bool exists(const LayoutView& view, Entry block) {
    return DGRAD ? is_row(block, view.rows) : is_column(block, view.columns);
  }
  static DYN_DEVICE int block(Entry block) { return block; }
  DYN_DEVICE bool is_ragged(int block) const { return block == ragged; }

  DYN_DEVICE void copy(void* to, const List&, Start token, int block, int k, uint64_t* barrier) const {
    tma_load(to, a, block * inner_width + k, token, 0, barrier);
  }
};

// Wgrad: the columns of x.
struct TokenInputs {
  TensorMap x;  // in boxes of 64 tokens
  int in, log_bi;

  using Panel = int;  // its first column

  DYN_DEVICE void prefetch() const { sm90::prefetch(x); }
  DYN_DEVICE int inputs(int column) const {
    const int left = in - (column << log_bi), all = 1 << log_bi;
    return left < all ? left : all;
  }
  DYN_DEVICE Panel panel(int, int column, int first) const { return (column << log_bi) + first; }
  static DYN_DEVICE int start(int token) { return token; }
  DYN_DEVICE void copy(void* to, int token, Panel panel, uint64_t* barrier) const {
    tma_load(to, x, panel, token, 0, barrier);
  }
};

}  // namespace dynaprune::cuda::sm90
