// Weight gradient of listed blocks and probe of unlisted ones. Include after simd.h.
//
// A block's gradient is the sum over target pixels of x^T dy, with x at the tap's place. The planes of x and dy of a
// chunk of pixels stay in cache while every block passes over them. Two orders, both independent of the number of
// threads: few blocks are summed over a fixed number of parts of the batch, then over the parts in order; many blocks
// are cut into batches, each of which passes over all chunks in order.
#pragma once

#include "conv2d_planes.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

// Inputs of a register tile, by vectors of outputs.
#if DYNAPRUNE_VECTOR_REGISTERS >= 32
constexpr int outer_inputs(int width, int vectors) { return vectors == 2 || width == 8 ? 8 : 16; }
#else
constexpr int outer_inputs(int, int vectors) { return vectors == 2 ? 4 : 8; }
#endif

constexpr int64_t kPieceBytes = 16 << 10;  // of dy

// The pixels of a piece of a chunk as both operands see them.
struct OuterPixels {
  int64_t images, rows, cols;
  int64_t x_image, x_row, dy_image, dy_row;  // elements
  int64_t dy_pixel;
};

// sum[i][o] += x^T dy over the pixels, for IR inputs and NV vectors of outputs.
template <class A, int KC, int IR, int NV>
__attribute__((noinline)) void outer_pixels(const A* x, const A* dy, const OuterPixels& s, A* sum, int64_t stride) {
  typedef typename Num<A>::Vec Vec;
  constexpr int L = kLanes<A>;
  Vec acc[IR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < IR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec{};
  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t r = 0; r < s.rows; ++r) {
      const A* px = x + n * s.x_image + r * s.x_row;
      const A* pd = dy + n * s.dy_image + r * s.dy_row;
#pragma GCC unroll 1
      for (int64_t j = s.cols; j > 0; --j) {
        Vec b[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) b[v] = load(pd + v * L);
#pragma GCC unroll 16
        for (int i = 0; i < IR; ++i) {
          const Vec a = splat(px[i]);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) acc[i][v] += a * b[v];
        }
        px += KC;
        pd += s.dy_pixel;
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < IR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      A* to = sum + i * stride + v * L;
      store(to, load(to) + acc[i][v]);
    }
}

struct OuterTerm {
  int64_t x_plane, x_place;  // first plane of the channel block; offset of the tap in it
  int64_t dy_plane;
  int64_t inputs, outputs;   // that exist
  int64_t block, slot;       // row * C + column; slot in values, -1 for the probe
};

template <class T>
struct Outer {
  typedef typename Num<T>::Acc A;
  PlaneSet x_set, dy_set;
  const T* x;
  const T* dy;
  const T* values;  // for block_sums; may be null
  T* dvalues;       // null: the probe
  A* block_sums;    // saliency or squared norms, by block
  const OuterTerm* terms;
  int64_t term_count, terms_per_batch;
  int64_t bi, bo, sum_rows, sum_cols;  // a term's sums [sum_rows][sum_cols], padded
  Chunks chunks;
  int64_t images, out_rows, out_cols, extra_rows;
  int64_t parts;        // of the chunks, each with its own sums; 0: batches of terms
  A* sums;              // [parts][term_count] or [workers][terms_per_batch]
  char* scratch;        // planes: of one chunk per worker, or of all chunks
  int64_t scratch_bytes, dy_at, chunk_elements;

  int64_t sum_size() const { return sum_rows * sum_cols; }
};

template <class T>
void pack_chunk(const Outer<T>& g, int64_t chunk, typename Num<T>::Acc* planes) {
  const ChunkRange r = chunk_range(g.chunks, g.images, g.out_rows, chunk);
  for (int64_t n = r.image; n < r.image_end; ++n) {
    pack_image(g.x_set, g.x, n, r.row, r.row_end - r.row + g.extra_rows,
               planes + (n - r.image) * g.x_set.image_size());
    pack_image(g.dy_set, g.dy, n, r.row, r.row_end - r.row,
               planes + g.dy_at + (n - r.image) * g.dy_set.image_size());
  }
}

template <class A, int KC>
void add_block(const A* x, int64_t x_plane_size, const A* dy, const OuterPixels& s, int64_t inputs, int64_t outputs,
               A* sum, int64_t stride) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < inputs; i += KC, x += x_plane_size)
    for (int64_t o = 0; o < outputs;) {
      const bool two = outputs - o > L;
      constexpr int one_rows = outer_inputs(KC, 1), two_rows = outer_inputs(KC, 2);
      for (int64_t k = 0; k < least(KC, inputs - i); k += two ? two_rows : one_rows) {
        A* to = sum + (i + k) * stride + o;
        if (two)
          outer_pixels<A, KC, two_rows, 2>(x + k, dy + o, s, to, stride);
        else
          outer_pixels<A, KC, one_rows, 1>(x + k, dy + o, s, to, stride);
      }
      o += two ? 2 * L : L;
    }
}

