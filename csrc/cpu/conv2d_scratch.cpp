#include <cstdlib>
#include <new>

#include "conv2d.h"

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

void* conv_scratch(ConvScratch kind, int64_t bytes) {
  thread_local Buffers buffers;
#if defined(__SANITIZE_ADDRESS__)
  constexpr bool kExact = true;  // nothing kept, nothing spare: the sanitizer sees the first byte behind
#else
  constexpr bool kExact = false;
#endif
  if (kExact || bytes > buffers.bytes[kind] || buffers.data[kind] == nullptr) {
    const int64_t spare = kExact ? kAlignment - 1 : bytes / 4 + kAlignment;
    const int64_t wanted = (bytes + spare) / kAlignment * kAlignment;
    std::free(buffers.data[kind]);
    buffers.data[kind] = std::aligned_alloc(kAlignment, static_cast<size_t>(wanted));
    buffers.bytes[kind] = buffers.data[kind] == nullptr ? 0 : wanted;
    if (buffers.data[kind] == nullptr) throw std::bad_alloc();
  }
  return buffers.data[kind];
}

}  // namespace dynaprune::cpu
