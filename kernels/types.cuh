// The element types whose sums are specialised: how a line becomes f32 values and how f32 values become a line. Payload:
// the caller's buffer as lines. Sums are f32 in rank order and rounded once, to nearest even; all other types and
// operations are in folds.cuh. Knows nothing of windows and epochs.
#pragma once

#include "args.h"
#include "ptx.cuh"
#include "wire.cuh"

namespace twoshot {

template <typename T>
struct Sum;

// What the specialised types have in common. kLineBytes: payload in a line (wire.cuh); kMostTogether: ranks dealt with
// together where their number is not known.
template <typename T>
struct Specialised {
  static constexpr uint32_t kLineBytes = TWOSHOT_LINE_BYTES;
  static constexpr int kMostTogether = 8;
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

// A full line on its way from memory. Unaligned: the 16-byte granules that it lies in.
template <bool ALIGNED>
struct Raw {
  Line low = {};
};
template <>
struct Raw<false> {
  Line low = {}, high = {};
};

// 16 bytes of 32, from any byte on that is a multiple of T's elements. Selects, no indexed registers.
template <typename T>
TWOSHOT_DEVICE Line from_byte(const Raw<false>& raw, uint32_t byte) {
  uint32_t word[8];
TWOSHOT_UNROLL
  for (int w = 0; w < 4; w++) word[w] = raw.low.word[w], word[w + 4] = raw.high.word[w];
TWOSHOT_UNROLL
  for (int w = 0; w < 6; w++) word[w] = (byte & 8) != 0 ? word[w + 2] : word[w];
TWOSHOT_UNROLL
  for (int w = 0; w < 5 && T::kBytes < 8; w++) word[w] = (byte & 4) != 0 ? word[w + 1] : word[w];
  Line line;
TWOSHOT_UNROLL
  for (int w = 0; w < 4; w++) line.word[w] = T::kBytes < 4 ? shf_r_b32(word[w], word[w + 1], 8 * (byte & 3)) : word[w];
  return line;
}

// The caller's two buffers, seen as lines. ALIGNED: both start on a multiple of a line's payload, so a full line is one
// access. Else a full line of 16 bytes is read as the two granules that it lies in and written in the widest pieces that
// its address allows; those at the buffer's ends, where a granule may be another's, element by element. The last line may
// be partial: it is read element by element and padded with zero bits, and written element by element.
template <typename T, bool ALIGNED>
struct Payload {
  static constexpr uint32_t kPerLine = T::kLineBytes / T::kBytes;
  static constexpr uint32_t kNone = 0xFFFFFFFFu;
  static constexpr bool kGranules = !ALIGNED && T::kLineBytes == TWOSHOT_LINE_BYTES;

  uint64_t in, out, count;
  uint32_t lines;    // partial one included
  uint32_t partial;  // its index, or kNone

  explicit TWOSHOT_DEVICE Payload(const TwoshotArgs& args)
      : in(args.in),
        out(args.out),
        count(args.count),
        lines(static_cast<uint32_t>((args.count + kPerLine - 1) / kPerLine)),
        partial(args.count % kPerLine != 0 ? lines - 1 : kNone) {}

  // True for lines that load_full and store_full take. Unaligned: whose neighbours are full, so both granules are ours.
  TWOSHOT_DEVICE bool full(uint32_t line) const {
    if constexpr (kGranules) return line != 0 && line + 2 < lines;
    return ALIGNED && line < lines && line != partial;
  }

  // In two steps, for those who have more loads to issue before they wait for this one.
  TWOSHOT_DEVICE void load_raw_if(Raw<ALIGNED>& raw, uint32_t index, bool wanted) const {
    const uint64_t address = in + uint64_t{index} * T::kLineBytes, granule = address / TWOSHOT_LINE_BYTES * TWOSHOT_LINE_BYTES;
    if constexpr (T::kLineBytes == TWOSHOT_HALF_BYTES) {
      ld_weak_v2_if(raw.low, address, wanted);
    } else if constexpr (ALIGNED) {
      ld_weak_v4_if(raw.low, address, wanted);
    } else {
      ld_weak_v4_if(raw.low, granule, wanted);
      ld_weak_v4_if(raw.high, granule + TWOSHOT_LINE_BYTES, wanted && granule != address);
    }
  }

  TWOSHOT_DEVICE Line loaded(const Raw<ALIGNED>& raw) const {
    if constexpr (kGranules) {
      return from_byte<T>(raw, static_cast<uint32_t>(in % TWOSHOT_LINE_BYTES));
    } else {
      return raw.low;
    }
  }

  TWOSHOT_DEVICE void load_full_if(Line& line, uint32_t index, bool wanted) const {
    Raw<ALIGNED> raw;
    raw.low = line;
    load_raw_if(raw, index, wanted);
    line = loaded(raw);
  }

