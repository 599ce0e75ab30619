// f16 conversions on integers, so that they do not depend on what the CPU or the compiler offers.
#include "host_ptx.h"

namespace twoshot::sim {

float float_of_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return mov_b32_f32(fraction != 0 ? 0x7FFFFFFFu : sign | 0x7F800000u);
  if (exponent == 0) {
    // Exact: at most ten significant bits.
    const float magnitude = static_cast<float>(fraction) * mov_b32_f32((127 - 24) << 23);
    return mov_b32_f32(sign | mov_f32_b32(magnitude));
  }
  return mov_b32_f32(sign | (exponent + 112) << 23 | fraction << 13);
}

uint32_t half_of(float value) {
  const uint32_t bits = mov_f32_b32(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7FFF;
  if (magnitude >= 0x47800000u) return sign | 0x7C00;  // 2^16 and above
  if (magnitude < 0x33000000u) return sign;            // below 2^-25: to zero; 2^-25 itself ties to zero further down
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t significand = (magnitude & 0x7FFFFF) | 0x800000;
  // Below 2^-14 the result is subnormal and loses one more bit per binary order.
  const unsigned drop = exponent < -14 ? static_cast<unsigned>(-1 - exponent) : 13;
  const uint32_t kept = significand >> drop, rest = significand & ((1u << drop) - 1), tie = 1u << (drop - 1);
  const uint32_t rounded = kept + (rest > tie || (rest == tie && (kept & 1) != 0) ? 1 : 0);
  // A normal number's implicit bit adds one to the exponent field; a carry adds another, up to infinity.
  const uint32_t field = exponent < -14 ? 0 : static_cast<uint32_t>(exponent + 14) << 10;
  return sign | (field + rounded);
}

}  // namespace twoshot::sim
