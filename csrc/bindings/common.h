// What every binding of the CPU kernels needs: its checks and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "bindings/flush_denormals.h"
#include "cpu/index_check.h"
#include "cpu/types.h"

namespace dynaprune::bindings {

using cpu::DType;

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": expected ", name, " on the CPU, got a tensor on another device");
}

// The kernels' dtype of a floating tensor.
inline DType kernel_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::float32;
  if (type == ScalarType::BFloat16) return DType::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Double, op, ": expected ", name, " of float32, bfloat16 or float64, got ",
                  torch::headeronly::toString(type));
  return DType::float64;
}

// dtype of sums and statistics: float32, or float64 for float64.
inline ScalarType sum_dtype(DType dtype) { return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float; }

// Values [capacity, bi, bo], contiguous, of the dtype of `other`.
inline void check_values(const char* op, const char* name, const Tensor& values, const char* other_name,
                         const Tensor& other) {
  check_cpu(op, name, values);
  check_block_values(op, name, values);
  check_same_dtype(op, name, values, other_name, other);
}

// The view of a packed index whose length must fit the sizes, and in which a kernel may walk along `direction`.
inline LayoutView view_index(const char* op, const Tensor& index, int64_t rows, int64_t columns, int64_t lists,
                             int64_t capacity, cpu::Lists direction, const cpu::ListGeometry* geometry) {
  check_cpu(op, "index", index);
  check_index(op, index, rows, columns, lists, capacity);
  const LayoutView view =
      layout_view(static_cast<const int32_t*>(index.const_data_ptr()), rows, columns, lists, capacity);
  const cpu::IndexFault fault = cpu::index_fault(view, direction, geometry);
  STD_TORCH_CHECK(fault.section == nullptr, op, ": index is corrupted: ", fault.section, "[", fault.at, "] is ",
                  fault.value, ", expected ", fault.expected, " (something other than layout_update wrote to it)");
  return view;
}

// torch's own threads, for one call of a kernel. Items are handed out by a counter, so uneven ones balance; which
// thread takes one has no influence on its result.
class TorchWorkers : public cpu::Workers {
 public:
  TorchWorkers() {
    count = static_cast<int64_t>(torch::stable::get_num_threads());
    run = [](int64_t items, void (*body)(void*, int64_t, int64_t), void* context) {
      std::atomic<int64_t> next{0};
      const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
      torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
        const FlushDenormals flush;
        for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) body(context, item, begin);
      });
    };
  }

 private:
  FlushDenormals flush_;  // of the calling thread, which does small work alone
};

}  // namespace dynaprune::bindings