  TWOSHOT_DEVICE void store_full_if(uint32_t index, const Line& line, bool wanted) const {
    if constexpr (T::kLineBytes == TWOSHOT_HALF_BYTES) {
      st_weak_v2_if(out + uint64_t{index} * TWOSHOT_HALF_BYTES, open<T>(line), wanted);
    } else if constexpr (ALIGNED) {
      st_weak_v4_if(out + uint64_t{index} * TWOSHOT_LINE_BYTES, line, wanted);
    } else if (wanted) {
      store_pieces(index, line);
    }
  }

  // Which pieces is the same for all lines.
  TWOSHOT_DEVICE void store_pieces(uint32_t index, const Line& line) const {
    const uint64_t to = out + uint64_t{index} * TWOSHOT_LINE_BYTES;
    if (to % 16 == 0) {
      st_weak_v4_if(to, line, true);
    } else if (to % 8 == 0) {
      st_weak_v2_if(to, line, true);
      st_weak_v2_if(to + 8, Line{{line.word[2], line.word[3], 0, 0}}, true);
    } else if (T::kBytes < 8 && to % 4 == 0) {
TWOSHOT_UNROLL
      for (int w = 0; w < 4; w++) st_weak_b32(to + 4 * w, line.word[w]);
    } else if (T::kBytes < 4 && to % 2 == 0) {
      st_weak_b16(to, line.word[0]);
TWOSHOT_UNROLL
      for (int w = 0; w < 3; w++) st_weak_b32(to + 2 + 4 * w, shf_r_b32(line.word[w], line.word[w + 1], 16));
      st_weak_b16(to + 14, line.word[3] >> 16);
    } else {
      store_elements(index, line);
    }
  }

  TWOSHOT_DEVICE Line load_elements(uint32_t index) const {
    Line line = {};
    const uint64_t first = uint64_t{index} * kPerLine;
TWOSHOT_UNROLL
    for (uint32_t e = 0; e < kPerLine; e++) {
      if (first + e >= count) continue;
      const uint64_t address = in + (first + e) * T::kBytes;
      if constexpr (T::kBytes == 8) {
        Line element = {};
        ld_weak_v2_if(element, address, true);
        line.word[2 * e] = element.word[0], line.word[2 * e + 1] = element.word[1];
      } else if constexpr (T::kBytes == 4) {
        line.word[e] = ld_weak_b32(address);
      } else if constexpr (T::kBytes == 1) {
        line.word[e / 4] |= ld_weak_b8(address) << (8 * (e % 4));
      } else {
        line.word[e / 2] |= ld_weak_b16(address) << (16 * (e % 2));
      }
    }
    return line;
  }

  TWOSHOT_DEVICE void store_elements(uint32_t index, const Line& sealed) const {
    const Line line = open<T>(sealed);
    const uint64_t first = uint64_t{index} * kPerLine;
TWOSHOT_UNROLL
    for (uint32_t e = 0; e < kPerLine; e++) {
      if (first + e >= count) continue;
      const uint64_t address = out + (first + e) * T::kBytes;
      if constexpr (T::kBytes == 8) {
        st_weak_v2_if(address, Line{{line.word[2 * e], line.word[2 * e + 1], 0, 0}}, true);
      } else if constexpr (T::kBytes == 4) {
        st_weak_b32(address, line.word[e]);
      } else if constexpr (T::kBytes == 1) {
        st_weak_b8(address, line.word[e / 4] >> (8 * (e % 4)));
      } else {
        st_weak_b16(address, line.word[e / 2] >> (16 * (e % 2)));
      }
    }
  }

  // Any line that there is.
  TWOSHOT_DEVICE Line load_any(uint32_t index) const {
    if (!full(index)) return load_elements(index);
    Line line = {};
    load_full_if(line, index, true);
    return line;
  }

  // Any line; zeros where there is none. In two steps for those who have more loads to issue in between: a full
  // line's load is issued without a branch by the first, all else happens in the second.
  TWOSHOT_DEVICE Line load(uint32_t index) const {
    Line line = begin_load(index);
    finish_load(line, index);
    return line;
  }

  TWOSHOT_DEVICE Line begin_load(uint32_t index) const {
    Line line = {};
    if constexpr (ALIGNED) load_full_if(line, index, full(index));
    return line;
  }

  TWOSHOT_DEVICE void finish_load(Line& line, uint32_t index) const {
    if (ALIGNED ? index == partial : index < lines) line = ALIGNED ? load_elements(index) : load_any(index);
  }

  TWOSHOT_DEVICE void store(uint32_t index, const Line& line) const {
    if (full(index)) {
      store_full_if(index, line, true);
    } else {
      store_elements(index, line);
    }
  }
};

// The one place that decides between the two; it concerns this rank alone.
template <typename T>
TWOSHOT_DEVICE bool payload_aligned(const TwoshotArgs& args) {
  return (args.in | args.out) % T::kLineBytes == 0;
}

}  // namespace twoshot
