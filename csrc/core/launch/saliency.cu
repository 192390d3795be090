// Launcher of the saliency kernels.
#include "core/kernels/saliency.h"

#include "core/launchers.h"

namespace dynaprune::cuda {
namespace {

constexpr int64_t kLargestOfOneWarp = 2048;  // elements of a block

template <class T>
cudaError_t launch_entries(cudaStream_t stream, const Blocks& blocks, const LayoutView& view, const void* values,
                           const void* gradient, EntrySums sums) {
  constexpr int kWarps = kSaliencyThreads / kWarp;
  const T* w = static_cast<const T*>(values);
  const T* g = static_cast<const T*>(gradient);
  const int bi = int(blocks.bi), bo = int(blocks.bo);
  if (blocks.bi * blocks.bo <= kLargestOfOneWarp)
    return launch(&block_saliency_kernel<T, 1>, {unsigned(ceil_div<int64_t>(blocks.capacity, kWarps))},
                  kSaliencyThreads, 0, stream, w, g, view, bi, bo, sums);
  const size_t shared_bytes = size_t(kWarps * (bo + kStatistics)) * sizeof(float);
  return launch(&block_saliency_kernel<T, kWarps>, {unsigned(blocks.capacity)}, kSaliencyThreads, shared_bytes, stream,
                w, g, view, bi, bo, sums);
}

}  // namespace

size_t block_saliency_workspace(Blocks blocks) {
  return size_t(blocks.capacity * (blocks.bo + kStatistics)) * sizeof(float);
}

cudaError_t block_saliency(Target target, DType dtype, Blocks blocks, const void* values, const void* gradient,
                           float* stats, float* neuron, void* workspace) {
  const LayoutView view = layout_view(blocks.index, blocks.rows, blocks.columns, blocks.lists, blocks.capacity);
  float* statistics = static_cast<float*>(workspace);
  const EntrySums sums{statistics, statistics + blocks.capacity * kStatistics};
  const auto of_type = dtype == DType::f32   ? launch_entries<float>
                       : dtype == DType::f16 ? launch_entries<Half>
                                             : launch_entries<BFloat16>;
  const cudaError_t error = of_type(target.stream, blocks, view, values, gradient, sums);
  if (error != cudaSuccess) return error;
  return launch(&neuron_saliency_kernel, {unsigned(blocks.rows)}, kSaliencyThreads, kSaliencyThreads * sizeof(float),
                target.stream, view, int(blocks.bo), sums, stats, neuron);
}

}  // namespace dynaprune::cuda
