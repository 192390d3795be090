// Portable vectors (GCC vector extensions) for one instruction set per translation unit.
//
// kernels_generic.cpp, kernels_avx2.cpp and kernels_avx512.cpp define one of DYNAPRUNE_ISA_GENERIC, DYNAPRUNE_ISA_AVX2
// or DYNAPRUNE_ISA_AVX512 and include all kernels, this file first: it includes the standard headers that kernels
// need, and from here on code is compiled for that set. Everything that emits code stays in DYNAPRUNE_ISA's unnamed
// namespace (internal linkage), and no std template may be used, so that no weak symbol with these encodings can reach
// an older CPU. What throws or uses the standard library is called, compiled for every CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "types.h"

#if defined(DYNAPRUNE_ISA_AVX512)
#define DYNAPRUNE_ISA avx512
#define DYNAPRUNE_VECTOR_BYTES 64
#define DYNAPRUNE_VECTOR_REGISTERS 32
#elif defined(DYNAPRUNE_ISA_AVX2)
#define DYNAPRUNE_ISA avx2
#define DYNAPRUNE_VECTOR_BYTES 32
#define DYNAPRUNE_VECTOR_REGISTERS 16
#elif defined(DYNAPRUNE_ISA_GENERIC)
#define DYNAPRUNE_ISA generic
#define DYNAPRUNE_VECTOR_BYTES 16
#if defined(__aarch64__)
#define DYNAPRUNE_VECTOR_REGISTERS 32
#else
#define DYNAPRUNE_VECTOR_REGISTERS 16
#endif
#else
#error "define DYNAPRUNE_ISA_AVX512, DYNAPRUNE_ISA_AVX2 or DYNAPRUNE_ISA_GENERIC before including simd.h"
#endif

#if !defined(DYNAPRUNE_ISA_GENERIC)
#if defined(__clang__)
#if defined(DYNAPRUNE_ISA_AVX512)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw"))), \
                             apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#endif
#elif defined(DYNAPRUNE_ISA_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif
#endif

#define DYNAPRUNE_INLINE inline __attribute__((always_inline))

namespace dynaprune::cpu::DYNAPRUNE_ISA {
namespace {

typedef float vfloat __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES)));
typedef float vfloat_u __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES), aligned(4), may_alias));
typedef double vdouble_u __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES), aligned(8), may_alias));
typedef uint32_t vuint __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES / 2)));
typedef uint16_t vhalf_u __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES / 2), aligned(2), may_alias));

// Num<T>: the type sums are kept in (float for float and bfloat16, double for double), its vector, and its lanes.
template <class T>
struct Num {
  typedef float Acc;
  typedef vfloat Vec;
};
template <>
struct Num<double> {
  typedef double Acc;
  typedef vdouble Vec;
};
template <class T>
constexpr int kLanes = DYNAPRUNE_VECTOR_BYTES / int(sizeof(typename Num<T>::Acc));

DYNAPRUNE_INLINE float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
DYNAPRUNE_INLINE uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

// Scalar conversions; to bfloat16 rounds to nearest even and keeps NaN.
DYNAPRUNE_INLINE float widen(float v) { return v; }
DYNAPRUNE_INLINE double widen(double v) { return v; }
DYNAPRUNE_INLINE float widen(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
DYNAPRUNE_INLINE void narrow(float v, float* out) { *out = v; }
DYNAPRUNE_INLINE void narrow(double v, double* out) { *out = v; }
DYNAPRUNE_INLINE void narrow(float v, bf16* out) {
  const uint32_t bits = float_to_bits(v);
  out->bits = v != v ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

DYNAPRUNE_INLINE vfloat splat(float v) { return v - vfloat{}; }
DYNAPRUNE_INLINE vdouble splat(double v) { return v - vdouble{}; }

// Full vectors, any alignment.
DYNAPRUNE_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_u*>(p); }
DYNAPRUNE_INLINE vdouble load(const double* p) { return *reinterpret_cast<const vdouble_u*>(p); }
DYNAPRUNE_INLINE vfloat load(const bf16* p) {
  const vhalf h = *reinterpret_cast<const vhalf_u*>(p);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}
DYNAPRUNE_INLINE void store(float* p, vfloat v) { *reinterpret_cast<vfloat_u*>(p) = v; }
DYNAPRUNE_INLINE void store(double* p, vdouble v) { *reinterpret_cast<vdouble_u*>(p) = v; }
DYNAPRUNE_INLINE void store(bf16* p, vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40;
  const vuint is_nan = (vuint)(v != v);
  const vuint chosen = (rounded & ~is_nan) | (quiet & is_nan);
  *reinterpret_cast<vhalf_u*>(p) = __builtin_convertvector(chosen, vhalf);
}

// The first n lanes, 0 <= n <= lanes; memory past them is not touched, lanes past them load as zero.
#if defined(DYNAPRUNE_ISA_AVX512)
DYNAPRUNE_INLINE vfloat load_partial(const float* p, int n) {
  return (vfloat)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
DYNAPRUNE_INLINE vdouble load_partial(const double* p, int n) {
  return (vdouble)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
DYNAPRUNE_INLINE vfloat load_partial(const bf16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  return (vfloat)(__builtin_convertvector((vhalf)h, vuint) << 16);
}
DYNAPRUNE_INLINE void store_partial(float* p, vfloat v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
DYNAPRUNE_INLINE void store_partial(double* p, vdouble v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#else
template <class T>
DYNAPRUNE_INLINE typename Num<T>::Vec load_partial(const T* p, int n) {
  T lane[kLanes<T>];
  __builtin_memset(lane, 0, sizeof(lane));
  for (int i = 0; i < n; ++i) lane[i] = p[i];
  return load(lane);
}
template <class T>
DYNAPRUNE_INLINE void store_partial(T* p, typename Num<T>::Vec v, int n) {
  T lane[kLanes<T>];
  store(lane, v);
  for (int i = 0; i < n; ++i) p[i] = lane[i];
}
#endif
#if defined(DYNAPRUNE_ISA_AVX512)
DYNAPRUNE_INLINE void store_partial(bf16* p, vfloat v, int n) {
  bf16 lane[kLanes<bf16>];
  store(lane, v);
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), h);
}
#endif

// Sum of the lanes in a fixed order: a halving tree.
DYNAPRUNE_INLINE float sum_lanes(vfloat v) {
  float lane[kLanes<float>];
  store(lane, v);
  for (int half = kLanes<float> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
DYNAPRUNE_INLINE double sum_lanes(vdouble v) {
  double lane[kLanes<double>];
  store(lane, v);
  for (int half = kLanes<double> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

DYNAPRUNE_INLINE vfloat absolute(vfloat v) { return (vfloat)((vuint)v & 0x7fffffffu); }
DYNAPRUNE_INLINE vdouble absolute(vdouble v) {
  typedef uint64_t vulong __attribute__((vector_size(DYNAPRUNE_VECTOR_BYTES)));
  return (vdouble)((vulong)v & 0x7fffffffffffffffull);
}

DYNAPRUNE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
DYNAPRUNE_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
DYNAPRUNE_INLINE void prefetch_for_write(void* p) { __builtin_prefetch(p, 1, 3); }

}  // namespace
}  // namespace dynaprune::cpu::DYNAPRUNE_ISA
