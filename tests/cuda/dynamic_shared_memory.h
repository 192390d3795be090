// What kernels are launched with: bytes of dynamic shared memory under the kernel's own name and template arguments, as
// resources.py writes them; the most where it depends on a call's sizes. Static shared memory is in the machine code,
// this is not.
#pragma once

#include "core/gather/pixels_sm90.h"
#include "core/gather/tokens_sm90.h"
#include "core/kernels/conv2d_sm80.h"
#include "core/kernels/layout_update.h"
#include "core/kernels/linear_sm80.h"
#include "core/kernels/product_sm90.h"
#include "core/kernels/saliency.h"
#include "core/kernels/sum_splits.h"
#include "core/kernels/wgrad_sm90.h"

namespace launched_with {

using namespace dynaprune::cuda;
using f16 = Half;
using bf16 = BFloat16;
using f32 = float;

template <class Tile>
constexpr size_t linear_product_kernel = Tile::kSharedBytes;
template <class Tile>
constexpr size_t linear_wgrad_kernel = Tile::kSharedBytes;
template <class Tile>
constexpr size_t linear_probe_kernel = Tile::kSharedBytes;
template <class Tile>
constexpr size_t conv2d_forward_kernel = Tile::kSharedBytes;
template <class Tile>
constexpr size_t conv2d_dgrad_kernel = Tile::kSharedBytes;
template <class Tile>
constexpr size_t conv2d_wgrad_kernel = Tile::kSharedBytes;
template <class Tile>
constexpr size_t conv2d_probe_kernel = Tile::kSharedBytes;
template <class T>
constexpr size_t sum_splits_kernel = 4 * sizeof(float);
template <class T, int WARPS>
constexpr size_t block_saliency_kernel = WARPS == 1 ? 0 : WARPS * (kLargestBlockOutputs + kStatistics) * sizeof(float);
constexpr size_t neuron_saliency_kernel = kSaliencyThreads * sizeof(float);
constexpr size_t clear_kernel = 0, count_free_kernel = 0, list_free_kernel = 0, assign_kernel = 0, emit_rows_kernel = 0;
template <bool RELEASE>
constexpr size_t claim_kernel = 0;
constexpr size_t count_lists_kernel = kListThreads * sizeof(int), emit_lists_kernel = kListThreads * sizeof(int);

namespace sm90 {

using namespace dynaprune::cuda::sm90;

template <class T, class Rows, int OUTER, int WIDTH>
constexpr size_t product_sm90_kernel = Pipeline<T, OUTER, WIDTH, ProductItem>::kSharedBytes;
template <class T, class Inputs, int OUTER>
constexpr size_t wgrad_sm90_kernel = Pipeline<T, OUTER, 128, GradientItem>::kSharedBytes;

}  // namespace sm90
}  // namespace launched_with
