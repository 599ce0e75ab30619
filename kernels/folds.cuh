// All other element types and operations: the operation, and the type within a class of types, are values of the launch,
// and every branch on them is uniform. One kernel per class keeps the fat binary small; the calls that need the last
// microsecond are the specialised sums of types.cuh.
//
// Ranks are folded in rank order 0..N-1. docs/numerics.md states the results and where stock NCCL's differ.
#pragma once

#include "args.h"
#include "ptx.cuh"
#include "types.cuh"
#include "wire.cuh"

namespace twoshot {

// One line's running result. E: how a line becomes values, and what can be done with two of them.
template <typename E>
struct RuntimeFold {
  using Value = typename E::Value;
  static constexpr int kValues = E::kLineBytes / E::kValueBytes;
  Value value[kValues];

  TWOSHOT_DEVICE void clear() {
TWOSHOT_UNROLL
    for (int e = 0; e < kValues; e++) value[e] = Value{};
  }

  TWOSHOT_DEVICE void start(const Line& line, const TwoshotArgs& args) { E::unpack(open<E>(line), value, args.type); }

  TWOSHOT_DEVICE void add(const Line& line, const TwoshotArgs& args, uint32_t rank) {
    if (rank == 0) return start(line, args);
    Value term[kValues];
    E::unpack(open<E>(line), term, args.type);
    if (args.op == TWOSHOT_OP_PROD) {
TWOSHOT_UNROLL
      for (int e = 0; e < kValues; e++) value[e] = E::product(value[e], term[e]);
    } else if (args.op == TWOSHOT_OP_MAX) {
TWOSHOT_UNROLL
      for (int e = 0; e < kValues; e++) value[e] = E::larger(value[e], term[e], args.type);
    } else if (args.op == TWOSHOT_OP_MIN) {
TWOSHOT_UNROLL
      for (int e = 0; e < kValues; e++) value[e] = E::smaller(value[e], term[e], args.type);
    } else {
TWOSHOT_UNROLL
      for (int e = 0; e < kValues; e++) value[e] = E::sum(value[e], term[e]);
    }
  }

  TWOSHOT_DEVICE Line round(const TwoshotArgs& args) const {
    Value result[kValues];
TWOSHOT_UNROLL
    for (int e = 0; e < kValues; e++) result[e] = value[e];
    if (args.op == TWOSHOT_OP_AVG) {
TWOSHOT_UNROLL
      for (int e = 0; e < kValues; e++) result[e] = E::quotient(value[e], args.ranks, args.type);
    }
    return E::pack(result, args.type);
  }
};

// kValueBytes: of a line, in a value; more than an element where one operation does several.
template <typename E, uint32_t BYTES>
struct Runtime {
  static constexpr uint32_t kBytes = BYTES, kValueBytes = BYTES;
  static constexpr int kMostTogether = 4;
  static constexpr bool kInAnyOrder = false;  // of two NaN in f64 the first one's bits stay
  using Fold = RuntimeFold<E>;
};

// ---- f32 arithmetic -------------------------------------------------------------------------------------------------

struct Single {
  using Value = float;
  static TWOSHOT_DEVICE float sum(float a, float b) { return add_rn_f32(a, b); }
  static TWOSHOT_DEVICE float product(float a, float b) { return mul_rn_f32(a, b); }
  static TWOSHOT_DEVICE float larger(float a, float b, uint32_t) { return max_f32(a, b); }
  static TWOSHOT_DEVICE float smaller(float a, float b, uint32_t) { return min_f32(a, b); }
  static TWOSHOT_DEVICE float quotient(float a, uint32_t ranks, uint32_t) {
    return div_rn_f32(a, static_cast<float>(ranks));
  }
};

template <typename T>
struct Wide : Single, Runtime<Wide<T>, T::kBytes> {
  static constexpr uint32_t kLineBytes = TWOSHOT_LINE_BYTES;
  static TWOSHOT_DEVICE void unpack(const Line& line, float* values, uint32_t) {
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) T::unpack(line.word[w], values + w * T::kPerWord);
  }
  static TWOSHOT_DEVICE Line pack(const float* values, uint32_t) {
    Line line;
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) line.word[w] = T::pack(values + w * T::kPerWord);
    return line;
  }
};
using f32op = Wide<f32>;
using f16op = Wide<f16>;
using bf16op = Wide<bf16>;

