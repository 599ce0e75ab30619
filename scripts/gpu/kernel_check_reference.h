// The results that kernel_check expects, computed on the CPU by definition: floats widened as doubles, folded as f32 (f64:
// as f64) in rank order, rounded by nearbyint on multiples of the last place; integers modulo 2^bits. Shares no code with
// the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// Types and operations by NCCL's numbers.
enum Type { kI8, kU8, kI32, kU32, kI64, kU64, kF16, kF32, kF64, kBF16, kE4M3, kE5M2 };
enum Op { kSum, kProd, kMax, kMin, kAvg };
constexpr unsigned kTypes = 12, kOps = 5;
const char* const kTypeNames[] = {"i8", "u8", "i32", "u32", "i64", "u64", "f16", "f32", "f64", "bf16", "e4m3", "e5m2"};
const char* const kOpNames[] = {"sum", "prod", "max", "min", "avg"};

bool is_float(Type type) { return type >= kF16; }
bool specialised(Type type, Op op) { return op == kSum && (type == kF16 || type == kF32 || type == kBF16); }
// Any bits may be a value, so half of a line is payload.
bool half_lines(Type type) { return type != kF16 && type != kF32 && type != kBF16; }

size_t size_of(Type type) {
  switch (type) {
    case kI8: case kU8: case kE4M3: case kE5M2: return 1;
    case kF16: case kBF16: return 2;
    case kI32: case kU32: case kF32: return 4;
    default: return 8;
  }
}

struct Format {
  int exponent_bits, fraction_bits;
};

Format format_of(Type type) {
  switch (type) {
    case kF16: return {5, 10};
    case kBF16: return {8, 7};
    case kE4M3: return {4, 3};
    default: return {5, 2};
  }
}

float widen(Type type, uint32_t bits) {
  const auto [exponent_bits, fraction_bits] = format_of(type);
  const int field = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = bits & ((1u << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1 : 1;
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  if (type == kE4M3 && field == top && fraction == 7) return static_cast<float>(nan);  // its only NaN; no infinities
  if (type != kE4M3 && field == top) return static_cast<float>(fraction != 0 ? nan : sign * infinity);
  if (field == 0) return static_cast<float>(sign * std::ldexp(fraction, 1 - bias - fraction_bits));
  return static_cast<float>(sign * std::ldexp(1 + std::ldexp(fraction, -fraction_bits), field - bias));
}

uint32_t narrow(Type type, float value) {
  const auto [exponent_bits, fraction_bits] = format_of(type);
  const bool byte = size_of(type) == 1;
  if (std::isnan(value)) return byte ? 0x7F : 0x7FFF;
  const uint32_t sign = std::signbit(value) ? 1u << (exponent_bits + fraction_bits) : 0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  // The largest result: infinity, or for bytes the largest finite value.
  const uint32_t most = type == kE4M3 ? 0x7E : type == kE5M2 ? 0x7B : ((1u << exponent_bits) - 1) << fraction_bits;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(magnitude)) return sign | most;
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
  if (exponent > bias + 1) return sign | most;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent)));
  const uint32_t bits = (static_cast<uint32_t>(exponent + bias - 1) << fraction_bits) + units;
  return sign | std::min(bits, most);
}

struct Tables {
  std::vector<float> values[kTypes];
  Tables() {
    for (const Type type : {kF16, kBF16, kE4M3, kE5M2}) {
      values[type].resize(size_t{1} << (8 * size_of(type)));
      for (uint32_t i = 0; i < values[type].size(); i++) values[type][i] = widen(type, i);
    }
  }
};

uint64_t bits_at(Type type, const uint8_t* bytes, size_t i) {
  uint64_t bits = 0;
  std::memcpy(&bits, bytes + size_of(type) * i, size_of(type));
  return bits;
}

float value_of(Type type, uint64_t bits) {
  static const Tables tables;
  if (type != kF32) return tables.values[type][bits];
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint64_t bits_of(Type type, float value) {
  if (type != kF32) return narrow(type, value);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return std::isnan(value) ? 0x7FFFFFFF : bits;
}

bool is_nan(Type type, uint64_t bits) {
  if (!is_float(type)) return false;
  if (type != kF64) return std::isnan(value_of(type, bits));
  double value;
  std::memcpy(&value, &bits, 8);
  return std::isnan(value);
}

// Of a NaN and a number the number; +0 is more than -0.
template <typename F>
F larger(F a, F b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

template <typename F>
F fold_floats(Op op, const std::vector<F>& values) {
  F result = values[0];
  for (size_t r = 1; r < values.size(); r++) {
    switch (op) {
      case kProd: result *= values[r]; break;
      case kMax: result = larger(result, values[r]); break;
      case kMin: result = -larger(-result, -values[r]); break;
      default: result += values[r];
    }
  }
  return op == kAvg ? result / static_cast<F>(values.size()) : result;
}

template <typename T>
uint64_t fold_integers(Op op, const std::vector<uint64_t>& values) {
  auto result = static_cast<T>(values[0]);
  for (size_t r = 1; r < values.size(); r++) {
    const auto next = static_cast<T>(values[r]);
    switch (op) {
      case kProd: result = static_cast<T>(static_cast<uint64_t>(result) * static_cast<uint64_t>(next)); break;
      case kMax: result = std::max(result, next); break;
      case kMin: result = std::min(result, next); break;
      default: result = static_cast<T>(static_cast<uint64_t>(result) + static_cast<uint64_t>(next));
    }
  }
  if (op == kAvg) result = static_cast<T>(result / static_cast<T>(values.size()));
  return static_cast<uint64_t>(result);
}

uint64_t fold(Type type, Op op, const std::vector<uint64_t>& values) {
  switch (type) {
    case kI8: return fold_integers<int8_t>(op, values);
    case kU8: return fold_integers<uint8_t>(op, values);
    case kI32: return fold_integers<int32_t>(op, values);
    case kU32: return fold_integers<uint32_t>(op, values);
    case kI64: return fold_integers<int64_t>(op, values);
    case kU64: return fold_integers<uint64_t>(op, values);
    case kF64: {
      std::vector<double> wide(values.size());
      std::memcpy(wide.data(), values.data(), 8 * values.size());
      const double result = fold_floats(op, wide);
      uint64_t bits;
      std::memcpy(&bits, &result, 8);
      return bits;
    }
    default: {
      std::vector<float> wide(values.size());
      for (size_t r = 0; r < values.size(); r++) wide[r] = value_of(type, values[r]);
      return bits_of(type, fold_floats(op, wide));
    }
  }
}

using Bytes = std::vector<uint8_t>;

Bytes reference(Type type, Op op, const std::vector<Bytes>& in, size_t count) {
  const size_t size = size_of(type);
  Bytes out(count * size);
  std::vector<uint64_t> values(in.size());
  for (size_t i = 0; i < count; i++) {
    for (size_t r = 0; r < in.size(); r++) values[r] = bits_at(type, in[r].data(), i);
    const uint64_t result = fold(type, op, values);
    std::memcpy(out.data() + size * i, &result, size);
  }
  return out;
}

}  // namespace
