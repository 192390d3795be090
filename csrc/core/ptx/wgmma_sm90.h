// Warpgroup products (wgmma, "Asynchronous Warpgroup Level Matrix Instructions" in the PTX ISA 8.x), and stmatrix.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/ptx/tma_sm90.h"

namespace dynaprune::cuda::sm90 {

// wgmma: operands are panels in shared memory, swizzled as TMA leaves them: rows of 64 elements (128 bytes), panels
// start at multiples of 1,024 bytes. An operand of M (or N) x 16 summed elements is read in one of two ways:
//
//   K-major:   the summed axis runs along a row; row r of the panel is element r of M (N). 16 further summed elements
//              lie 32 bytes on; M (N) elements 8 .. 15 lie 1,024 bytes after 0 .. 7 (the stride byte offset).
//   MN-major:  M (N) runs along a row; row r is summed element r. 16 further summed elements lie 16 rows = 2,048 bytes
//              on; summed elements 8 .. 15 lie 1,024 bytes after 0 .. 7 (the stride byte offset). M (N) elements
//              64 .. 127 are in the next panel (the leading byte offset).
//
// Matrix descriptor ("Matrix Descriptor Format", and the canonical layouts under "Shared Memory Matrix Layout"; CUTLASS
// spells the same in cute/arch/mma_sm90_desc.hpp and make_gmma_desc, layouts B128):
//   bits 0-13   start address >> 4
//   bits 16-29  leading dimension byte offset >> 4; not used by swizzled K-major operands (CUTLASS writes 1)
//   bits 32-45  stride dimension byte offset >> 4
//   bits 49-51  base offset: 0, because every pattern of the swizzle starts at a multiple of 1,024 bytes. Starts inside
//               a pattern (+32 bytes for K-major) keep 0: the swizzle is applied to the final address bits.
//   bits 62-63  1: 128-byte swizzle
constexpr int kPanelRows = 64;
constexpr int kPanelBytes = kPanelRows * kSwizzleRow;  // of a panel of 64 rows

enum class Major { K = 0, MN = 1 };  // the instruction's imm-trans-a, imm-trans-b

DYN_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, Major major) {
  const uint64_t leading = major == Major::MN ? kPanelBytes >> 4 : 1, stride = kSwizzlePattern >> 4;
  return uint64_t(address >> 4 & 0x3fff) | leading << 16 | stride << 32 | uint64_t(1) << 62;
}

// What to add to a descriptor for the next 16 summed elements, and for the next 64 elements of M: in panels of 64 rows
// both kinds are one panel further (64 rows of the same panel for K-major).
DYN_HOST_DEVICE constexpr uint64_t next_sum16(Major major) { return (major == Major::K ? 32 : 16 * kSwizzleRow) >> 4; }
constexpr uint64_t kNextM64 = kPanelBytes >> 4;

#ifdef DYN_EMULATION

template <class T>
float shared_element(uint32_t address) {
  T element;
  emulation::check_shared(shared_memory() + address, 2, 2);
  std::memcpy(&element, shared_memory() + address, 2);
  return to_float(element);
}

// Address of element (mn, k) of a 16-wide operand, as the descriptor's fields say.
inline uint32_t operand_address(uint64_t descriptor, Major major, int mn, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                 stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  DYN_ASSERT(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0);  // the only mode that is modelled
  if (major == Major::K) return swizzled(start + uint32_t(mn / 8) * stride + uint32_t(mn % 8 * kSwizzleRow + k * 2));
  return swizzled(start + uint32_t(mn / 64) * leading + uint32_t(mn % 64 * 2) + uint32_t(k / 8) * stride +
                  uint32_t(k % 8 * kSwizzleRow));
}

// Carried out as late as the machine may, at the wait: what was released or overwritten before, or read from the
// accumulators too early, shows in the results.
template <class T, int N, Major A, Major B>
DYN_DEVICE void wgmma(float (&sums)[N / 2], uint64_t a_descriptor, uint64_t b_descriptor) {
  emulation::self->products.add([d = &sums[0], a_descriptor, b_descriptor] {
    const int row = thread() % kWarpgroup / kWarp * 16 + lane() / 4;
    float a[2][16];
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) a[h][k] = shared_element<T>(operand_address(a_descriptor, A, row + 8 * h, k));
    for (int j = 0; j < N / 8; ++j)
      for (int e = 0; e < 2; ++e) {
        float* at = d + 4 * j + e;
        double sums[2] = {at[0], at[2]};
        for (int k = 0; k < 16; ++k) {
          const float b = shared_element<T>(operand_address(b_descriptor, B, 8 * j + lane() % 4 * 2 + e, k));
          for (int h = 0; h < 2; ++h) sums[h] += double(a[h][k]) * b;
        }
        for (int h = 0; h < 2; ++h) at[2 * h] = emulation::toward_zero(sums[h]);
      }
  });
}
DYN_DEVICE void wgmma_fence() {}
DYN_DEVICE void wgmma_commit() { emulation::self->products.commit(); }
template <int PENDING>
DYN_DEVICE void wgmma_wait() {
  auto& machine = emulation::Machine::instance();
  if (!machine.left_out(emulation::kWaitProducts)) emulation::self->products.wait(PENDING);
  // The instruction is the whole warp's.
  machine.arrive_and_wait<emulation::Order::memory>(emulation::self->warp().gate);
}
template <int N>
DYN_DEVICE void warpgroup_fence_operand(float (&)[N]) {}

