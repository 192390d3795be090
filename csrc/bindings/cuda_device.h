// The device that bindings run on: its facts, its current stream, and what went wrong on it.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "core/problem.h"

#define DYN_LIBRARY dynaprune_cuda
#define DYN_DISPATCH_KEY CUDA

// Weak: a torch without CUDA has no such symbol, and the library shall load there too.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dynaprune::bindings {

using cuda::Target;
using torch::stable::Tensor;

inline void check_success(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been told: the next launch shall not meet it again
  const bool other_device = error == cudaErrorNoKernelImageForDevice;
  STD_TORCH_CHECK(false, op, ": ", cudaGetErrorString(error),
                  other_device ? " (compiled for " DYNAPRUNE_CUDA_ARCHITECTURES ")" : "");
}

// What launchers ask about a device, with the stream that torch works on.
inline Target target_of(int32_t device) {
  struct Facts {
    int sm_count, capability;
  };
  static const std::vector<Facts> facts = [] {
    int count = 0;
    check_success("cudaGetDeviceCount", cudaGetDeviceCount(&count));
    std::vector<Facts> found(count);
    for (int i = 0; i < count; ++i) {
      int major = 0, minor = 0;
      check_success("cudaDeviceGetAttribute",
                    cudaDeviceGetAttribute(&found[i].sm_count, cudaDevAttrMultiProcessorCount, i));
      check_success("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i));
      check_success("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i));
      found[i].capability = 10 * major + minor;
    }
    return found;
  }();
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "the torch that runs is built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const Facts& own = facts.at(device);
  return {own.sm_count, own.capability, static_cast<cudaStream_t>(stream)};
}

// The device of a tensor is the current one while this lives.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()), target(target_of(t.get_device_index())) {
    // The guard leaves a new thread (autograd's) without a context where the device is the current one already, and
    // the driver, which makes the tensor maps, takes none by itself. This call does since CUDA 12.
    check_success("cudaSetDevice", cudaSetDevice(t.get_device_index()));
  }

  const torch::stable::accelerator::DeviceGuard guard;
  const Target target;
};

// "13000 12080": CUDA's version as it was compiled with, and the newest that the driver runs; that one is 0 without
// a driver.
inline std::string toolkit_and_driver() {
  int driver = 0;
  check_success("cudaDriverGetVersion", cudaDriverGetVersion(&driver));
  return std::to_string(CUDART_VERSION) + " " + std::to_string(driver);
}

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

}  // namespace dynaprune::bindings
