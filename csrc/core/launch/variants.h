// From what a launcher is told to what kernels are told, template arguments first of all.
#pragma once

#include <type_traits>

#include "core/device.h"
#include "core/problem.h"
#include "layout_view.h"

namespace dynaprune::cuda {

template <class T, int PRODUCTS>
struct Arithmetic {
  using Element = T;
  static constexpr int kProducts = PRODUCTS;  // see multiply() in mma/tile_sm80.h
};

// body(Arithmetic<...>{})
template <class Body>
cudaError_t with_arithmetic(DType dtype, Precision precision, const Body& body) {
  if (dtype == DType::f16) return body(Arithmetic<Half, 1>{});
  if (dtype == DType::bf16) return body(Arithmetic<BFloat16, 1>{});
  return precision == Precision::tf32 ? body(Arithmetic<float, 1>{}) : body(Arithmetic<float, 3>{});
}

// body(std::integral_constant<int, width>{}) with one side of a block.
template <class Body>
cudaError_t with_width(int64_t width, const Body& body) {
  if (width == 16) return body(std::integral_constant<int, 16>{});
  if (width == 32) return body(std::integral_constant<int, 32>{});
  if (width == 64) return body(std::integral_constant<int, 64>{});
  if (width == 128) return body(std::integral_constant<int, 128>{});
  return cudaErrorInvalidValue;
}

// Logarithm to base 2 of one side of a block, -1 of what is none.
inline int log_of_width(int64_t width) {
  return width == 16 ? 4 : width == 32 ? 5 : width == 64 ? 6 : width == 128 ? 7 : -1;
}

inline LayoutView view_of(const Blocks& blocks) {
  return layout_view(blocks.index, blocks.rows, blocks.columns, blocks.lists, blocks.capacity);
}

}  // namespace dynaprune::cuda