// Four 8 x 8 matrices of 16-bit elements; see below.
DYN_DEVICE void stmatrix_x4_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const uint32_t matrices[4] = {m0, m1, m2, m3};
  const auto rows = emulation::exchange(static_cast<unsigned char*>(row));
  for (int m = 0; m < 4; ++m)
    for (int e = 0; e < 2; ++e) {
      const auto element = uint16_t(matrices[m] >> 16 * e);
      std::memcpy(rows[m * 8 + lane() % 4 * 2 + e] + lane() / 4 * 2, &element, 2);
    }
}

#else

// Before the first product of a warpgroup, and whenever its registers were touched in between.
DYN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DYN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING committed groups are still running.
template <int PENDING>
DYN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of accumulators across the asynchronous products.
template <int N>
DYN_DEVICE void warpgroup_fence_operand(float (&d)[N]) {
  DYN_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Lane i holds of matrix m the elements (i / 4, i % 4 * 2) and the one right of it, the first in the low half, and the
// address of row i % 8 of matrix i / 8 in shared memory, 16 bytes: there goes *column* i % 8 ("stmatrix", .trans).
DYN_DEVICE void stmatrix_x4_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

#define DYN_IO8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define DYN_IO32(i) DYN_IO8(i), DYN_IO8(i + 8), DYN_IO8(i + 16), DYN_IO8(i + 24)
#define DYN_IO64(i) DYN_IO32(i), DYN_IO32(i + 32)
#define DYN_IO128 DYN_IO64(0), DYN_IO64(64)
#define DYN_D32                                                                                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define DYN_D64                                                                                                      \
  DYN_D32                                                                                                            \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define DYN_D128                                                                                                     \
  DYN_D64                                                                                                            \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115," \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d += a * b: scale-d is true, imm-scale-a and imm-scale-b are 1; then come imm-trans-a and imm-trans-b.
#define DYN_WGMMA(SHAPE, TYPE, REGISTERS, IO, A_, B_, ONE, TRANS_A, TRANS_B)                             \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ONE ", 0;\n"                                     \
               "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, " A_ ", " B_ \
               ", add, 1, 1, " TRANS_A ", " TRANS_B ";\n}"                                               \
               : IO                                                                                      \
               : "l"(a), "l"(b), "r"(1), "n"(int(A)), "n"(int(B)))

// d (64 x N) += a (64 x 16) * b (16 x N), N = 64, 128 or 256. Thread i of the warpgroup holds ("Register Fragments",
// accumulator D) rows i / 32 * 16 + i % 32 / 4 + 8 h and columns 8 j + i % 4 * 2 + e in d[4 j + 2 h + e], h, e = 0, 1.
template <class T, int N, Major A, Major B>
DYN_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 64 || N == 128 || N == 256);
  if constexpr (std::is_same_v<T, Half>) {
    if constexpr (N == 64)
      DYN_WGMMA("m64n64k16", "f16", DYN_D32, DYN_IO32(0), "%32", "%33", "%34", "%35", "%36");
    else if constexpr (N == 128)
      DYN_WGMMA("m64n128k16", "f16", DYN_D64, DYN_IO64(0), "%64", "%65", "%66", "%67", "%68");
    else
      DYN_WGMMA("m64n256k16", "f16", DYN_D128, DYN_IO128, "%128", "%129", "%130", "%131", "%132");
  } else {
    if constexpr (N == 64)
      DYN_WGMMA("m64n64k16", "bf16", DYN_D32, DYN_IO32(0), "%32", "%33", "%34", "%35", "%36");
    else if constexpr (N == 128)
      DYN_WGMMA("m64n128k16", "bf16", DYN_D64, DYN_IO64(0), "%64", "%65", "%66", "%67", "%68");
    else
      DYN_WGMMA("m64n256k16", "bf16", DYN_D128, DYN_IO128, "%128", "%129", "%130", "%131", "%132");
  }
}

#undef DYN_WGMMA
#undef DYN_D128
#undef DYN_D64
#undef DYN_D32
#undef DYN_IO128
#undef DYN_IO64
#undef DYN_IO32
#undef DYN_IO8

#endif

// Two elements in a register, the first in the low half.
template <class T>
DYN_DEVICE uint32_t pack(float first, float second) {
  const T pair[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t packed;
  memcpy(&packed, pair, 4);
  return packed;
}

}  // namespace dynaprune::cuda::sm90
