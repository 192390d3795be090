#include "scratch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dynaprune::cpu {
namespace {

constexpr int64_t kAlignment = 64;

struct Buffers {
  void* data[kScratchKinds] = {};
  int64_t bytes[kScratchKinds] = {};
  ~Buffers() {
    for (void* buffer : data) std::free(buffer);
  }
};

}  // namespace

void* allocate_scratch(int64_t bytes) {
  const int64_t whole = ((bytes > 0 ? bytes : 1) + kAlignment - 1) / kAlignment * kAlignment;
  void* data = std::aligned_alloc(kAlignment, static_cast<size_t>(whole));
  if (data == nullptr)
    throw std::runtime_error("scratch memory of " + std::to_string(whole) + " bytes could not be allocated");
  return data;
}

void* conv_scratch(ConvScratch kind, int64_t bytes) {
  thread_local Buffers buffers;
#if defined(__SANITIZE_ADDRESS__)
  constexpr bool kExact = true;  // nothing kept, nothing spare: the sanitizer sees the first byte behind
#else
  constexpr bool kExact = false;
#endif
  if (kExact || bytes > buffers.bytes[kind] || buffers.data[kind] == nullptr) {
    std::free(buffers.data[kind]);
    buffers.data[kind] = nullptr;
    buffers.bytes[kind] = 0;
    const int64_t wanted = kExact ? bytes : bytes + bytes / 4;
    buffers.data[kind] = allocate_scratch(wanted);
    buffers.bytes[kind] = wanted;
  }
  return buffers.data[kind];
}

}  // namespace dynaprune::cpu
