// The table of one instruction set's kernels. The file that includes this one defines which set.
#include "simd.h"

#include "conv2d.h"
#include "kernels.h"
#include "linear.h"
#include "linear_wgrad.h"
#include "saliency.h"

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

template <class Body>
void by_dtype(DType dtype, const Body& body) {
  if (dtype == DType::float32) return body(float());
  if (dtype == DType::bfloat16) return body(bf16());
  body(double());
}

template <class T>
const T* of(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* of(void* p) {
  return static_cast<T*>(p);
}

void linear_forward_any(DType dtype, const LinearShape& s, const LayoutView& v, const Workers& workers, const void* x,
                        const void* values, const void* bias, void* y) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    linear_forward(s, v, workers, of<T>(x), of<T>(values), of<T>(bias), of<T>(y));
  });
}

void linear_dgrad_any(DType dtype, const LinearShape& s, const LayoutView& v, const Workers& workers, const void* dy,
                      const void* values, void* dx) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    linear_dgrad(s, v, workers, of<T>(dy), of<T>(values), of<T>(dx));
  });
}

void linear_wgrad_any(DType dtype, const LinearShape& s, const LayoutView& v, const Workers& workers, const void* dy,
                      const void* x, const void* values, void* dvalues, void* block_sums) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    linear_wgrad(s, v, workers, of<T>(dy), of<T>(x), of<T>(values), of<T>(dvalues),
                 of<typename Num<T>::Acc>(block_sums));
  });
}

void linear_probe_any(DType dtype, const LinearShape& s, const LayoutView& v, const Workers& workers, const void* dy,
                      const void* x, void* squares) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    linear_probe(s, v, workers, of<T>(dy), of<T>(x), of<typename Num<T>::Acc>(squares));
  });
}

void conv2d_forward_any(DType dtype, const ConvShape& s, const LayoutView& v, const Workers& workers, const void* x,
                        const void* values, const void* bias, void* y) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    conv2d_forward(s, v, workers, of<T>(x), of<T>(values), of<T>(bias), of<T>(y));
  });
}

void conv2d_dgrad_any(DType dtype, const ConvShape& s, const LayoutView& v, const Workers& workers, const void* dy,
                      const void* values, void* dx) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    conv2d_dgrad(s, v, workers, of<T>(dy), of<T>(values), of<T>(dx));
  });
}

void conv2d_wgrad_any(DType dtype, const ConvShape& s, const LayoutView& v, const Workers& workers, const void* dy,
                      const void* x, const void* values, void* dvalues, void* block_sums) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    conv2d_wgrad(s, v, workers, of<T>(dy), of<T>(x), of<T>(values), of<T>(dvalues),
                 of<typename Num<T>::Acc>(block_sums));
  });
}

void conv2d_probe_any(DType dtype, const ConvShape& s, const LayoutView& v, const Workers& workers, const void* dy,
                      const void* x, void* squares) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    conv2d_probe(s, v, workers, of<T>(dy), of<T>(x), of<typename Num<T>::Acc>(squares));
  });
}

void block_saliency_any(DType dtype, int64_t bi, int64_t bo, const LayoutView& v, const Workers& workers,
                        const void* values, const void* grad, void* stats, void* neuron) {
  by_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    block_saliency(bi, bo, v, workers, of<T>(values), of<T>(grad), of<typename Num<T>::Acc>(stats),
                   of<typename Num<T>::Acc>(neuron));
  });
}

}  // namespace

const Kernels kernels = {
    linear_forward_any, linear_dgrad_any, linear_wgrad_any, linear_probe_any, conv2d_forward_any,
    conv2d_dgrad_any,   conv2d_wgrad_any, conv2d_probe_any, block_saliency_any,
};

}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
