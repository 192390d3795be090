// Large outputs on large pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/common.h"

namespace dynaprune::bindings {

// Below this an output holds at most one whole large page, and the system call is not worth it.
constexpr int64_t kWorthAdvice = int64_t(4) << 20;

// Asks the kernel for 2 MB pages behind a large new output. Memory that the allocator maps afresh, or gave back
// to the kernel (glibc does both from a few MiB on, depending on what was freed before), is faulted in while the
// kernel writes it: by 4 KB pages that doubles the time of a sparse product. Advice only: failure changes nothing.
inline void advise_huge_pages(const Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = output.numel() * static_cast<int64_t>(output.element_size());
  if (bytes < kWorthAdvice) return;
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
