// Block saliency on the CPU: one pass over values and gradient.
#pragma once

#include "layout_view.h"
#include "types.h"

namespace dynaprune::cpu {

// stats [4, R * C] (float, or double for float64): per live block sum w^2, sum g^2, sum |w g|, sum w g, zero elsewhere.
// neuron [R * bo]: sum of w g over every live block of an output's row. Blocks are read whole, padding included.
using SaliencyKernel = void (*)(DType dtype, int64_t bi, int64_t bo, const LayoutView& layout, const void* values,
                                const void* grad, void* stats, void* neuron, const Workers& workers);

namespace avx512 {
extern const SaliencyKernel block_saliency;
}
namespace avx2 {
extern const SaliencyKernel block_saliency;
}
namespace generic {
extern const SaliencyKernel block_saliency;
}

}  // namespace dynaprune::cpu