// e4m3 and e5m2. Both are exact in f16; e5m2 is its upper byte.
struct fp8 : Single, Runtime<fp8, 1> {
  static constexpr uint32_t kLineBytes = TWOSHOT_HALF_BYTES;
  // One branch for all pairs.
  static TWOSHOT_DEVICE void unpack(const Line& line, float* values, uint32_t type) {
    const auto pairs = [&](auto halves) {
TWOSHOT_UNROLL
      for (int pair = 0; pair < 4; pair++) {
        cvt_f16x2_f32(halves(line.word[pair / 2] >> (16 * (pair % 2)) & 0xFFFFu), values[2 * pair], values[2 * pair + 1]);
      }
    };
    if (type == TWOSHOT_TYPE_E5M2) {
      pairs([](uint32_t bits) { return (bits & 0xFFu) << 8 | (bits & 0xFF00u) << 16; });
    } else {
      pairs([](uint32_t bits) { return cvt_rn_f16x2_e4m3x2(bits); });
    }
  }
  static TWOSHOT_DEVICE Line pack(const float* values, uint32_t type) {
    Line line = {};
    const auto pairs = [&](auto bits) {
TWOSHOT_UNROLL
      for (int pair = 0; pair < 4; pair++) {
        line.word[pair / 2] |= bits(values[2 * pair], values[2 * pair + 1]) << (16 * (pair % 2));
      }
    };
    if (type == TWOSHOT_TYPE_E5M2) {
      pairs([](float low, float high) { return cvt_rn_satfinite_e5m2x2_f32(low, high); });
    } else {
      pairs([](float low, float high) { return cvt_rn_satfinite_e4m3x2_f32(low, high); });
    }
    return line;
  }
};

// ---- f64 ------------------------------------------------------------------------------------------------------------

struct f64 : Runtime<f64, 8> {
  static constexpr uint32_t kLineBytes = TWOSHOT_HALF_BYTES;
  using Value = double;
  static TWOSHOT_DEVICE void unpack(const Line& line, double* values, uint32_t) {
    values[0] = mov_b64_f64(line.word[0], line.word[1]);
  }
  static TWOSHOT_DEVICE Line pack(const double* values, uint32_t) {
    Line line = {};
    mov_f64_b64(values[0], line.word[0], line.word[1]);
    return line;
  }
  static TWOSHOT_DEVICE double sum(double a, double b) { return add_rn_f64(a, b); }
  static TWOSHOT_DEVICE double product(double a, double b) { return mul_rn_f64(a, b); }
  static TWOSHOT_DEVICE double larger(double a, double b, uint32_t) { return max_f64(a, b); }
  static TWOSHOT_DEVICE double smaller(double a, double b, uint32_t) { return min_f64(a, b); }
  static TWOSHOT_DEVICE double quotient(double a, uint32_t ranks, uint32_t) {
    return div_rn_f64(a, static_cast<double>(ranks));
  }
};

// ---- integers: arithmetic is modulo 2^bits ---------------------------------------------------------------------------

TWOSHOT_DEVICE bool is_signed(uint32_t type) {
  return type == TWOSHOT_TYPE_I8 || type == TWOSHOT_TYPE_I32 || type == TWOSHOT_TYPE_I64;
}

// S and U: the signed and the unsigned type that hold a value.
template <typename S, typename U>
struct Integer {
  using Value = U;
  static TWOSHOT_DEVICE U sum(U a, U b) { return a + b; }
  static TWOSHOT_DEVICE U product(U a, U b) { return a * b; }
  static TWOSHOT_DEVICE bool less(U a, U b, uint32_t type) {
    return is_signed(type) ? static_cast<S>(a) < static_cast<S>(b) : a < b;
  }
  static TWOSHOT_DEVICE U larger(U a, U b, uint32_t type) { return less(a, b, type) ? b : a; }
  static TWOSHOT_DEVICE U smaller(U a, U b, uint32_t type) { return less(b, a, type) ? b : a; }
  // Towards zero. On magnitudes: one division instead of two.
  static TWOSHOT_DEVICE U quotient(U a, uint32_t ranks, uint32_t type) {
    const bool negative = is_signed(type) && static_cast<S>(a) < 0;
    const U magnitude = (negative ? U{0} - a : a) / ranks;
    return negative ? U{0} - magnitude : magnitude;
  }
};

