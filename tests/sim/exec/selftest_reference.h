// What the selftest compares with: sums by definition, on doubles, and what the switch may make of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// ---- the reference, on doubles and by definition -------------------------------------------------------------------

enum Type { kF32, kF16, kBF16 };
const char* const kTypeNames[] = {"f32", "f16", "bf16"};

// Value of a 16-bit float with so many exponent and fraction bits.
double widen(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int field = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = bits & ((1u << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> 15 ? -1 : 1;
  if (field == (1 << exponent_bits) - 1) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (field == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(1 + std::ldexp(fraction, -fraction_bits), field - bias);
}

// Rounds to nearest even: nearbyint on multiples of the last place.
uint16_t narrow(float value, int exponent_bits, int fraction_bits) {
  if (std::isnan(value)) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << fraction_bits);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(magnitude)) return sign | infinity;
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent)));
  const uint32_t bits = (static_cast<uint32_t>(exponent + bias - 1) << fraction_bits) + units;
  return static_cast<uint16_t>(sign | std::min<uint32_t>(bits, infinity));
}

float value_at(Type type, const uint8_t* bytes, size_t i) {
  if (type == kF32) {
    float value;
    std::memcpy(&value, bytes + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, bytes + 2 * i, 2);
  return static_cast<float>(type == kF16 ? widen(bits, 5, 10) : widen(bits, 8, 7));
}

// What may come out where the order of the additions and the last rounding are the switch's secret.
struct Range {
  bool nan = false, infinity = false;  // must be one
  bool overflow = false;               // may also be an infinity or, of several, a NaN
  double sum = 0, error = 0;
};

Range range_of(Type type, const std::vector<const uint8_t*>& in, size_t i) {
  Range range;
  bool positive = false, negative = false;
  double magnitude = 0;
  for (const uint8_t* rank : in) {
    const double value = static_cast<double>(value_at(type, rank, i));
    range.nan = range.nan || std::isnan(value);
    if (std::isinf(value)) (value > 0 ? positive : negative) = true;
    if (!std::isfinite(value)) continue;
    range.sum += value;
    magnitude += std::fabs(value);
  }
  range.nan = range.nan || (positive && negative);
  range.infinity = positive != negative;
  if (range.infinity) range.sum = positive ? 1 : -1;
  // Every addition may round, in f32; then the type's last place, up or down.
  range.error = static_cast<double>(in.size()) * std::ldexp(magnitude, -23);
  if (type == kF16) range.error += std::ldexp(std::fabs(range.sum), -10) + std::ldexp(1, -24);
  if (type == kBF16) range.error += std::ldexp(std::fabs(range.sum), -7) + std::ldexp(1, -133);
  if (type == kF32) range.error += std::ldexp(1, -149);
  range.overflow = magnitude > (type == kF16 ? 65000 : 3.3e38);
  return range;
}

bool within(Type type, const Range& range, const uint8_t* out, size_t i) {
  const double value = static_cast<double>(value_at(type, out, i));
  if (range.nan) return std::isnan(value);
  if (range.overflow && !std::isfinite(value)) return true;
  if (range.infinity) return std::isinf(value) && value * range.sum > 0;
  return std::fabs(value - range.sum) <= range.error;
}

void reference(Type type, const std::vector<const uint8_t*>& in, size_t count, uint8_t* out) {
  for (size_t i = 0; i < count; i++) {
    float sum = value_at(type, in[0], i);
    for (size_t r = 1; r < in.size(); r++) sum += value_at(type, in[r], i);
    if (type == kF32) {
      uint32_t bits;
      std::memcpy(&bits, &sum, 4);
      if (std::isnan(sum)) bits = 0x7FFFFFFF;
      std::memcpy(out + 4 * i, &bits, 4);
    } else {
      const uint16_t bits = type == kF16 ? narrow(sum, 5, 10) : narrow(sum, 8, 7);
      std::memcpy(out + 2 * i, &bits, 2);
    }
  }
}

}  // namespace
