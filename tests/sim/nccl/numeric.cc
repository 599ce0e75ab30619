// See numeric.h. Pure arithmetic: touches no communicator, no socket, no driver.
#include "numeric.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "nccl_api.h"

namespace simnccl {

size_t type_size(int type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 0;
  }
}

namespace {

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

float half_to_float(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t exponent = (bits >> 10) & 0x1f;
  uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0x1f) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  float magnitude = std::ldexp(float(mantissa), -24);
  return sign ? -magnitude : magnitude;
}

uint16_t float_to_half(float value) {
  uint32_t bits = float_bits(value);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds beyond 65504
  if (magnitude < 0x38800000u) {                                  // subnormal or zero: adding 0.5 rounds at 2^-24
    float shifted = bits_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_bits(shifted) - 0x3f000000u));
  }
  uint32_t odd = (magnitude >> 13) & 1;
  magnitude += 0xfffu + odd - (112u << 23);
  return uint16_t(sign | (magnitude >> 13));
}

float bfloat_to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

uint16_t float_to_bfloat(float value) {
  uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float fp8_to_float(uint8_t bits, int exponent_bits) {
  int mantissa_bits = 7 - exponent_bits;
  int bias = (1 << (exponent_bits - 1)) - 1;
  int exponent = (bits & 0x7f) >> mantissa_bits;
  int mantissa = bits & ((1 << mantissa_bits) - 1);
  float magnitude;
  if (exponent_bits == 4 ? (bits & 0x7f) == 0x7f : exponent == 31 && mantissa != 0) {
    return bits_float(0x7fffffffu);
  } else if (exponent_bits == 5 && exponent == 31) {
    magnitude = bits_float(0x7f800000u);
  } else if (exponent == 0) {
    magnitude = std::ldexp(float(mantissa), 1 - bias - mantissa_bits);
  } else {
    magnitude = std::ldexp(float((1 << mantissa_bits) | mantissa), exponent - bias - mantissa_bits);
  }
  return (bits & 0x80) ? -magnitude : magnitude;
}

uint8_t float_to_fp8(float value, int exponent_bits) {
  int mantissa_bits = 7 - exponent_bits;
  int bias = (1 << (exponent_bits - 1)) - 1;
  uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return 0x7f;
  uint8_t largest = exponent_bits == 4 ? 0x7e : 0x7b;
  float magnitude = std::fabs(value);
  if (magnitude >= fp8_to_float(largest, exponent_bits)) return uint8_t(sign | largest);  // finite results saturate
  if (magnitude == 0) return sign;
  int exponent = std::ilogb(magnitude);
  if (exponent < 1 - bias) exponent = 1 - bias;
  int scaled = int(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
  // A subnormal has no hidden bit; a mantissa that rounds up carries into the exponent by plain addition.
  int code = scaled + ((exponent + bias - 1) << mantissa_bits);
  return uint8_t(sign | (code > largest ? largest : code));
}

namespace {

template <class T>
T load_raw(const uint8_t* from, size_t index) {
  T value;
  std::memcpy(&value, from + index * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void store_raw(void* to, size_t index, T value) {
  std::memcpy(static_cast<uint8_t*>(to) + index * sizeof(T), &value, sizeof(T));
}

template <class Acc>
Acc multiply(Acc a, Acc b) {
  if constexpr (std::is_integral_v<Acc>) {
    return Acc(uint64_t(a) * uint64_t(b));
  } else {
    return a * b;
  }
}

template <class Acc>
Acc add(Acc a, Acc b) {
  if constexpr (std::is_integral_v<Acc>) {
    return Acc(uint64_t(a) + uint64_t(b));
  } else {
    return a + b;
  }
}

// To nearest even with so many bits behind the point and no exponent below `least`. Overflow is left to the caller.
double round_to(double value, int bits, int least) {
  if (!std::isfinite(value) || value == 0) return value;
  int shift = bits - std::max(std::ilogb(value), least);
  return std::ldexp(std::nearbyint(std::ldexp(value, shift)), -shift);
}

float as_half(double value) { return half_to_float(float_to_half(float(round_to(value, 10, -14)))); }
float as_bfloat(double value) { return bfloat_to_float(float_to_bfloat(float(round_to(value, 7, -126)))); }

// The product of an element and its rank's scalar; `round` makes a value of the type of an exact product.
template <class Acc, class Round>
Acc scaled(Acc value, const Operand& operand, Round round) {
  if constexpr (std::is_integral_v<Acc>) {
    return multiply(value, Acc(operand.iscale));
  } else {
    return round(double(value) * operand.scale);
  }
}

template <class Acc, class Load, class Store, class Round>
bool fold(int op, const std::vector<Operand>& in, size_t count, Load load, Store store, Round round) {
  for (size_t i = 0; i < count; ++i) {
    Acc acc = load(in[0].data, i);
    if (op == kPreMulSum) acc = scaled(acc, in[0], round);
    for (size_t r = 1; r < in.size(); ++r) {
      Acc next = load(in[r].data, i);
      switch (op) {
        case ncclSum:
        case ncclAvg:
          acc = add(acc, next);
          break;
        case ncclProd:
          acc = multiply(acc, next);
          break;
        case ncclMax:
          acc = acc < next ? next : acc;
          break;
        case ncclMin:
          acc = next < acc ? next : acc;
          break;
        case kPreMulSum:
          acc = add(acc, scaled(next, in[r], round));
          break;
        default:
          return false;
      }
    }
    if (op == ncclAvg) acc = Acc(acc / Acc(in.size()));
    store(i, acc);
  }
  return op >= 0 && op <= kPreMulSum;
}

template <class T>
bool fold_plain(int op, const std::vector<Operand>& in, size_t count, void* out) {
  return fold<T>(
      op, in, count, load_raw<T>, [out](size_t i, T value) { store_raw(out, i, value); },
      [](double product) { return T(product); });
}

template <class Bits, class Decode, class Encode, class Round>
bool fold_small(int op, const std::vector<Operand>& in, size_t count, void* out, Decode decode, Encode encode,
                Round round) {
  return fold<float>(
      op, in, count, [&](const uint8_t* from, size_t i) { return decode(load_raw<Bits>(from, i)); },
      [&](size_t i, float value) { store_raw<Bits>(out, i, encode(value)); }, round);
}

}  // namespace

bool reduce(int type, int op, const std::vector<Operand>& in, size_t count, void* out) {
  if (in.empty()) return false;
  switch (type) {
    case ncclInt8:
      return fold_plain<int8_t>(op, in, count, out);
    case ncclUint8:
      return fold_plain<uint8_t>(op, in, count, out);
    case ncclInt32:
      return fold_plain<int32_t>(op, in, count, out);
    case ncclUint32:
      return fold_plain<uint32_t>(op, in, count, out);
    case ncclInt64:
      return fold_plain<int64_t>(op, in, count, out);
    case ncclUint64:
      return fold_plain<uint64_t>(op, in, count, out);
    case ncclFloat32:
      return fold_plain<float>(op, in, count, out);
    case ncclFloat64:
      return fold_plain<double>(op, in, count, out);
    case ncclFloat16:
      return fold_small<uint16_t>(op, in, count, out, half_to_float, float_to_half, as_half);
    case ncclBfloat16:
      return fold_small<uint16_t>(op, in, count, out, bfloat_to_float, float_to_bfloat, as_bfloat);
    case ncclFloat8e4m3:
      return fold_small<uint8_t>(
          op, in, count, out, [](uint8_t bits) { return fp8_to_float(bits, 4); },
          [](float value) { return float_to_fp8(value, 4); },
          [](double product) { return fp8_to_float(float_to_fp8(as_half(product), 4), 4); });
    case ncclFloat8e5m2:
      return fold_small<uint8_t>(
          op, in, count, out, [](uint8_t bits) { return fp8_to_float(bits, 5); },
          [](float value) { return float_to_fp8(value, 5); },
          [](double product) { return fp8_to_float(float_to_fp8(as_half(product), 5), 5); });
    default:
      return false;
  }
}

void read_scalar(int type, const void* from, double* scale, int64_t* iscale) {
  auto bytes = static_cast<const uint8_t*>(from);
  switch (type) {
    case ncclInt8:
      *iscale = load_raw<int8_t>(bytes, 0);
      break;
    case ncclUint8:
      *iscale = load_raw<uint8_t>(bytes, 0);
      break;
    case ncclInt32:
      *iscale = load_raw<int32_t>(bytes, 0);
      break;
    case ncclUint32:
      *iscale = load_raw<uint32_t>(bytes, 0);
      break;
    case ncclInt64:
    case ncclUint64:
      *iscale = load_raw<int64_t>(bytes, 0);
      break;
    case ncclFloat16:
      *scale = half_to_float(load_raw<uint16_t>(bytes, 0));
      break;
    case ncclBfloat16:
      *scale = bfloat_to_float(load_raw<uint16_t>(bytes, 0));
      break;
    case ncclFloat32:
      *scale = load_raw<float>(bytes, 0);
      break;
    case ncclFloat64:
      *scale = load_raw<double>(bytes, 0);
      break;
    case ncclFloat8e4m3:
      *scale = fp8_to_float(bytes[0], 4);
      break;
    case ncclFloat8e5m2:
      *scale = fp8_to_float(bytes[0], 5);
      break;
    default:
      break;
  }
}

}  // namespace simnccl