// A value is a word of four elements: sums add all of them at once, the rest takes one after the other.
struct i8 : Runtime<i8, 1> {
  static constexpr uint32_t kValueBytes = 4;
  static constexpr uint32_t kLineBytes = TWOSHOT_HALF_BYTES;
  using Value = uint32_t;
  using One = Integer<int32_t, uint32_t>;
  static TWOSHOT_DEVICE uint32_t element(uint32_t word, int e, uint32_t type) {
    const uint32_t byte = word >> (8 * e) & 0xFFu;
    return is_signed(type) && byte >= 0x80u ? byte | 0xFFFFFF00u : byte;
  }
  template <typename F>
  static TWOSHOT_DEVICE uint32_t each(F result) {
    uint32_t word = 0;
TWOSHOT_UNROLL
    for (int e = 0; e < 4; e++) word |= (result(e) & 0xFFu) << (8 * e);
    return word;
  }
  static TWOSHOT_DEVICE void unpack(const Line& line, uint32_t* values, uint32_t) {
    values[0] = line.word[0];
    values[1] = line.word[1];
  }
  static TWOSHOT_DEVICE Line pack(const uint32_t* values, uint32_t) { return Line{{values[0], values[1], 0, 0}}; }
  // No carry leaves an element: the upper bits are added apart.
  static TWOSHOT_DEVICE uint32_t sum(uint32_t a, uint32_t b) {
    return ((a & 0x7F7F7F7Fu) + (b & 0x7F7F7F7Fu)) ^ ((a ^ b) & 0x80808080u);
  }
  static TWOSHOT_DEVICE uint32_t product(uint32_t a, uint32_t b) {
    return each([&](int e) { return (a >> (8 * e)) * (b >> (8 * e)); });
  }
  static TWOSHOT_DEVICE uint32_t larger(uint32_t a, uint32_t b, uint32_t type) {
    return each([&](int e) { return One::larger(element(a, e, type), element(b, e, type), type); });
  }
  static TWOSHOT_DEVICE uint32_t smaller(uint32_t a, uint32_t b, uint32_t type) {
    return each([&](int e) { return One::smaller(element(a, e, type), element(b, e, type), type); });
  }
  // The sum wraps in eight bits before it is divided.
  static TWOSHOT_DEVICE uint32_t quotient(uint32_t a, uint32_t ranks, uint32_t type) {
    return each([&](int e) { return One::quotient(element(a, e, type), ranks, type); });
  }
};

struct i32 : Integer<int32_t, uint32_t>, Runtime<i32, 4> {
  static constexpr uint32_t kLineBytes = TWOSHOT_HALF_BYTES;
  static TWOSHOT_DEVICE void unpack(const Line& line, uint32_t* values, uint32_t) {
    values[0] = line.word[0];
    values[1] = line.word[1];
  }
  static TWOSHOT_DEVICE Line pack(const uint32_t* values, uint32_t) { return Line{{values[0], values[1], 0, 0}}; }
};

struct i64 : Integer<int64_t, uint64_t>, Runtime<i64, 8> {
  static constexpr uint32_t kLineBytes = TWOSHOT_HALF_BYTES;
  static TWOSHOT_DEVICE void unpack(const Line& line, uint64_t* values, uint32_t) {
    values[0] = uint64_t{line.word[1]} << 32 | line.word[0];
  }
  static TWOSHOT_DEVICE Line pack(const uint64_t* values, uint32_t) {
    return Line{{static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[0] >> 32), 0, 0}};
  }
};

}  // namespace twoshot
