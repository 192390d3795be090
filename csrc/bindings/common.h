// What every binding needs: argument checks that say what was expected and what came, and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/flush_denormals.h"
#include "cpu/types.h"
#include "layout_view.h"

namespace dynaprune::bindings {

using cpu::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << "]";
  return text.str();
}

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

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), op, ": expected ", name, " of the dtype of ", other_name,
                  " (", torch::headeronly::toString(other.scalar_type()), "), got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": expected ", name, " ", shape, ", got shape ", shape_of(t));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": expected contiguous ", name, ", got other strides");
}

// Values [capacity, bi, bo], contiguous, of the dtype of `other`.
inline void check_values(const char* op, const char* name, const Tensor& values, const char* other_name,
                         const Tensor& other) {
  check_cpu(op, name, values);
  check_dim(op, name, values, 3, "[capacity, bi, bo]");
  STD_TORCH_CHECK(values.size(1) >= 1 && values.size(2) >= 1, op, ": expected ", name,
                  " with blocks of at least 1 x 1, got shape ", shape_of(values));
  check_same_dtype(op, name, values, other_name, other);
  check_contiguous(op, name, values);
}

inline void check_index(const char* op, const Tensor& index) {
  check_cpu(op, "index", index);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int, op, ": expected an int32 index, got ",
                  torch::headeronly::toString(index.scalar_type()));
  check_dim(op, "index", index, 1, "[size]");
  check_contiguous(op, "index", index);
}

// The view of a packed index whose length must fit the sizes.
inline LayoutView view_index(const char* op, const Tensor& index, int64_t rows, int64_t columns, int64_t lists,
                             int64_t capacity) {
  check_index(op, index);
  const int64_t expected = packed_index_size(rows, lists, capacity);
  STD_TORCH_CHECK(index.numel() == expected, op, ": expected an index of ", expected, " elements for ", rows,
                  " block rows, ", columns, " block columns, ", lists, " column lists and capacity ", capacity, ", got ",
                  index.numel());
  return layout_view(static_cast<const int32_t*>(index.const_data_ptr()), rows, columns, lists, capacity);
}

// The capacity that explains an index's length.
inline int64_t capacity_of_index(const char* op, const Tensor& index, int64_t rows, int64_t lists) {
  check_index(op, index);
  const int64_t rest = index.numel() - packed_index_size(rows, lists, 0);
  STD_TORCH_CHECK(rest >= 0 && rest % 6 == 0, op, ": expected an index of ", packed_index_size(rows, lists, 0),
                  " + 6 x capacity elements for ", rows, " block rows and ", lists, " column lists, got ",
                  index.numel());
  return rest / 6;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
