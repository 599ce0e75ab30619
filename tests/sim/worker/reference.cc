// See reference.h. Pure computation.
#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>

#include "nccl_api.h"

namespace worker {
namespace {

struct Name {
  const char* name;
  int value;
};

constexpr Name kTypes[] = {{"i8", ncclInt8},     {"u8", ncclUint8},    {"i32", ncclInt32},    {"u32", ncclUint32},
                           {"i64", ncclInt64},   {"u64", ncclUint64},  {"f16", ncclFloat16},  {"f32", ncclFloat32},
                           {"f64", ncclFloat64}, {"bf16", ncclBfloat16},
                           {"e4m3", ncclFloat8e4m3}, {"e5m2", ncclFloat8e5m2}};
constexpr Name kOps[] = {{"sum", ncclSum}, {"prod", ncclProd}, {"max", ncclMax}, {"min", ncclMin}, {"avg", ncclAvg}};

struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool infinity;
};

Format format_of(int type) {
  switch (type) {
    case ncclFloat16:
      return {5, 10, true};
    case ncclBfloat16:
      return {8, 7, true};
    case ncclFloat8e4m3:
      return {4, 3, false};
    case ncclFloat8e5m2:
      return {5, 2, true};
    default:
      return {8, 23, true};
  }
}

// The smallest value above zero: what rounding errs by there.
double least_of(int type) {
  if (type == ncclFloat64) return std::ldexp(1.0, -1074);
  Format f = format_of(type);
  return std::ldexp(1.0, 2 - (1 << (f.exponent_bits - 1)) - f.mantissa_bits);
}

float slow_decode(int type, uint64_t bits) {
  Format f = format_of(type);
  int exponent = int(bits >> f.mantissa_bits) & ((1 << f.exponent_bits) - 1);
  uint64_t mantissa = bits & ((uint64_t(1) << f.mantissa_bits) - 1);
  bool negative = (bits >> (f.exponent_bits + f.mantissa_bits)) & 1;
  int top = (1 << f.exponent_bits) - 1;
  int bias = top / 2;
  double value;
  if (f.infinity && exponent == top) {
    value = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
  } else if (!f.infinity && exponent == top && mantissa == 7) {
    value = std::nan("");
  } else if (exponent == 0) {
    value = std::ldexp(double(mantissa), 1 - bias - f.mantissa_bits);
  } else {
    value = std::ldexp(double(mantissa) + std::ldexp(1.0, f.mantissa_bits), exponent - bias - f.mantissa_bits);
  }
  return float(negative ? -value : value);
}

std::vector<float> decode_all(int type, size_t patterns) {
  std::vector<float> t(patterns);
  for (uint32_t i = 0; i < t.size(); ++i) t[i] = slow_decode(type, i);
  return t;
}

const std::vector<float>& table_of(int type) {
  static const std::vector<float> half = decode_all(ncclFloat16, 65536);
  static const std::vector<float> brain = decode_all(ncclBfloat16, 65536);
  static const std::vector<float> e4m3 = decode_all(ncclFloat8e4m3, 256);
  static const std::vector<float> e5m2 = decode_all(ncclFloat8e5m2, 256);
  return type == ncclFloat16 ? half : type == ncclBfloat16 ? brain : type == ncclFloat8e4m3 ? e4m3 : e5m2;
}

// Elements that are worth a thread of their own.
constexpr size_t kShare = 1 << 16;

// Calls `work(first, end, part)` for consecutive parts of [0, count), at once where they are large and there are cores: half
// of them, because ranks are often two processes of a host. At most `kParts`.
constexpr size_t kParts = 16;
template <class Work>
void in_parts(size_t count, const Work& work) {
  size_t cores = std::max(2u, std::thread::hardware_concurrency()) / 2;
  size_t parts = std::min({cores, kParts, std::max(count / kShare, size_t(1))});
  std::vector<std::thread> threads;
  for (size_t p = 1; p < parts; ++p) {
    threads.emplace_back([&work, count, parts, p] { work(count * p / parts, count * (p + 1) / parts, p); });
  }
  work(size_t(0), count / parts, size_t(0));
  for (std::thread& thread : threads) thread.join();
}

uint32_t special_bits(int type, uint64_t pick) {
  // Zeros, subnormals, the largest finite values, infinities, NaNs, and the words a polling protocol may reserve.
  static const uint32_t wide[] = {0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007fffff, 0x00800000, 0x7f7fffff,
                                  0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0x7fffffff, 0xffffffff, 0xfffafffa,
                                  0xfffafffb, 0xfffa0000, 0x0000fffa, 0x3f800000, 0xbf800000, 0x33800000};
  static const uint32_t half[] = {0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00,
                                  0x7e00, 0x7fff, 0xffff, 0xfffa, 0xfffb, 0x3c00, 0xbc00, 0x1000, 0x0200, 0xfffa};
  static const uint32_t brain[] = {0x0000, 0x8000, 0x0001, 0x8001, 0x007f, 0x0080, 0x7f7f, 0xff7f, 0x7f80, 0xff80,
                                   0x7fc0, 0x7fff, 0xffff, 0xfffa, 0xfffb, 0x3f80, 0xbf80, 0x3b80, 0x0040, 0xfffa};
  static const uint32_t e4m3[] = {0x00, 0x80, 0x01, 0x81, 0x07, 0x08, 0x7e, 0xfe, 0x7f, 0xff, 0xfa, 0x38, 0xb8};
  static const uint32_t e5m2[] = {0x00, 0x80, 0x01, 0x81, 0x03, 0x04, 0x7b, 0xfb, 0x7c, 0xfc, 0x7f, 0xfa, 0x3c};
  if (type == ncclFloat8e4m3) return e4m3[pick % 13];
  if (type == ncclFloat8e5m2) return e5m2[pick % 13];
  pick %= 20;
  return type == ncclFloat32 ? wide[pick] : type == ncclFloat16 ? half[pick] : brain[pick];
}

template <class T>
T integer_fold(int op, const std::vector<uint64_t>& values) {
  T acc = T(values[0]);
  for (size_t r = 1; r < values.size(); ++r) {
    T next = T(values[r]);
    if (op == ncclSum || op == ncclAvg) acc = T(uint64_t(acc) + uint64_t(next));
    if (op == ncclProd) acc = T(uint64_t(acc) * uint64_t(next));
    if (op == ncclMax && next > acc) acc = next;
    if (op == ncclMin && next < acc) acc = next;
  }
  if (op == ncclAvg) acc = T(acc / T(values.size()));
  return acc;
}

template <class F>
F float_fold(int op, const std::vector<F>& values) {
  F acc = values[0];
  for (size_t r = 1; r < values.size(); ++r) {
    F next = values[r];
    if (op == ncclSum || op == ncclAvg) acc = acc + next;
    if (op == ncclProd) acc = acc * next;
    // Of a NaN and a number the number; fmax differs for signaling ones.
    if (op == ncclMax && (acc != acc || next > acc)) acc = next;
    if (op == ncclMin && (acc != acc || next < acc)) acc = next;
  }
  return op == ncclAvg ? acc / F(values.size()) : acc;
}

uint64_t load(const uint8_t* from, size_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, from, bytes);  // little-endian hosts only, as NCCL
  return value;
}

