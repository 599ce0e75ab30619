// The sums that kernel_check expects, computed on the CPU by definition: values widened as doubles, added as f32 in
// rank order, rounded by nearbyint on multiples of the last place. Shares no code with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

enum Type { kF32, kF16, kBF16 };
const char* const kTypeNames[] = {"f32", "f16", "bf16"};
size_t size_of(Type type) { return type == kF32 ? 4 : 2; }

float widen(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int field = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = bits & ((1u << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> 15 ? -1 : 1;
  if (field == (1 << exponent_bits) - 1) {
    return static_cast<float>(fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                                            : sign * std::numeric_limits<double>::infinity());
  }
  if (field == 0) return static_cast<float>(sign * std::ldexp(fraction, 1 - bias - fraction_bits));
  return static_cast<float>(sign * std::ldexp(1 + std::ldexp(fraction, -fraction_bits), field - bias));
}

uint16_t narrow(float value, int exponent_bits, int fraction_bits) {
  if (std::isnan(value)) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << fraction_bits;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(magnitude)) return static_cast<uint16_t>(sign | infinity);
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent)));
  const uint32_t bits = (static_cast<uint32_t>(exponent + bias - 1) << fraction_bits) + units;
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

struct Tables {
  std::vector<float> f16 = std::vector<float>(65536), bf16 = std::vector<float>(65536);
  Tables() {
    for (uint32_t i = 0; i < 65536; i++) {
      f16[i] = widen(i, 5, 10);
      bf16[i] = widen(i, 8, 7);
    }
  }
};

float value_at(Type type, const uint8_t* bytes, size_t i) {
  static const Tables tables;
  if (type == kF32) {
    float value;
    std::memcpy(&value, bytes + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, bytes + 2 * i, 2);
  return type == kF16 ? tables.f16[bits] : tables.bf16[bits];
}

void store_sum(Type type, uint8_t* bytes, size_t i, float sum) {
  if (type == kF32) {
    uint32_t bits;
    std::memcpy(&bits, &sum, 4);
    if (std::isnan(sum)) bits = 0x7FFFFFFF;
    std::memcpy(bytes + 4 * i, &bits, 4);
  } else {
    const uint16_t bits = type == kF16 ? narrow(sum, 5, 10) : narrow(sum, 8, 7);
    std::memcpy(bytes + 2 * i, &bits, 2);
  }
}

using Bytes = std::vector<uint8_t>;

Bytes reference(Type type, const std::vector<Bytes>& in, size_t count) {
  Bytes out(count * size_of(type));
  for (size_t i = 0; i < count; i++) {
    float sum = value_at(type, in[0].data(), i);
    for (size_t r = 1; r < in.size(); r++) sum += value_at(type, in[r].data(), i);
    store_sum(type, out.data(), i, sum);
  }
  return out;
}

}  // namespace
