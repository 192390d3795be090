// Ampere's matrix and copy instructions behind names: PTX under nvcc, otherwise what they do, lane by lane.
//
// A fragment is 16 rows x 32 bytes of a matrix (16 elements of 16 bits or 8 of 32), four registers per lane, one for
// each quarter of 8 x 16 bytes. With g = lane / 4 and t = lane % 4, a lane holds elements 2t and 2t + 1 (of 32 bits: t)
// of row g of each quarter. A left operand has them in the order: upper left, lower left, upper right, lower right.
#pragma once

#include "core/device.h"

namespace dynaprune::cuda {

// Starts a copy of 16 bytes to shared memory; what lies beyond the first `bytes` (0 to 16) arrives as zeros and is not
// read. Both addresses are multiples of 16.
DYN_DEVICE void cp_async_16(void* shared, const void* global, int bytes = 16) {
#ifdef DYN_EMULATION
  emulation::copy_async(shared, global, 16, size_t(bytes));
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(global)),
               "r"(bytes)
               : "memory");
#endif
}

// Closes this thread's group of copies.
DYN_DEVICE void cp_async_commit() {
#ifdef DYN_EMULATION
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups are under way. Other threads' copies need a barrier as well.
template <int PENDING>
DYN_DEVICE void cp_async_wait() {
#ifdef DYN_EMULATION
  emulation::wait_copies(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l passes the address of row l % 8 of matrix l / 8.
DYN_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
#ifdef DYN_EMULATION
  const auto rows = emulation::exchange(row);
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&registers[matrix], static_cast<const char*>(rows[8 * matrix + lane() / 4]) + lane() % 4 * 4, 4);
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(from)
               : "memory");
#endif
}

// The same, each matrix transposed.
DYN_DEVICE void ldmatrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
#ifdef DYN_EMULATION
  const auto rows = emulation::exchange(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t element[2];
    for (int e = 0; e < 2; ++e) {
      const int column = lane() % 4 * 2 + e;
      std::memcpy(&element[e], static_cast<const char*>(rows[8 * matrix + column]) + lane() / 4 * 2, 2);
    }
    std::memcpy(&registers[matrix], element, 4);
  }
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(from)
               : "memory");
#endif
}

#ifdef DYN_EMULATION
namespace emulated {

struct Operands {
  uint32_t a[4], b[2];
};

// Element of the k-th column (of B: row) in a row's registers, as the tensor core sees it.
template <class T>
float element(const uint32_t* low_and_high, int k) {
  if constexpr (sizeof(T) == 2) {  // registers of columns 0..7 and 8..15
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&low_and_high[k / 8]) + k % 2 * 2, 2);
    return to_float(value);
  } else {  // tf32: the last 13 bits are ignored
    const uint32_t bits = low_and_high[k / 4] & 0xffffe000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
}

// d [16, 8] += a [16, K] b [K, 8]; a lane holds columns 2t and 2t + 1 of rows g and g + 8 of d.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kSum = 32 / sizeof(T), kPerLane = kSum / 8;  // elements summed; neighbours in one register
  const auto all = emulation::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int group = lane() / 4, inside = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = inside * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < kSum; ++k) {
      const int from = k / kPerLane % 4;
      const Operands& left = all[row % 8 * 4 + from];
      const uint32_t halves[2] = {left.a[row / 8], left.a[row / 8 + 2]};
      sum += double(element<T>(halves, k)) * element<T>(all[column * 4 + from].b, k);
    }
    d[i] = emulation::toward_zero(sum);
  }
}

}  // namespace emulated
#endif

// d [16, 8] += a [16, 32 bytes] b [32 bytes, 8] with float sums. b0 and b1 are the left and right quarters of eight
// rows of b's transpose. d[0], d[1]: row g, columns 2t and 2t + 1; d[2], d[3]: row g + 8.
template <class T>
DYN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef DYN_EMULATION
  emulated::mma<T>(d, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, Half>)
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (std::is_same_v<T, BFloat16>)
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

DYN_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

DYN_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to tf32 (10 bits of mantissa), to nearest, ties away from zero; the bits of a float.
DYN_DEVICE uint32_t to_tf32(float value) {
#ifdef DYN_EMULATION
  const uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
#else
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
#endif
}

}  // namespace dynaprune::cuda
