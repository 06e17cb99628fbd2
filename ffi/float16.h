// Floats of 16 bits on the CPU, kept as they are in memory: C++17 has no types of its own for them.
#pragma once

#include <cstdint>

#include "device.h"
#include "peer.h"

namespace lplb {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1f, rest = value.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_from_bits(sign | (exponent == 0x1f ? 0x7f800000u : (exponent + 112) << 23) | rest << 13);
}

// They round to the nearest, ties to the even one.
inline void store(float value, float* to) { *to = value; }
inline void store(float value, Bfloat16* to) {
  const uint32_t bits = bits_of(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void store(float value, Float16* to) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u, magnitude = bits_of(value) & 0x7fffffffu;
  uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {
    bits = 0x7c00;  // beyond the middle between the largest number and the next
  } else if (magnitude < 0x38800000u) {
    bits = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;  // the sum rounds to multiples of 2^-24
  } else {
    bits = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | bits);
}

template <class Visit>
auto visit_float(Float type, Visit visit) {
  return visit_float<Bfloat16, Float16>(type, visit);
}

}  // namespace lplb
