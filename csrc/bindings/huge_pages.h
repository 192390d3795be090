// Large outputs on large pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/common.h"

namespace dynaprune::bindings {

// glibc's allocator maps blocks of at least this size afresh on every allocation and keeps smaller ones
// (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits).
constexpr int64_t kFreshlyMapped = int64_t(32) << 20;

// Asks the kernel for 2 MB pages behind a large new output: faulting 32 MiB in by 4 KB pages costs as much as a
// quarter of the multiplication that fills them. Advice only: failure changes nothing.
inline void advise_huge_pages(const Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = output.numel() * static_cast<int64_t>(output.element_size());
  if (bytes < kFreshlyMapped) return;
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)output;
#endif
}

}  // namespace dynaprune::bindings
