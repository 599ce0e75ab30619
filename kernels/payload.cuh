// Payload: the caller's two buffers as lines, wherever they begin and end. Knows nothing of windows and epochs.
#pragma once

#include "args.h"
#include "ptx.cuh"
#include "wire.cuh"

namespace twoshot {

// A full line on its way from memory. Unaligned: the 16-byte granules that it lies in.
template <bool ALIGNED>
struct Raw {
  Line low = {};
};
template <>
struct Raw<false> {
  Line low = {}, high = {};
};

// What a warp loads of U times 32 lines in a row, U of each lane: `line` as Raw::low, and of lane 31 the granule behind all
// of them. What a lane's line lacks the next lane has.
template <bool ALIGNED, int U>
struct RawRun {
  Line line[U] = {};
};
template <int U>
struct RawRun<false, U> {
  Line line[U] = {}, behind = {};
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
  static constexpr uint32_t kPerWord = T::kBytes < 4 ? 4 / T::kBytes : 1;
  static constexpr uint32_t kWords = T::kBytes < 4 ? 1 : T::kBytes / 4;  // those of an element
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

  // Elements of a line that are there.
  TWOSHOT_DEVICE uint32_t elements(uint32_t index) const {
    const uint64_t first = uint64_t{index} * kPerLine;
    return first >= count ? 0 : count - first < kPerLine ? static_cast<uint32_t>(count - first) : kPerLine;
  }

