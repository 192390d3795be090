// Scratch memory, and panels of an activation cut into blocks of columns. Include after simd.h.
#pragma once

#include "simd.h"

#include "scratch.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

// Owned scratch memory, see allocate_scratch.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(allocate_scratch(bytes)), bytes_(bytes) {}
  ~Scratch() { free_scratch(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  int64_t bytes_;
};

DYNAPRUNE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DYNAPRUNE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
DYNAPRUNE_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
DYNAPRUNE_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// to[0 .. n) = from[0 .. n), between T and the type sums are kept in.
template <class T, class U>
DYNAPRUNE_INLINE void convert_row(const T* from, int64_t n, U* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, load(from + i));
  if (i < n) store_partial(to + i, load_partial(from + i, int(n - i)), int(n - i));
}

// One row of `count` whole blocks of NV vectors to panels `distance` apart.
template <int NV, class T, class A>
DYNAPRUNE_INLINE void pack_row(const T* row, int64_t count, A* to, int64_t distance) {
  for (int64_t b = 0; b < count; ++b) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(to + v * kLanes<T>, load(row + v * kLanes<T>));
    row += NV * kLanes<T>;
    to += distance;
  }
}

template <class T, class A>
DYNAPRUNE_INLINE void pack_row(const T* row, int64_t block, int64_t count, A* to, int64_t distance) {
  switch (block % kLanes<T> ? 0 : block / kLanes<T>) {
    case 1:
      return pack_row<1>(row, count, to, distance);
    case 2:
      return pack_row<2>(row, count, to, distance);
    case 4:
      return pack_row<4>(row, count, to, distance);
    case 8:
      return pack_row<8>(row, count, to, distance);
    default:
      for (int64_t b = 0; b < count; ++b) convert_row(row + b * block, block, to + b * distance);
  }
}

// Panels begin this many elements further apart than they are long, lest they all fall into the same cache sets.
constexpr int64_t kPanelGap = 16;

// Cuts columns [first * block, last * block) of `rows` rows (ld apart, `size` columns) into panels, one a block, each
// panel[m][0 .. stride) and `distance` elements from the one before. What a ragged last block lacks, and the gap up to
// `stride`, becomes zero. Blocks whose list in `used` (pointers, may be null) is empty are left out.
template <class T, class A>
void pack_blocks(const T* from, int64_t ld, int64_t size, int64_t rows, int64_t block, int64_t first, int64_t last,
                 const int32_t* used, A* panels, int64_t stride, int64_t distance) {
  const int64_t whole = least(last, size / block);
  for (int64_t begin = first, end; begin < whole; begin = end) {  // runs of used blocks: long reads of each row
    end = begin + 1;
    if (used && used[begin + 1] == used[begin]) continue;
    while (end < whole && !(used && used[end + 1] == used[end])) ++end;
    for (int64_t m = 0; m < rows; ++m)
      pack_row(from + m * ld + begin * block, block, end - begin, panels + (begin - first) * distance + m * stride,
               distance);
  }
  for (int64_t b = most(whole, first); b < last; ++b)
    for (int64_t m = 0; m < rows; ++m)
      convert_row(from + m * ld + b * block, size - b * block, panels + (b - first) * distance + m * stride);
  for (int64_t b = first; b < last; ++b) {
    const int64_t width = least(block, size - b * block);
    for (int64_t m = 0; m < rows && width < stride; ++m)
      for (int64_t i = width; i < stride; ++i) panels[(b - first) * distance + m * stride + i] = 0;
  }
}

template <class T>
void fill_zero(T* to, int64_t n) {
  __builtin_memset(to, 0, size_t(n) * sizeof(T));
}

// Runs in order on the calling thread where the work is too small to share.
static inline void run_items(const Workers& workers, bool share, int64_t items,
                             void (*body)(void* context, int64_t item, int64_t worker), void* context) {
  if (share && items > 1 && workers.count > 1) {
    workers.run(items, body, context);
  } else {
    for (int64_t item = 0; item < items; ++item) body(context, item, 0);
  }
}

// Multiply-adds below which waking other threads costs more than it saves.
constexpr int64_t kShareWork = 200000;

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
