// What every binding of the CUDA kernels needs: its checks, and the device that it runs on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "core/launchers.h"
#ifdef DYN_EMULATION
#include "emulation/tensors.h"
#else
#include "bindings/cuda_device.h"
#endif

// STABLE_TORCH_LIBRARY and STABLE_TORCH_LIBRARY_IMPL of the library and the dispatch key of this device.
#define DYN_DEFINE_AS(library, m) STABLE_TORCH_LIBRARY(library, m)
#define DYN_DEFINE(m) DYN_DEFINE_AS(DYN_LIBRARY, m)
#define DYN_IMPLEMENT_AS(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define DYN_IMPLEMENT(m) DYN_IMPLEMENT_AS(DYN_LIBRARY, DYN_DISPATCH_KEY, m)

namespace dynaprune::bindings {

using cuda::Blocks;
using cuda::DType;
using cuda::Precision;

inline void check_cuda(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(on_device(t), op, ": expected ", name, " on a CUDA device, got a tensor on another device");
}

inline void check_beside(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  check_cuda(op, name, t);
  STD_TORCH_CHECK(t.get_device_index() == first.get_device_index(), op, ": expected ", name,
                  " on cuda:", first.get_device_index(), " as the other arguments, got cuda:", t.get_device_index());
}

// The kernels' dtype of a floating tensor.
inline DType kernel_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::Half) return DType::f16;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, op, ": expected ", name, " of float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(type));
  return DType::bf16;
}

inline Precision precision_of(bool tf32) { return tf32 ? Precision::tf32 : Precision::ieee; }

inline bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

inline int64_t whole_16(int64_t elements) { return ceil_div(elements, 16) * 16; }

// Kernels count tokens and pixels, rounded up to whole tiles, in 32 bits.
inline void check_count(const char* op, const char* name, std::initializer_list<int64_t> sizes) {
  const int64_t count = checked_product(op, name, sizes);
  STD_TORCH_CHECK(count <= int64_t(1) << 30, op, ": expected at most 2^30 ", name, ", got ", count);
}

inline void check_values(const char* op, const Tensor& values, const char* other_name, const Tensor& other) {
  check_beside(op, "values", values, other);
  check_block_values(op, "values", values);
  check_same_dtype(op, "values", values, other_name, other);
  STD_TORCH_CHECK(aligned(values), op, ": expected values aligned to 16 bytes");
}

inline void check_block(const char* op, int64_t bi, int64_t bo) {
  for (const int64_t size : {bi, bo})
    STD_TORCH_CHECK(size == 16 || size == 32 || size == 64 || size == 128, op,
                    ": expected blocks of 16, 32, 64 or 128, got ", bi, " x ", bo);
}

inline Blocks blocks_of(const char* op, const Tensor& index, const Tensor& beside, int64_t rows, int64_t columns,
                        int64_t lists, int64_t capacity, int64_t bi, int64_t bo) {
  check_beside(op, "index", index, beside);
  check_index(op, index, rows, columns, lists, capacity);
  return {static_cast<const int32_t*>(index.const_data_ptr()), rows, columns, lists, capacity, bi, bo};
}

inline std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, int64_t outputs,
                                          const Tensor& x) {
  if (!bias) return std::nullopt;
  check_beside(op, "bias", *bias, x);
  check_bias(op, *bias, outputs, x);
  return torch::stable::contiguous(*bias);
}

inline const bool* checked_flag(const char* op, const Tensor& probe, const Tensor& beside) {
  check_beside(op, "probe", probe, beside);
  STD_TORCH_CHECK(probe.scalar_type() == ScalarType::Bool && probe.numel() == 1, op,
                  ": expected probe as one bool, got ", torch::headeronly::toString(probe.scalar_type()), " of shape ",
                  shape_of(probe));
  check_storage(op, "probe", probe);
  return static_cast<const bool*>(probe.const_data_ptr());
}

// Scratch memory of one call. It may go before the kernels ran: torch hands it out again behind them on their stream.
inline Tensor workspace(const Tensor& beside, size_t bytes) {
  return torch::stable::new_empty(beside, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

inline Tensor new_sums(const Tensor& beside, int64_t count) {
  return torch::stable::new_empty(beside, {count}, ScalarType::Float);
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace dynaprune::bindings