  TWOSHOT_DEVICE Line load_elements(uint32_t index) const {
    Line line = {};
    const uint64_t from = in + uint64_t{index} * T::kLineBytes;
    const uint32_t there = elements(index);
TWOSHOT_UNROLL
    for (uint32_t e = 0; e < kPerLine; e++) {
      if (e >= there) continue;
      const uint64_t address = from + e * T::kBytes;
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

  // Those of a line that are there, of [from, to).
  TWOSHOT_DEVICE void store_elements(uint32_t index, const Line& sealed, uint32_t from = 0, uint32_t to = kPerLine) const {
    const Line line = open<T>(sealed);
    const uint64_t first = out + uint64_t{index} * T::kLineBytes;
    const uint32_t there = elements(index), end = to < there ? to : there;
TWOSHOT_UNROLL
    for (uint32_t w = 0; w < T::kLineBytes / 4; w += kWords) {
      // Sixteen stores in a row, of single bytes, would cost their addresses' registers.
TWOSHOT_UNROLL_BY(T::kBytes == 1 ? 1 : kPerWord)
      for (uint32_t part = 0; part < kPerWord; part++) {
        const uint32_t e = w / kWords * kPerWord + part;
        if (e < from || e >= end) continue;
        const uint64_t address = first + e * T::kBytes;
        if constexpr (T::kBytes == 8) {
          st_weak_v2_if(address, Line{{line.word[w], line.word[w + 1], 0, 0}}, true);
        } else if constexpr (T::kBytes == 4) {
          st_weak_b32(address, line.word[w]);
        } else if constexpr (T::kBytes == 1) {
          st_weak_b8(address, line.word[w] >> (8 * part));
        } else {
          st_weak_b16(address, line.word[w] >> (16 * part));
        }
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

  // ---- what the lanes of a warp do together: lines index, index + 32, ... of every lane, of those below `end`, without a gap,
  // for index grows by one from lane to lane

  // Loads the full ones, in two steps as above. A poll that acquires empties the first-level cache, so that what two lanes
  // need is loaded once and handed on.
  template <int U>
  TWOSHOT_DEVICE void load_run(RawRun<ALIGNED, U>& raw, uint32_t index, uint32_t end) const {
TWOSHOT_UNROLL
    for (int u = 0; u < U; u++) {
      const uint32_t i = index + 32 * u;
      if constexpr (ALIGNED) {
        ld_weak_v4_if(raw.line[u], in + uint64_t{i} * TWOSHOT_LINE_BYTES, i < end && full(i));
      } else {
        ld_weak_v4_if(raw.line[u], granule_of(i), i <= end && owns_granule_of(i));
      }
    }
    if constexpr (!ALIGNED) {
      static_assert(kGranules, "whole lines");
      const uint32_t behind = index + 32 * (U - 1) + 1;
      ld_weak_v4_if(raw.behind, granule_of(behind), behind <= end && owns_granule_of(behind) && threadIdx.x % 32 == 31);
    }
  }

  // Where line i begins, and whether all of it is the buffer's.
  TWOSHOT_DEVICE uint64_t granule_of(uint32_t i) const {
    return in / TWOSHOT_LINE_BYTES * TWOSHOT_LINE_BYTES + uint64_t{i} * TWOSHOT_LINE_BYTES;
  }
  TWOSHOT_DEVICE bool owns_granule_of(uint32_t i) const { return i != 0 && i + 1 < lines; }

  template <int U>
  TWOSHOT_DEVICE void loaded_run(Line (&line)[U], const RawRun<ALIGNED, U>& raw) const {
TWOSHOT_UNROLL
    for (int u = 0; u < U; u++) {
      if constexpr (ALIGNED) {
        line[u] = raw.line[u];
      } else {
        Raw<false> pair;
        pair.low = raw.line[u];
        pair.high = next_of(raw.line, u);
        if (u + 1 == U && threadIdx.x % 32 == 31) pair.high = raw.behind;
        line[u] = from_byte<T>(pair, static_cast<uint32_t>(in % TWOSHOT_LINE_BYTES));
      }
    }
  }

  // What the lane that has the next line has: lane 31's is lane 0's one further. Nothing of use for the last.
  template <int U>
  static TWOSHOT_DEVICE Line next_of(const Line (&line)[U], int u) {
    const uint32_t lane = threadIdx.x % 32;
    Line shown = line[u];
    if (u + 1 < U && lane == 0) shown = line[u + 1 < U ? u + 1 : u];
    return shfl_idx_v4(shown, (lane + 1) % 32);
  }

  // Unaligned: a granule that lies in two lines is stored at once by who has the first, for a line in pieces costs the
  // second-level cache a write for each; the two halves at the warp's ends, whose granule is another's too, by elements.
  template <int U>
  TWOSHOT_DEVICE void store_run(uint32_t index, const Line (&line)[U], uint32_t end) const {
    if constexpr (ALIGNED) {
TWOSHOT_UNROLL
      for (int u = 0; u < U; u++) {
        if (index + 32 * u < end) store(index + 32 * u, line[u]);
      }
    } else {
      static_assert(kGranules, "whole lines");
      const uint32_t lane = threadIdx.x % 32, shift = static_cast<uint32_t>(out % TWOSHOT_LINE_BYTES);
      const uint32_t in_first = shift == 0 ? kPerLine : (TWOSHOT_LINE_BYTES - shift) / T::kBytes;
TWOSHOT_UNROLL
      for (int u = 0; u < U; u++) {
        const uint32_t i = index + 32 * u;
        const bool here = i < end, whole = i != partial;
        const bool from_before = here && whole && (u != 0 || lane != 0);
        const bool with_next = here && i + 1 < end && i + 1 != partial && (u + 1 != U || lane != 31);
        Raw<false> pair;
        pair.low = line[u];
        if (shift == 0) {
          st_weak_v4_if(out + uint64_t{i} * TWOSHOT_LINE_BYTES, line[u], here && whole);
          if (here && !whole) store_elements(i, line[u]);
          continue;
        }
        pair.high = next_of(line, u);
        const Line granule = from_byte<T>(pair, TWOSHOT_LINE_BYTES - shift);
        st_weak_v4_if(out - shift + uint64_t{i + 1} * TWOSHOT_LINE_BYTES, granule, with_next);
        const uint32_t from = from_before ? in_first : 0, to = with_next ? in_first : kPerLine;
        if (here && from < to) store_elements(i, line[u], from, to);
      }
    }
  }
};

// The one place that decides between the two; it concerns this rank alone.
template <typename T>
TWOSHOT_DEVICE bool payload_aligned(const TwoshotArgs& args) {
  return (args.in | args.out) % T::kLineBytes == 0;
}

}  // namespace twoshot
