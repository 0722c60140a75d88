// The emulated machine's numbers: half precision, bfloat16 and TF32 from and to float32, as on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sdattn::cuda::emulated {

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = magnitude << 13 | 0x7f800000u;
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    bits = bits_of_float(static_cast<float>(magnitude) * (1.0f / 16777216.0f));
  }
  return float_of_bits(bits | sign);
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below the smallest normal number the unit is 2^-24, whatever the exponent; nearbyint rounds to even.
    const float positive = float_of_bits(magnitude);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(positive * 16777216.0f)));
  }
  const uint32_t rounded = magnitude + 0x0fffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

inline float bfloat16_to_float(uint16_t x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float tf32_to_float(uint32_t x) { return float_of_bits(x & 0xffffe000u); }

}  // namespace sdattn::cuda::emulated