// Adds a chunk's part to the sums of terms [begin, end). All terms pass over a piece of its pixels, small enough that
// a block row's dy stays in the first cache level, before the next piece.
template <class T>
void add_chunk(const Outer<T>& g, int64_t chunk, const typename Num<T>::Acc* planes, int64_t begin, int64_t end,
               typename Num<T>::Acc* sums) {
  typedef typename Num<T>::Acc A;
  const ChunkRange r = chunk_range(g.chunks, g.images, g.out_rows, chunk);
  const int64_t images = r.image_end - r.image, rows = r.row_end - r.row;
  OuterPixels s;
  s.cols = g.out_cols;
  s.x_image = g.x_set.image_size();
  s.x_row = g.x_set.cols * g.x_set.width;
  s.dy_image = g.dy_set.image_size();
  s.dy_row = g.dy_set.cols * g.dy_set.width;
  s.dy_pixel = g.dy_set.width;
  const int64_t fitting = most(1, kPieceBytes / (s.dy_row * int64_t(sizeof(A))));  // rows
  const int64_t piece_rows = least(rows, fitting), piece_images = most(1, fitting / rows);
  for (int64_t n = 0; n < images; n += piece_images)
    for (int64_t row = 0; row < rows; row += piece_rows) {
      s.images = least(piece_images, images - n);
      s.rows = least(piece_rows, rows - row);
      for (int64_t t = begin; t < end; ++t) {
        const OuterTerm& term = g.terms[t];
        const A* x = planes + n * s.x_image + row * s.x_row + term.x_plane * g.x_set.plane_size() + term.x_place;
        const A* dy = planes + g.dy_at + n * s.dy_image + row * s.dy_row + term.dy_plane * g.dy_set.plane_size();
        A* sum = sums + (t - begin) * g.sum_size();
        if (g.x_set.width == 8)
          add_block<A, 8>(x, g.x_set.plane_size(), dy, s, term.inputs, term.outputs, sum, g.sum_cols);
        else
          add_block<A, 16>(x, g.x_set.plane_size(), dy, s, term.inputs, term.outputs, sum, g.sum_cols);
      }
    }
}

// Writes a term's result: the block of dvalues with zeros in its padding and the saliency, or the squared norm.
template <class T>
void finish_term(const Outer<T>& g, const OuterTerm& term, const typename Num<T>::Acc* sum) {
  typedef typename Num<T>::Vec Vec;
  constexpr int64_t L = kLanes<T>;
  Vec total = {};
  for (int64_t i = 0; i < g.bi; ++i)
    for (int64_t o = 0; o < g.bo; o += L) {
      const int n = int(least(L, g.bo - o));
      const int real = i < term.inputs ? int(most(0, least(L, term.outputs - o))) : 0;
      const Vec grad = load_partial(sum + (i < term.inputs ? i : 0) * g.sum_cols + o, real);
      if (g.dvalues == nullptr) {
        total += grad * grad;
        continue;
      }
      const int64_t at = (term.slot * g.bi + i) * g.bo + o;
      store_partial(g.dvalues + at, grad, n);
      if (g.values != nullptr) total += load_partial(g.values + at, real) * grad;
    }
  if (g.block_sums != nullptr) g.block_sums[term.block] = sum_lanes(total);
}

// Few blocks: one part of the batch, all terms.
template <class T>
void sum_part(void* context, int64_t part, int64_t worker) {
  typedef typename Num<T>::Acc A;
  const Outer<T>& g = *static_cast<const Outer<T>*>(context);
  A* planes = reinterpret_cast<A*>(g.scratch + worker * g.scratch_bytes);
  A* sums = g.sums + part * g.term_count * g.sum_size();
  memset(sums, 0, size_t(g.term_count * g.sum_size()) * sizeof(A));
  for (int64_t chunk = g.chunks.count * part / g.parts; chunk < g.chunks.count * (part + 1) / g.parts; ++chunk) {
    pack_chunk(g, chunk, planes);
    add_chunk(g, chunk, planes, 0, g.term_count, sums);
  }
}