double number(int type, uint64_t bits) {
  switch (type) {
    case ncclFloat64: {
      double value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    default:
      return decode(type, bits);
  }
}

}  // namespace

uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
  return value ^ (value >> 31);
}

void Digest::add(const uint8_t* data, size_t bytes) {
  any_ = true;
  for (size_t at = 0; at < bytes;) {
    size_t have = length_ % 8;
    size_t taken = std::min(8 - have, bytes - at);
    uint64_t next = 0;
    std::memcpy(&next, data + at, taken);
    word_ |= next << (8 * have);
    if (have + taken == 8) {
      hash_ = step(hash_, word_);
      word_ = 0;
    }
    length_ += taken;
    at += taken;
  }
}

int type_by_name(const std::string& name) {
  for (const Name& entry : kTypes) {
    if (name == entry.name) return entry.value;
  }
  return -1;
}

int op_by_name(const std::string& name) {
  for (const Name& entry : kOps) {
    if (name == entry.name) return entry.value;
  }
  return -1;
}

size_t type_bytes(int type) {
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
    default:
      return 8;
  }
}

bool is_float(int type) {
  return type == ncclFloat16 || type == ncclFloat32 || type == ncclFloat64 || type == ncclBfloat16 ||
         type == ncclFloat8e4m3 || type == ncclFloat8e5m2;
}

