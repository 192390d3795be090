// Numbers too small for a normalised float count as zero while this lives, on its thread.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace dynaprune::bindings {

// Weights that L2 decay drives towards zero end as denormals, and an x86 core takes some 150 cycles for a
// multiply-add with one: after forty epochs a layer's forward took ten times as long. GPUs flush them, too.
class FlushDenormals {
 public:
  FlushDenormals() : before_(read()) { write(before_ | kFlush); }
  ~FlushDenormals() { write(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint64_t kFlush = 0x8040;  // MXCSR: flush to zero, denormals are zero
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t flags) { _mm_setcsr(static_cast<unsigned>(flags)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t(1) << 24;  // FPCR.FZ
  static uint64_t read() {
    uint64_t flags;
    __asm__ volatile("mrs %0, fpcr" : "=r"(flags));
    return flags;
  }
  static void write(uint64_t flags) { __asm__ volatile("msr fpcr, %0" : : "r"(flags)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t read() { return 0; }
  static void write(uint64_t) {}
#endif
  uint64_t before_;
};

}  // namespace dynaprune::bindings
