// bindings/cuda_device.h where kernels run on host threads: tensors on the CPU, and a GPU of a few processors. So the
// way from Python to a kernel's arguments is tested without a GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "core/device.h"
#include "core/problem.h"

#define DYN_LIBRARY dynaprune_cuda_emulated
#define DYN_DISPATCH_KEY CPU

namespace dynaprune::bindings {

using cuda::Target;
using torch::stable::Tensor;

inline std::string toolkit_and_driver() { return "13000 13000"; }

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

inline void check_success(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error ", int(error));
}

// DYN_EMULATION_CAPABILITY says which GPU it is: 80 or 90.
struct OnDevice {
  explicit OnDevice(const Tensor&) {
    const char* capability = std::getenv("DYN_EMULATION_CAPABILITY");
    target = {4, capability == nullptr ? 80 : std::atoi(capability), nullptr};
  }

  Target target;
};

}  // namespace dynaprune::bindings