float decode(int type, uint64_t bits) {
  if (type == ncclFloat16 || type == ncclBfloat16) return table_of(type)[bits & 0xffff];
  if (type != ncclFloat32) return table_of(type)[bits & 0xff];
  uint32_t word = uint32_t(bits);
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

uint64_t encode(int type, double value) {
  if (type == ncclFloat32) {
    float narrow = float(value);
    uint32_t word;
    std::memcpy(&word, &narrow, sizeof word);
    return word;
  }
  Format f = format_of(type);
  uint64_t sign = uint64_t(std::signbit(value) ? 1 : 0) << (f.exponent_bits + f.mantissa_bits);
  uint64_t top = (uint64_t(1) << f.exponent_bits) - 1;
  if (std::isnan(value)) return f.infinity ? (top << f.mantissa_bits) | 1 : 0x7f;
  int bias = int(top) / 2;
  double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  int exponent = std::isinf(value) ? 1000 : std::ilogb(magnitude);
  if (exponent < 1 - bias) exponent = 1 - bias;
  // In units of the last place; the default rounding mode is to nearest even.
  double units = std::isinf(value) ? 0 : std::nearbyint(std::ldexp(magnitude, f.mantissa_bits - exponent));
  if (units >= std::ldexp(2.0, f.mantissa_bits)) {
    units /= 2;
    ++exponent;
  }
  int largest = f.infinity ? int(top) - 1 : int(top);
  bool over = exponent + bias > largest || (!f.infinity && exponent + bias == largest && units > 14);
  if (over) {
    bool saturates = type == ncclFloat8e4m3 || type == ncclFloat8e5m2;
    if (!saturates) return sign | (top << f.mantissa_bits);
    return sign | (type == ncclFloat8e4m3 ? 0x7e : 0x7b);
  }
  double hidden = std::ldexp(1.0, f.mantissa_bits);
  if (units < hidden) return sign | uint64_t(units);  // subnormal
  return sign | (uint64_t(exponent + bias) << f.mantissa_bits) | uint64_t(units - hidden);
}

uint64_t element(const Payload& payload, int type, int rank, uint64_t index) {
  index += payload.first;
  if (payload.kind == Payload::kWords) {
    size_t halves = type == ncclFloat32 ? 1 : 2;
    uint32_t word = payload.words[(index / halves + size_t(rank) * payload.call) % payload.words.size()];
    return halves == 1 ? word : word >> (16 * (index % 2)) & 0xffff;
  }
  if (payload.kind == Payload::kPairs) {
    uint64_t byte = (rank % 2 ? index >> 8 : index) & 0xff;
    // Further ranks hold others, or every result would soon be one of few.
    return (byte + uint64_t(rank / 2) * 0x35) & 0xff;
  }
  if (payload.kind == Payload::kPattern) {
    if (rank != payload.carrier) return payload.filler;
    if (type == ncclFloat32) return special_bits(type, mix(index / 2 + payload.phase * 977));
    return index % 2 == payload.phase % 2 ? (index / 2) & 0xffff : payload.filler;
  }
  uint64_t h = mix(mix(payload.seed * 0x9e3779b97f4a7c15ull + payload.call) + mix(uint64_t(rank) + 77) +
                   index * 0xd1342543de82ef95ull);
  uint64_t kind = h >> 60;
  switch (type) {
    case ncclFloat16:
    case ncclBfloat16:
      if (payload.special && kind == 0) return h & 0xffff;
      if (payload.special && kind == 1) return special_bits(type, h >> 20);
      if (type == ncclFloat16) return (h & 0x83ff) | ((12 + ((h >> 20) & 3)) << 10);
      return (h & 0x807f) | ((124 + ((h >> 20) & 3)) << 7);
    case ncclFloat32:
      if (payload.special && kind == 0) return h & 0xffffffff;
      if (payload.special && kind == 1) return special_bits(type, h >> 20);
      return (h & 0x807fffff) | ((124 + ((h >> 32) & 3)) << 23);
    case ncclFloat64: {
      if (payload.special && kind == 0) return mix(h);
      // The halves of one are words that a polling protocol may reserve.
      if (payload.special && kind == 1) {
        return uint64_t(special_bits(ncclFloat32, h >> 20)) << 32 | special_bits(ncclFloat32, h >> 28);
      }
      double value = double(int64_t(h >> 11)) / double(uint64_t(1) << 52) - 1.0;
      uint64_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      return bits;
    }
    case ncclFloat8e4m3:
      if (payload.special && kind == 0) return h & 0xff;
      if (payload.special && kind == 1) return special_bits(type, h >> 20);
      return (h & 0x87) | ((5 + ((h >> 20) & 1)) << 3);
    case ncclFloat8e5m2:
      if (payload.special && kind == 0) return h & 0xff;
      if (payload.special && kind == 1) return special_bits(type, h >> 20);
      return (h & 0x83) | ((14 + ((h >> 20) & 1)) << 2);
    case ncclInt8:
    case ncclUint8:
      // Bytes of words that a polling protocol may reserve.
      if (payload.special && kind <= 3) return index % 4 >= 2 ? 0xff : 0xfa;
      return h & 0xff;
    case ncclInt64:
    case ncclUint64:
      if (payload.special && kind == 0) return uint64_t(0xfffafffa) << 32 | 0xfffafffa;
      if (payload.special && kind == 1) return h << 32 | special_bits(ncclFloat32, h >> 20);
      if (payload.special && kind == 2) return uint64_t(special_bits(ncclFloat32, h >> 20)) << 32 | (h & 0xffffffff);
      return h;
    default:
      if (payload.special && kind <= 1) return special_bits(ncclFloat32, h >> 20);
      return type_bytes(type) == 8 ? h : h & ((uint64_t(1) << (8 * type_bytes(type))) - 1);
  }
}

Bytes make_input(const Payload& payload, int type, int rank, size_t first, size_t count) {
  size_t bytes = type_bytes(type);
  Bytes out(count * bytes);
  in_parts(count, [&](size_t begin, size_t end, size_t) {
    for (size_t i = begin; i < end; ++i) {
      uint64_t bits = element(payload, type, rank, first + i);
      std::memcpy(out.data() + i * bytes, &bits, bytes);
    }
  });
  return out;
}

uint64_t factor_of(const Payload& payload, int type, int rank, bool each) {
  if (each) return (payload.call + uint64_t(rank) * 0x35) & 0xff;
  // The elements of a payload of its own: those that a call may be asked to move are those that a factor may be.
  Payload own;
  own.seed = payload.seed + 0x5ca1e;
  own.call = payload.call;
  own.special = payload.special;
  uint64_t bits = element(own, type, rank, 0);
  size_t bytes = type_bytes(type);
  return bytes == 8 ? bits : bits & ((uint64_t(1) << (8 * bytes)) - 1);
}

// Products of the types up to f32 are exact in double, so rounding them once is rounding the product once.
uint64_t product(int type, uint64_t a, uint64_t b) {
  if (!is_float(type)) return a * b;
  double value = number(type, a) * number(type, b);
  if (type == ncclFloat64) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
  // NCCL multiplies these in f16.
  bool narrow = type == ncclFloat8e4m3 || type == ncclFloat8e5m2;
  return encode(type, narrow ? double(decode(ncclFloat16, encode(ncclFloat16, value))) : value);
}

Expectation reduce_reference(const Payload& payload, int type, int op, int ranks, size_t first, size_t count,
                             const std::vector<uint64_t>& factors, bool magnitudes) {
  size_t bytes = type_bytes(type);
  Expectation expected;
  expected.bits.resize(count * bytes);
  magnitudes = magnitudes && is_float(type);
  if (magnitudes) expected.magnitude.resize(count);
  in_parts(count, [&](size_t begin, size_t end, size_t) {
    std::vector<uint64_t> raw(static_cast<size_t>(ranks));
    std::vector<float> narrow(raw.size());
    std::vector<double> wide(raw.size());
    for (size_t i = begin; i < end; ++i) {
      for (int r = 0; r < ranks; ++r) {
        raw[size_t(r)] = element(payload, type, r, first + i);
        if (!factors.empty()) raw[size_t(r)] = product(type, raw[size_t(r)], factors.at(size_t(r)));
      }
      uint64_t result = 0;
      if (type == ncclFloat64) {
        for (size_t r = 0; r < raw.size(); ++r) wide[r] = number(type, raw[r]);
        double value = float_fold(op, wide);
        std::memcpy(&result, &value, sizeof value);
      } else if (is_float(type)) {
        for (size_t r = 0; r < raw.size(); ++r) narrow[r] = decode(type, raw[r]);
        result = encode(type, float_fold(op, narrow));
      } else {
        switch (type) {
          case ncclInt8:
            result = uint64_t(integer_fold<int8_t>(op, raw));
            break;
          case ncclUint8:
            result = integer_fold<uint8_t>(op, raw);
            break;
          case ncclInt32:
            result = uint64_t(integer_fold<int32_t>(op, raw));
            break;
          case ncclUint32:
            result = integer_fold<uint32_t>(op, raw);
            break;
          case ncclInt64:
            result = uint64_t(integer_fold<int64_t>(op, raw));
            break;
          default:
            result = integer_fold<uint64_t>(op, raw);
            break;
        }
      }
      std::memcpy(expected.bits.data() + i * bytes, &result, bytes);
      if (magnitudes) {
        double sum = 0;
        for (uint64_t bits : raw) sum += std::fabs(number(type, bits));
        expected.magnitude[i] = sum;
      }
    }
  });
  return expected;
}

namespace {

// The largest finite value.
double most(int type) { return type == ncclFloat16 ? 65504.0 : type == ncclBfloat16 ? 3.3895e38 : 3.4028e38; }

// Whether `b` can be a sum of values whose sum in rank order is `a` and whose magnitudes add up to `magnitude`, added in
// f32 in any order and rounded to the type once, up or down. As docs/numerics.md states it.
bool summed_in_any_order(int type, double a, double b, double magnitude, int ranks) {
  if (std::isnan(magnitude)) return std::isnan(b);
  double error = double(ranks) * std::ldexp(magnitude, -23);
  if (type != ncclFloat32) {
    // `a` was rounded once too.
    double place = std::ldexp(std::fabs(a), -format_of(type).mantissa_bits);
    error += 2 * place + std::ldexp(1.0, type == ncclFloat16 ? -24 : -133);
  } else {
    error += std::ldexp(1.0, -149);
  }
  // Infinite inputs stay so, or meet what overflowed on the way; finite ones may overflow in one order and not in another.
  if (std::isinf(magnitude)) return !std::isfinite(b);
  if (magnitude + error >= most(type) && (!std::isfinite(a) || !std::isfinite(b))) return true;
  return std::fabs(a - b) <= error;
}

}  // namespace

size_t compare(const Expectation& expected, const uint8_t* got, int type, int op, int ranks, size_t count, int exact,
               std::string* note) {
  size_t bytes = type_bytes(type);
  bool tolerant = is_float(type) && (!exact || (op != ncclSum && op != ncclMax && op != ncclMin));
  // 2: every operation was ours, whose bits are promised.
  if (exact >= 2) tolerant = false;
  bool switched = exact == 3 && op == ncclSum && is_float(type) && type_bytes(type) <= 4 && type_bytes(type) >= 2;
  double unit = std::ldexp(1.0, type == ncclFloat64 ? -50 : -format_of(type).mantissa_bits);
  double least = least_of(type);
  size_t wrong[kParts] = {};
  std::string notes[kParts];
  in_parts(count, [&](size_t begin, size_t end, size_t part) {
    for (size_t i = begin; i < end; ++i) {
      uint64_t want = load(expected.bits.data() + i * bytes, bytes);
      uint64_t have = load(got + i * bytes, bytes);
      if (want == have) continue;
      if (is_float(type)) {
        double a = number(type, want);
        double b = number(type, have);
        if (switched) {
          if (summed_in_any_order(type, a, b, expected.magnitude[i], ranks)) continue;
        }
        if (std::isnan(a) && std::isnan(b)) continue;
        if ((op == ncclMax || op == ncclMin) && a == b) continue;  // the sign of a zero is not promised
        if (tolerant) {
          if (!std::isfinite(a) || !std::isfinite(b)) continue;  // another order may overflow elsewhere
          double scale = op == ncclProd ? std::fabs(a) : expected.magnitude[i];
          if (std::fabs(a - b) <= double(ranks) * (unit * scale + least)) continue;
        }
      }
      if (wrong[part]++ == 0) {
        char text[160];
        snprintf(text, sizeof text, "element %zu of %zu: expected %0*llx, got %0*llx", i, count, int(2 * bytes),
                 (unsigned long long)want, int(2 * bytes), (unsigned long long)have);
        notes[part] = text;
      }
    }
  });
  size_t all = 0;
  for (size_t part = 0; part < kParts; ++part) {
    if (wrong[part] && all == 0 && note) *note = notes[part];
    all += wrong[part];
  }
  return all;
}

}  // namespace worker
