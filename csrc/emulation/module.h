// What the Python modules of the emulation share: arrays in and out. Each module includes one .cu file and calls its
// launchers, so that tests go through the same choice of tiles, grids and arguments as a device does.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "core/launchers.h"

namespace dynaprune::cuda::emulation {

namespace py = pybind11;

// Memory of exactly the size that is asked for, where AddressSanitizer sees both ends, aligned as a device's allocator
// would. Starts as NaN (integers: -1).
class Buffer {
 public:
  Buffer() = default;  // null
  explicit Buffer(size_t bytes)
      : bytes_(bytes), memory_(static_cast<unsigned char*>(::operator new(bytes, kAlignment))) {
    std::memset(memory_.get(), 0xff, bytes);
  }
  explicit Buffer(const py::array& from) : Buffer(size_t(from.nbytes())) {
    const py::array source = py::array::ensure(from, py::array::c_style);
    std::memcpy(memory_.get(), source.data(), bytes_);
  }
  static Buffer optional(const py::object& from) { return from.is_none() ? Buffer() : Buffer(py::array(from)); }

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(memory_.get());
  }
  py::array array(const py::dtype& dtype, std::initializer_list<int64_t> shape) const {
    py::array result(dtype, std::vector<py::ssize_t>(shape.begin(), shape.end()));
    if (size_t(result.nbytes()) != bytes_) throw std::logic_error("a result of another size than its buffer");
    std::memcpy(result.mutable_data(), memory_.get(), bytes_);
    return result;
  }
  void copy_to(py::array to) const { std::memcpy(to.mutable_data(), memory_.get(), bytes_); }  // contiguous

 private:
  static constexpr std::align_val_t kAlignment{256};
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete(memory, kAlignment); }
  };
  size_t bytes_ = 0;
  std::unique_ptr<unsigned char[], Free> memory_;
};

// float32, float16, or bfloat16 by its bits in uint16.
inline DType dtype_of(const py::array& array) {
  if (array.dtype().equal(py::dtype::of<float>())) return DType::f32;
  if (array.dtype().equal(py::dtype("float16"))) return DType::f16;
  if (array.dtype().equal(py::dtype::of<uint16_t>())) return DType::bf16;
  throw std::invalid_argument("expected float32, float16 or uint16 (bfloat16), got " +
                              py::str(array.dtype()).cast<std::string>());
}

inline size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("the launcher returned error " + std::to_string(int(error)));
}

// A weight's packed index and grid as launchers take them; values are [capacity, bi, bo].
inline Blocks blocks_of(const Buffer& index, const py::array& values, int64_t rows, int64_t columns, int64_t lists) {
  return {index.data<const int32_t>(), rows, columns, lists, values.shape(0), values.shape(1), values.shape(2)};
}

}  // namespace dynaprune::cuda::emulation