template <class T>
void finish_parts(void* context, int64_t item, int64_t) {
  typedef typename Num<T>::Vec Vec;
  const Outer<T>& g = *static_cast<const Outer<T>*>(context);
  const int64_t begin = item * g.terms_per_batch, end = least(g.term_count, begin + g.terms_per_batch);
  for (int64_t t = begin; t < end; ++t) {
    auto* first = g.sums + t * g.sum_size();
    for (int64_t i = 0; i < g.sum_size(); i += kLanes<T>) {
      Vec total = load(first + i);
      for (int64_t part = 1; part < g.parts; ++part) total += load(first + part * g.term_count * g.sum_size() + i);
      store(first + i, total);
    }
    finish_term(g, g.terms[t], first);
  }
}

// Many blocks: all planes first, then batches of terms.
template <class T>
void pack_item(void* context, int64_t chunk, int64_t) {
  const Outer<T>& g = *static_cast<const Outer<T>*>(context);
  pack_chunk(g, chunk, reinterpret_cast<typename Num<T>::Acc*>(g.scratch) + chunk * g.chunk_elements);
}

template <class T>
void sum_batch(void* context, int64_t batch, int64_t worker) {
  typedef typename Num<T>::Acc A;
  const Outer<T>& g = *static_cast<const Outer<T>*>(context);
  A* sums = g.sums + worker * g.terms_per_batch * g.sum_size();
  const int64_t begin = batch * g.terms_per_batch, end = least(g.term_count, begin + g.terms_per_batch);
  memset(sums, 0, size_t((end - begin) * g.sum_size()) * sizeof(A));
  for (int64_t chunk = 0; chunk < g.chunks.count; ++chunk)
    add_chunk(g, chunk, reinterpret_cast<const A*>(g.scratch) + chunk * g.chunk_elements, begin, end, sums);
  for (int64_t t = begin; t < end; ++t) finish_term(g, g.terms[t], sums + (t - begin) * g.sum_size());
}

// Cuts the pixels into chunks and chooses between parts and batches, independently of the workers because the order
// of the sums depends on both.
template <class T>
void plan_chunks(Outer<T>& g) {
  constexpr int64_t kBudget = 768 << 10, kElement = sizeof(typename Num<T>::Acc);
  constexpr int64_t kMinParts = 8, kMaxParts = 32, kPartPixels = 128;
  const int64_t row_bytes =
      (g.x_set.count * g.x_set.cols * g.x_set.width + g.dy_set.count * g.dy_set.cols * g.dy_set.width) * kElement;
  // sums of every part are written and read once more; that must cost less than reading the planes from memory
  const int64_t parts = least(g.images * (g.out_rows + g.extra_rows) * row_bytes /
                                  most(1, g.term_count * g.sum_size() * kElement),
                              least(kMaxParts, g.images * g.out_rows * g.out_cols / kPartPixels));
  g.chunks = choose_chunks(g.images, g.out_rows, g.extra_rows, row_bytes, kBudget, parts >= kMinParts ? parts : 1);
  g.parts = parts >= kMinParts ? least(parts, g.chunks.count) : 0;
  g.x_set.rows = g.chunks.band + g.extra_rows;
  g.dy_set.rows = g.chunks.band;
}

template <class T>
void run_outer(Outer<T>& g, const Workers& workers) {
  typedef typename Num<T>::Acc A;
  constexpr int64_t kBatchBytes = 256 << 10;
  if (g.term_count == 0) return;
  const int64_t term_bytes = g.sum_size() * int64_t(sizeof(A));
  g.dy_at = g.chunks.images * g.x_set.image_size();
  g.chunk_elements = round_up(g.dy_at + g.chunks.images * g.dy_set.image_size(), 16);
  g.scratch_bytes = g.chunk_elements * int64_t(sizeof(A));
  if (g.parts > 0) {
    g.sums = static_cast<A*>(conv_scratch(kSums, g.parts * g.term_count * term_bytes));
    g.scratch = static_cast<char*>(conv_scratch(kWorkers, workers.count * g.scratch_bytes));
    workers.run(g.parts, sum_part<T>, &g);
    g.terms_per_batch = 8;
    workers.run(divide_up(g.term_count, g.terms_per_batch), finish_parts<T>, &g);
  } else {
    g.terms_per_batch = most(1, least(kBatchBytes / term_bytes, divide_up(g.term_count, 4 * workers.count)));
    g.sums = static_cast<A*>(conv_scratch(kSums, workers.count * g.terms_per_batch * term_bytes));
    g.scratch = static_cast<char*>(conv_scratch(kWorkers, g.chunks.count * g.scratch_bytes));
    workers.run(g.chunks.count, pack_item<T>, &g);
    workers.run(divide_up(g.term_count, g.terms_per_batch), sum_batch<T>, &g);
  }
}

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
