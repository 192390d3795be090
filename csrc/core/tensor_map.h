// Makes tensor maps (see matrix_sm90.h) on the host. The driver's function is looked up at run time, so that nothing
// links to libcuda and the library loads where there is no driver.
#pragma once

#include "core/matrix_sm90.h"
#include "core/problem.h"

namespace dynaprune::cuda::sm90 {

// A matrix of 16-bit elements in global memory.
struct Matrix {
  const void* base;
  int64_t height, width, stride;  // rows, elements, elements from row to row
};

#ifdef DYN_EMULATION

inline bool has_tensor_maps() { return true; }

// Refuses what the driver refuses.
inline cudaError_t make_tensor_map(TensorMap& map, DType, const Matrix& m, int box_height) {
  const bool fine = reinterpret_cast<uintptr_t>(m.base) % 16 == 0 && m.stride * 2 % 16 == 0 &&
                    m.stride * 2 < int64_t(1) << 40 && m.width > 0 && m.height > 0 &&
                    m.width <= int64_t(1) << 32 && m.height <= int64_t(1) << 32 && box_height > 0 && box_height <= 256;
  if (!fine) return cudaErrorInvalidValue;
  map = {static_cast<const unsigned char*>(m.base), m.width, m.height, m.stride * 2, box_height};
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

// Boxes of box_height rows of 64 elements: 128 bytes, what the 128-byte swizzle allows. Zeros beyond the matrix.
inline cudaError_t make_tensor_map(TensorMap& map, DType dtype, const Matrix& m, int box_height) {
  const cuuint64_t sizes[2] = {cuuint64_t(m.width), cuuint64_t(m.height)};
  const cuuint64_t strides[1] = {cuuint64_t(m.stride) * 2};  // bytes; of the inner axis implied
  const cuuint32_t box[2] = {64, cuuint32_t(box_height)}, every[2] = {1, 1};
  const CUresult result = encode_tiled()(
      &map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(m.base), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif

}  // namespace dynaprune::cuda::sm90
