// Makes tensor maps (ptx/tma_sm90.h, ptx/im2col_sm90.h) on the host. The driver's functions are looked up at run time:
// nothing links to libcuda, and the library loads where there is no driver.
#pragma once

#include "core/problem.h"
#include "core/ptx/im2col_sm90.h"

namespace dynaprune::cuda::sm90 {

// Matrices of 16-bit elements in global memory, one behind the other.
struct Matrices {
  const void* base;
  int64_t width, height, depth;       // elements, rows, matrices: what lies beyond is read as zeros
  int64_t row_stride, matrix_stride;  // elements
};

// Images of 16-bit elements in global memory, NHWC.
struct Images {
  const void* base;
  int64_t channels, height, width, count;  // what lies beyond is read as zeros
  int64_t pixel_stride;                    // elements
};

// Where copies go along one axis of an image: `count` pixels from `first` on, `step` apart, anywhere.
struct Walk {
  int64_t first, count;
  int step;

  // The bounding box's last pixel, from the image's last.
  int64_t upper_corner(int64_t size) const { return first + (count - 1) * step - (size - 1); }

  // Whether a map can describe it and copies can shift it so far.
  bool fits(int64_t size, int64_t largest_shift) const {
    const auto is_corner = [](int64_t at) { return at >= -128 && at <= 127; };
    return count > 0 && is_corner(first) && is_corner(upper_corner(size)) && step <= 8 &&
           largest_shift <= kLargestShift;
  }
};

#ifdef DYN_EMULATION

inline bool has_tensor_maps() { return true; }

// Refuses what the driver refuses.
inline cudaError_t make_tensor_map(TensorMap& map, DType, const Matrices& m, int box_height) {
  const auto size_fits = [](int64_t size) { return size > 0 && size <= int64_t(1) << 32; };
  const auto stride_fits = [](int64_t bytes) { return bytes % 16 == 0 && bytes < int64_t(1) << 40; };
  if (reinterpret_cast<uintptr_t>(m.base) % 16 != 0 || !size_fits(m.width) || !size_fits(m.height) ||
      !size_fits(m.depth) || !stride_fits(m.row_stride * 2) || !stride_fits(m.matrix_stride * 2) || box_height < 1 ||
      box_height > 256)
    return cudaErrorInvalidValue;
  map = {static_cast<const unsigned char*>(m.base),
         m.width,
         m.height,
         m.depth,
         m.row_stride * 2,
         m.matrix_stride * 2,
         box_height};
  return cudaSuccess;
}

inline cudaError_t make_im2col_map(Im2colMap& map, DType, const Images& i, const Walk& h, const Walk& w, int pixels) {
  const int64_t bytes = i.pixel_stride * 2;
  map = {static_cast<const unsigned char*>(i.base),
         {i.channels, i.width, i.height, i.count},
         {bytes, bytes * i.width, bytes * i.width * i.height},
         {int(w.first), int(h.first)},
         {int(w.upper_corner(i.width)), int(h.upper_corner(i.height))},
         {w.step, h.step},
         64,
         pixels};
  return emulation::is_valid(map) ? cudaSuccess : cudaErrorInvalidValue;
}

#else

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
using EncodeIm2col = decltype(&cuTensorMapEncodeIm2col);

// A function of the driver's version 12.0, null where the driver is older or missing.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // an older driver is no error of the next launch
  return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = driver_function<EncodeTiled>("cuTensorMapEncodeTiled");
  return function;
}
inline EncodeIm2col encode_im2col() {
  static const EncodeIm2col function = driver_function<EncodeIm2col>("cuTensorMapEncodeIm2col");
  return function;
}

inline bool has_tensor_maps() { return encode_tiled() != nullptr && encode_im2col() != nullptr; }

inline CUtensorMapDataType map_type(DType dtype) {
  return dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Boxes of box_height rows of 64 elements: 128 bytes, what the 128-byte swizzle allows.
inline cudaError_t make_tensor_map(TensorMap& map, DType dtype, const Matrices& m, int box_height) {
  const cuuint64_t sizes[3] = {cuuint64_t(m.width), cuuint64_t(m.height), cuuint64_t(m.depth)};
  const cuuint64_t strides[2] = {cuuint64_t(m.row_stride) * 2, cuuint64_t(m.matrix_stride) * 2};  // bytes
  const cuuint32_t box[3] = {64, cuuint32_t(box_height), 1}, every[3] = {1, 1, 1};
  const CUresult result =
      encode_tiled()(&map, map_type(dtype), 3, const_cast<void*>(m.base), sizes, strides, box, every,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // the same numbers; may tell of work that failed before
}

// Columns of `pixels` times 64 channels. Every array starts with the axis that is next in memory.
inline cudaError_t make_im2col_map(Im2colMap& map, DType dtype, const Images& i, const Walk& h, const Walk& w,
                                   int pixels) {
  const cuuint64_t sizes[4] = {cuuint64_t(i.channels), cuuint64_t(i.width), cuuint64_t(i.height), cuuint64_t(i.count)};
  const cuuint64_t pixel = cuuint64_t(i.pixel_stride) * 2, row = pixel * sizes[1];  // bytes
  const cuuint64_t strides[3] = {pixel, row, row * sizes[2]};
  const int lower[2] = {int(w.first), int(h.first)};
  const int upper[2] = {int(w.upper_corner(i.width)), int(h.upper_corner(i.height))};
  const cuuint32_t steps[4] = {1, cuuint32_t(w.step), cuuint32_t(h.step), 1};
  const CUresult result =
      encode_im2col()(&map, map_type(dtype), 4, const_cast<void*>(i.base), sizes, strides, lower, upper, 64,
                      cuuint32_t(pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // the same numbers; may tell of work that failed before
}

#endif

}  // namespace dynaprune::cuda::sm90
