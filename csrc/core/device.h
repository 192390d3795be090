// The device's language: what a kernel may say. Compiled by nvcc these are CUDA's own words; with -DDYN_EMULATION a
// host compiler runs the same kernels on host threads (emulation/runtime.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef DYN_EMULATION
#include "emulation/runtime.h"
#define DYN_GLOBAL
#define DYN_DEVICE inline
#define DYN_HOST_DEVICE inline
#define DYN_LAUNCH_BOUNDS(threads, blocks)
#define DYN_GRID_CONSTANT
#define DYN_UNROLL
#define DYN_UNROLL_BY(times)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYN_GLOBAL __global__
#define DYN_DEVICE __device__ __forceinline__
#define DYN_HOST_DEVICE __host__ __device__ __forceinline__
#define DYN_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DYN_GRID_CONSTANT __grid_constant__
#define DYN_UNROLL _Pragma("unroll")
#define DYN_PRAGMA(words) _Pragma(#words)
#define DYN_UNROLL_BY(times) DYN_PRAGMA(unroll times)
#endif

namespace dynaprune::cuda {

constexpr int kWarp = 32;  // lanes

template <class T>
DYN_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

struct Grid {  // thread blocks along each axis
  unsigned x = 1, y = 1, z = 1;
};

template <class T>
struct Same {  // keeps a launch from deducing parameters from arguments, which convert as in any call
  using type = T;
};

#ifdef DYN_EMULATION

using Half = emulation::Half;
using BFloat16 = emulation::BFloat16;

DYN_DEVICE int thread() { return emulation::self->index; }
DYN_DEVICE int threads() { return emulation::self->block->threads; }
DYN_DEVICE int block(int axis = 0) { return emulation::self->block->position[axis]; }
DYN_DEVICE int grid(int axis = 0) { return emulation::self->block->grid[axis]; }

DYN_DEVICE void sync_block() { emulation::sync_block(); }
DYN_DEVICE void sync_warp() { emulation::sync_warp(); }

template <class T>
DYN_DEVICE T shuffle(T value, int from) {
  return emulation::exchange(value)[from & (kWarp - 1)];
}
template <class T>
DYN_DEVICE T shuffle_xor(T value, int mask) {
  return emulation::exchange(value)[(thread() % kWarp) ^ mask];
}
template <class T>
DYN_DEVICE T shuffle_up(T value, int delta) {  // a lane below `delta` gets its own value
  const int lane = thread() % kWarp, from = lane - delta;
  return emulation::exchange(value)[from < 0 ? lane : from];
}
template <class T>
DYN_DEVICE T shuffle_down(T value, int delta) {  // one of the last `delta` lanes gets its own value
  const int lane = thread() % kWarp, from = lane + delta;
  return emulation::exchange(value)[from < kWarp ? from : lane];
}
DYN_DEVICE uint32_t ballot(bool vote) { return emulation::ballot(vote); }
DYN_DEVICE int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

DYN_DEVICE unsigned char* shared_memory() { return emulation::self->block->shared; }

// A programming error of the kernel: throws in the emulation, costs nothing on the device.
#define DYN_ASSERT(condition) \
  ((condition) ? void() : ::dynaprune::cuda::emulation::fail(__FILE__, __LINE__, "not so: " #condition))

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, cudaStream_t,
                   typename Same<Parameters>::type... arguments) {
  emulation::Machine::instance().run({int(grid.x), int(grid.y), int(grid.z)}, threads, shared_bytes,
                                     [&] { kernel(arguments...); });
  return cudaSuccess;
}

#else

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Axes are literals at every use, so the choice costs nothing.
DYN_DEVICE int thread() { return int(threadIdx.x); }
DYN_DEVICE int threads() { return int(blockDim.x); }
DYN_DEVICE int block(int axis = 0) { return int(axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z); }
DYN_DEVICE int grid(int axis = 0) { return int(axis == 0 ? gridDim.x : axis == 1 ? gridDim.y : gridDim.z); }

DYN_DEVICE void sync_block() { __syncthreads(); }
DYN_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
DYN_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}
template <class T>
DYN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
DYN_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
template <class T>
DYN_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}
DYN_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
DYN_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

DYN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

#define DYN_ASSERT(condition) static_cast<void>(0)

// Starts a kernel; an empty grid is a success without one.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   typename Same<Parameters>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more must be asked for
    const cudaError_t refused =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(shared_bytes));
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), unsigned(threads), shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

#endif

DYN_DEVICE int lane() { return thread() % kWarp; }
DYN_DEVICE int warp() { return thread() / kWarp; }

#ifdef DYN_EMULATION
using emulation::to_float;
#else
DYN_DEVICE float to_float(Half value) { return __half2float(value); }
DYN_DEVICE float to_float(BFloat16 value) { return __bfloat162float(value); }
#endif
DYN_DEVICE float to_float(float value) { return value; }

// Rounds to nearest, ties to even.
template <class T>
DYN_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
#ifdef DYN_EMULATION
    return emulation::from_float<T>(value);
#else
    if constexpr (std::is_same_v<T, Half>)
      return __float2half_rn(value);
    else
      return __float2bfloat16_rn(value);
#endif
  }
}

// 16 bytes of T in registers.
template <class T>
struct alignas(16) Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// One 16-byte access; the address must be a multiple of 16.
template <class T>
DYN_DEVICE Vector16<T> load16(const T* from) {
  DYN_ASSERT(reinterpret_cast<uintptr_t>(from) % 16 == 0);
  Vector16<T> vector;
#ifdef DYN_EMULATION
  std::memcpy(&vector, from, 16);
#else
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  memcpy(&vector, &raw, 16);
#endif
  return vector;
}
template <class T>
DYN_DEVICE void store16(T* to, const Vector16<T>& vector) {
  DYN_ASSERT(reinterpret_cast<uintptr_t>(to) % 16 == 0);
#ifdef DYN_EMULATION
  std::memcpy(to, &vector, 16);
#else
  uint4 raw;
  memcpy(&raw, &vector, 16);
  *reinterpret_cast<uint4*>(to) = raw;
#endif
}

// Reads what nobody writes while the kernel runs; the compiler may then read ahead of stores.
template <class T>
DYN_DEVICE T read_only(const T* from) {
#ifdef DYN_EMULATION
  return *from;
#else
  return __ldg(from);
#endif
}

}  // namespace dynaprune::cuda
