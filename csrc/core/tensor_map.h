// Makes tensor maps (see matrix_sm90.h) on the host. The driver's function is looked up at run time, so that nothing
// links to libcuda and the library loads where there is no driver.
#pragma once

#include "core/matrix_sm90.h"
#include "core/problem.h"

namespace dynaprune::cuda::sm90 {

// Matrices of 16-bit elements in global memory, one behind the other.
struct Matrices {
  const void* base;
  int64_t width, height, depth;       // elements, rows, matrices: what lies beyond is read as zeros
  int64_t row_stride, matrix_stride;  // elements
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

#else

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // an older driver is no error of the next launch
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

inline bool has_tensor_maps() { return encode_tiled() != nullptr; }

// Boxes of box_height rows of 64 elements: 128 bytes, what the 128-byte swizzle allows.
inline cudaError_t make_tensor_map(TensorMap& map, DType dtype, const Matrices& m, int box_height) {
  const cuuint64_t sizes[3] = {cuuint64_t(m.width), cuuint64_t(m.height), cuuint64_t(m.depth)};
  const cuuint64_t strides[2] = {cuuint64_t(m.row_stride) * 2, cuuint64_t(m.matrix_stride) * 2};  // bytes
  const cuuint32_t box[3] = {64, cuuint32_t(box_height), 1}, every[3] = {1, 1, 1};
  const CUresult result = encode_tiled()(
      &map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(m.base), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif

}  // namespace dynaprune::cuda::sm90
