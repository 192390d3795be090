// Block-sparse linear layers on the CPU: plain pointers, no torch. See BlockLayout for the index, ops.py for the math.
#pragma once

#include "layout_view.h"
#include "types.h"

namespace dynaprune::cpu {

struct LinearShape {
  int64_t m;    // rows of x and dy
  int64_t in;   // columns of x
  int64_t out;  // columns of dy and y
  int64_t bi;   // inputs of a block
  int64_t bo;   // outputs of a block
};

// One instruction set's kernels. All tensors are contiguous and of one dtype; `bias` may be null. Every element of an
// output is written. Each function returns false when scratch memory could not be had, and is bitwise deterministic
// for any number of workers.
struct LinearKernels {
  // y [m, out] = x [m, in] W^T + bias [out]
  bool (*forward)(DType dtype, LinearShape shape, const LayoutView& layout, const void* x, const void* values,
                  const void* bias, void* y, const Workers& workers);
  // dx [m, in] = dy [m, out] W
  bool (*dgrad)(DType dtype, LinearShape shape, const LayoutView& layout, const void* dy, const void* values, void* dx,
                const Workers& workers);
  // dvalues [capacity, bi, bo] = blocks of dy^T x at live blocks, zeros in every other slot. With `values`, also
  // wg [R * C] = sum over each live block of value * gradient (float, or double for float64; zero elsewhere).
  bool (*wgrad)(DType dtype, LinearShape shape, const LayoutView& layout, const void* dy, const void* x,
                const void* values, void* dvalues, void* wg, const Workers& workers);
  // squares [R * C] = sum of squares of dy^T x over each block that is not live, zero at live ones (float or double).
  bool (*probe)(DType dtype, LinearShape shape, const LayoutView& layout, const void* dy, const void* x, void* squares,
                const Workers& workers);
};

namespace avx512 {
extern const LinearKernels linear_kernels;
}
namespace avx2 {
extern const LinearKernels linear_kernels;
}
namespace generic {
extern const LinearKernels linear_kernels;
}

}  // namespace dynaprune::cpu
