#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dynaprune::cpu {
namespace {

constexpr int64_t kAlignment = 64;

std::atomic<int64_t> held_bytes{0}, most_bytes{0};

int64_t whole_lines(int64_t bytes) { return ((bytes > 0 ? bytes : 1) + kAlignment - 1) / kAlignment * kAlignment; }

void count(int64_t bytes) {
  const int64_t held = held_bytes.fetch_add(bytes) + bytes;
  int64_t most = most_bytes.load();
  while (held > most && !most_bytes.compare_exchange_weak(most, held)) {
  }
}

struct Buffers {
  void* data[kScratchKinds] = {};
  int64_t bytes[kScratchKinds] = {};
  void drop(int kind) {
    free_scratch(data[kind], bytes[kind]);
    data[kind] = nullptr;
    bytes[kind] = 0;
  }
  ~Buffers() {
    for (int kind = 0; kind < kScratchKinds; ++kind) drop(kind);
  }
};

}  // namespace

void* allocate_scratch(int64_t bytes) {
  const int64_t whole = whole_lines(bytes);
  void* data = std::aligned_alloc(kAlignment, static_cast<size_t>(whole));
  if (data == nullptr)
    throw std::runtime_error("scratch memory of " + std::to_string(whole) + " bytes could not be allocated");
  count(whole);
  return data;
}

void free_scratch(void* data, int64_t bytes) {
  if (data == nullptr) return;
  std::free(data);
  count(-whole_lines(bytes));
}

ScratchBytes scratch_bytes(bool restart) {
  const ScratchBytes now{held_bytes.load(), most_bytes.load()};
  if (restart) most_bytes.store(held_bytes.load());
  return now;
}

void* conv_scratch(ConvScratch kind, int64_t bytes) {
  thread_local Buffers buffers;
#if defined(__SANITIZE_ADDRESS__)
  constexpr bool kExact = true;  // nothing kept, nothing spare: the sanitizer sees the first byte behind
#else
  constexpr bool kExact = false;
#endif
  if (kExact || bytes > buffers.bytes[kind] || buffers.data[kind] == nullptr) {
    buffers.drop(kind);
    const int64_t wanted = kExact ? bytes : bytes + bytes / 4;
    buffers.data[kind] = allocate_scratch(wanted);
    buffers.bytes[kind] = wanted;
  }
  return buffers.data[kind];
}

}  // namespace dynaprune::cpu
