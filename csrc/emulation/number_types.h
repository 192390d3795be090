// float16 and bfloat16 by their bits, with CUDA's rounding: to nearest, ties to even, NaN to 0x7fff. And the tensor
// core's rounding of sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dynaprune::cuda::emulation {

// A sum as a tensor core leaves it in a float: cut off, not rounded to nearest (Fasi, Higham, Mikaitis and Pranesh
// 2021, "Numerical behavior of NVIDIA tensor cores", section 4). Chained sums lose up to a bit each, always inwards.
inline float toward_zero(double sum) {
  const float nearest = float(sum);
  const bool outwards = std::isfinite(nearest) && std::fabs(double(nearest)) > std::fabs(sum);
  return outwards ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(BFloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }

inline float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(float(mantissa) * 0x1p-24f));
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | mantissa << 13);
  return bits_as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // from 65520 on: infinity
  if (magnitude < 0x38800000)  // below 2^-14: a multiple of 2^-24, which is the last bit of a float in [0.5, 1)
    return sign | uint16_t(bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000);
  return sign | uint16_t((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

template <class T>
inline T from_float(float value) {
  if constexpr (std::is_same_v<T, Half>)
    return T{half_bits(value)};
  else
    return T{bfloat16_bits(value)};
}

}  // namespace dynaprune::cuda::emulation
