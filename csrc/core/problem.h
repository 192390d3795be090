// What a launcher is told about a call: plain values, known to the host, without CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // cudaStream_t points to one

namespace dynaprune::cuda {

enum class DType { f32, f16, bf16 };

// Of float32 products: three tf32 products that add up to float32's precision, or one. 16-bit types have one way only.
enum class Precision { ieee, tf32 };

struct Target {
  int sm_count;
  int capability;  // 80, 86, 90, ...
  CUstream_st* stream;
};

// A packed index and its sizes (layout_view.h). Blocks are bi inputs x bo outputs, each 16, 32, 64 or 128.
struct Blocks {
  const int32_t* index;
  int64_t rows, columns, lists, capacity;
  int64_t bi, bo;
};

// x [tokens, in] and dy [tokens, out]; a row is followed by zeros up to a multiple of 16 elements and starts at one,
// counted from a pointer aligned to 16 bytes.
struct LinearShape {
  int64_t tokens, in, out;
  int64_t a_stride;  // elements from row to row: of the one activation that is read, of x in wgrad and probe
  int64_t b_stride;  // of dy in wgrad and probe
};

// Images in NHWC memory, aligned to 16 bytes.
struct Conv2dShape {
  int64_t images, in_channels, in_h, in_w, out_channels, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t x_channels;   // of a pixel of x: each group's, followed by zeros up to a multiple of 16
  int64_t dy_channels;  // of a pixel of dy: out_channels, followed by zeros up to a multiple of 16
};

// The grid of a layer's blocks; everything from `groups` on is 1 for a linear layer.
struct LayoutShape {
  int64_t rows, columns;  // columns = kernel_h * kernel_w * channel blocks
  int64_t capacity;
  int64_t groups, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
};

// Whether a kernel that counts columns and thread blocks in 32 bits can run.
inline bool fits_int32(int64_t count) { return count <= (int64_t(1) << 31) - 256; }

}  // namespace dynaprune::cuda
