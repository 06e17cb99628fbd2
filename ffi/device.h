// What a text for both platforms needs to name: device functions, loops to unroll, and powers of two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LPLB_DEVICE __device__ __forceinline__
#define LPLB_INLINE __host__ __device__ inline
#else
#define LPLB_DEVICE inline
#define LPLB_INLINE inline
#endif

#ifdef __CUDA_ARCH__
#define LPLB_UNROLL _Pragma("unroll")
#define LPLB_UNROLL_BY(n) _Pragma(LPLB_STRING(unroll n))
#define LPLB_STRING(text) #text
#else
#define LPLB_UNROLL
#define LPLB_UNROLL_BY(n)
#endif

namespace lplb {

// Bits by which loads of this sum are scaled: to below 2^30, where it is not above.
LPLB_DEVICE int scaling_bits(uint32_t total) {
#ifdef __CUDA_ARCH__
  const int zeros = __clz(static_cast<int>(total));
#else
  int zeros = 0;
  while (zeros < 32 && (total << zeros & 0x80000000u) == 0) ++zeros;
#endif
  return total != 0 && zeros > 2 ? zeros - 2 : 0;
}

// 2^exponent, from -126 on.
LPLB_INLINE float power_of_two(int exponent) {
#ifdef __CUDA_ARCH__
  return __int_as_float((127 + exponent) << 23);
#else
  return std::ldexp(1.0f, exponent);
#endif
}

LPLB_INLINE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}
LPLB_INLINE float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

// The exponent of the power of two that is next below a positive number, not less than 2^-126; 128 of infinity.
LPLB_INLINE int exponent_of(float value) { return (static_cast<int32_t>(bits_of(value)) >> 23) - 127; }

}  // namespace lplb
