// The element types whose sums are specialised: how a line becomes f32 values and how f32 values become a line. Sums are
// f32 in rank order and rounded once, to nearest even; all other types and operations are in folds.cuh.
#pragma once

#include "args.h"
#include "ptx.cuh"
#include "wire.cuh"

namespace twoshot {

template <typename T>
struct Sum;

// What the specialised types have in common. kLineBytes: payload in a line (wire.cuh); kMostTogether: ranks dealt with
// together where their number is not known; kInAnyOrder: two ranks' result is the same in either order, to the last bit.
template <typename T>
struct Specialised {
  static constexpr uint32_t kLineBytes = TWOSHOT_LINE_BYTES;
  static constexpr int kMostTogether = 8;
  static constexpr bool kInAnyOrder = true;
  using Fold = Sum<T>;
};

struct f32 : Specialised<f32> {
  static constexpr uint32_t kBytes = 4;
  static constexpr int kPerWord = 1;
  static TWOSHOT_DEVICE void unpack(uint32_t word, float* values) { values[0] = mov_b32_f32(word); }
  static TWOSHOT_DEVICE uint32_t pack(const float* values) { return mov_f32_b32(values[0]); }
};

struct f16 : Specialised<f16> {
  static constexpr uint32_t kBytes = 2;
  static constexpr int kPerWord = 2;
  static TWOSHOT_DEVICE void unpack(uint32_t word, float* values) { cvt_f16x2_f32(word, values[0], values[1]); }
  static TWOSHOT_DEVICE uint32_t pack(const float* values) { return cvt_rn_f16x2_f32(values[0], values[1]); }
};

struct bf16 : Specialised<bf16> {
  static constexpr uint32_t kBytes = 2;
  static constexpr int kPerWord = 2;
  static TWOSHOT_DEVICE void unpack(uint32_t word, float* values) {
    values[0] = mov_b32_f32(word << 16);
    values[1] = mov_b32_f32(word & 0xFFFF0000u);
  }
  static TWOSHOT_DEVICE uint32_t pack(const float* values) { return cvt_rn_bf16x2_f32(values[0], values[1]); }
};

// One line's running sum.
template <typename T>
struct Sum {
  static constexpr int kElements = 4 * T::kPerWord;
  float value[kElements];

  // -0.0 is the identity of addition: -0.0 + x has x's bits, -0.0 and subnormals included (a NaN ends canonical
  // anyhow). So a sum that starts here and one that starts with the first rank's value are the same sum.
  TWOSHOT_DEVICE void clear() {
TWOSHOT_UNROLL
    for (int e = 0; e < kElements; e++) value[e] = -0.0f;
  }

  TWOSHOT_DEVICE void start(const Line& line, const TwoshotArgs&) {
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) T::unpack(line.word[w], value + w * T::kPerWord);
  }

  TWOSHOT_DEVICE void add(const Line& line, const TwoshotArgs&, uint32_t) {
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) {
      float term[T::kPerWord];
      T::unpack(line.word[w], term);
TWOSHOT_UNROLL
      for (int e = 0; e < T::kPerWord; e++) {
        value[w * T::kPerWord + e] = add_rn_f32(value[w * T::kPerWord + e], term[e]);
      }
    }
  }

  TWOSHOT_DEVICE Line round(const TwoshotArgs&) const {
    Line line;
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) line.word[w] = T::pack(value + w * T::kPerWord);
    return line;
  }
};

}  // namespace twoshot
