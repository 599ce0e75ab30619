// f16 and fp8 conversions on integers, so that they do not depend on what the CPU or the compiler offers.
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

uint32_t half_of_e4m3(uint32_t byte) {
  const uint32_t sign = (byte & 0x80) << 8, exponent = byte >> 3 & 15, fraction = byte & 7;
  if ((byte & 0x7F) == 0x7F) return 0x7FFF;
  // 2^-9 times the fraction: exact.
  if (exponent == 0) return sign | half_of(static_cast<float>(fraction) / 512);
  return sign | (exponent + 8) << 10 | fraction << 7;
}

uint32_t fp8_of(float value, unsigned exponent_bits) {
  const uint32_t bits = mov_f32_b32(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7F;
  const unsigned fraction_bits = 7 - exponent_bits;
  const int least = 2 - (1 << (exponent_bits - 1));  // exponent of the smallest normal number and of subnormals
  const uint32_t most = exponent_bits == 4 ? 0x7E : 0x7B;
  int exponent = static_cast<int>(magnitude >> 23) - 127;
  if (exponent > 15) return sign | most;
  if (exponent < least - 5) return sign;  // less than half of the smallest subnormal
  const uint32_t significand = (magnitude & 0x7FFFFF) | 0x800000;
  const unsigned drop = 23 - fraction_bits + (exponent < least ? static_cast<unsigned>(least - exponent) : 0);
  const uint32_t kept = significand >> drop, rest = significand & ((1u << drop) - 1), tie = 1u << (drop - 1);
  const uint32_t rounded = kept + (rest > tie || (rest == tie && (kept & 1) != 0) ? 1 : 0);
  // As in half_of: the implicit bit and a carry both add to the exponent field.
  const uint32_t field = exponent < least ? 0 : static_cast<uint32_t>(exponent - least) << fraction_bits;
  return sign | (field + rounded > most ? most : field + rounded);
}

}  // namespace twoshot::sim
