// Payload: the caller's two buffers as lines, wherever they begin and end. Knows nothing of windows and epochs.
#pragma once

#include "args.h"
#include "ptx.cuh"
#include "wire.cuh"

namespace twoshot {

// What a warp loads of U times 32 lines in a row, U of each lane: the lines, or where those are not aligned the granules, the
// aligned 16 bytes, in which each begins; `behind`: at lane 0 the granule behind all of them. What a lane's line lacks the
// next lane has.
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
TWOSHOT_DEVICE Line from_byte(const Line& low, const Line& high, uint32_t byte) {
  uint32_t word[8];
TWOSHOT_UNROLL
  for (int w = 0; w < 4; w++) word[w] = low.word[w], word[w + 4] = high.word[w];
TWOSHOT_UNROLL
  for (int w = 0; w < 6; w++) word[w] = (byte & 8) != 0 ? word[w + 2] : word[w];
TWOSHOT_UNROLL
  for (int w = 0; w < 5 && T::kBytes < 8; w++) word[w] = (byte & 4) != 0 ? word[w + 1] : word[w];
  Line line;
TWOSHOT_UNROLL
  for (int w = 0; w < 4; w++) line.word[w] = T::kBytes < 4 ? shf_r_b32(word[w], word[w + 1], 8 * (byte & 3)) : word[w];
  return line;
}

// By value: a reference to one of two would need both in memory.
TWOSHOT_DEVICE Line either(bool first, const Line& a, const Line& b) {
  Line line;
TWOSHOT_UNROLL
  for (int w = 0; w < 4; w++) {
    const uint32_t of_a = a.word[w], of_b = b.word[w];
    line.word[w] = first ? of_a : of_b;
  }
  return line;
}

// line[at], without an address; what is rare goes line by line in a loop, so that there is one copy of its code.
template <int U>
TWOSHOT_DEVICE Line picked(const Line (&line)[U], uint32_t at) {
  Line found = line[0];
TWOSHOT_UNROLL
  for (int u = 1; u < U; u++) found = either(at == static_cast<uint32_t>(u), line[u], found);
  return found;
}

template <int U>
TWOSHOT_DEVICE void replace(Line (&line)[U], uint32_t at, const Line& by) {
TWOSHOT_UNROLL
  for (int u = 0; u < U; u++) line[u] = either(at == static_cast<uint32_t>(u), by, line[u]);
}

// The same of each line and the next one, which the next lane has; behind lane 31's comes lane 0's one further, at last its
// `behind`. WORDS: whole words of `byte`, a constant so that nothing is selected and no word shown in vain.
template <typename T, int WORDS, int U>
TWOSHOT_DEVICE void shift_run_by(Line (&line)[U], const Line (&from)[U], const Line& behind, uint32_t byte) {
  const uint32_t lane = threadIdx.x % 32;
  constexpr int kOfNext = WORDS + (T::kBytes < 4 ? 1 : 0);
TWOSHOT_UNROLL
  for (int u = 0; u < U; u++) {
    uint32_t word[8];
    Line shown;
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) {
      word[w] = from[u].word[w];
      const uint32_t of_line = from[u + 1 < U ? u + 1 : u].word[w], of_behind = behind.word[w];
      const uint32_t further = u + 1 < U ? of_line : of_behind, own = from[u].word[w];
      shown.word[w] = w >= kOfNext ? 0 : lane != 0 ? own : further;
    }
    const Line next = shfl_idx<kOfNext>(shown, (lane + 1) % 32);
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) word[w + 4] = next.word[w];
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) {
      line[u].word[w] = T::kBytes < 4 ? shf_r_b32(word[w + WORDS], word[w + WORDS + 1], 8 * (byte & 3)) : word[w + WORDS];
    }
  }
}

// byte: less than 16, the same for all lanes.
template <typename T, int U>
TWOSHOT_DEVICE void shift_run(Line (&line)[U], const Line (&from)[U], const Line& behind, uint32_t byte) {
  if (T::kBytes == 8 ? byte == 0 : byte < 4) return shift_run_by<T, 0>(line, from, behind, byte);
  if (T::kBytes == 8 || (byte >= 8 && byte < 12)) return shift_run_by<T, 2>(line, from, behind, byte);
  if constexpr (T::kBytes < 8) {
    if (byte < 8) return shift_run_by<T, 1>(line, from, behind, byte);
    shift_run_by<T, 3>(line, from, behind, byte);
  }
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

  TWOSHOT_DEVICE void load_full_if(Line& line, uint32_t index, bool wanted) const {
    const uint64_t address = in + uint64_t{index} * T::kLineBytes;
    if constexpr (T::kLineBytes == TWOSHOT_HALF_BYTES) {
      ld_weak_v2_if(line, address, wanted);
    } else if constexpr (ALIGNED) {
      ld_weak_v4_if(line, address, wanted);
    } else {
      Line high = {};
      const uint64_t granule = granule_of(index);
      ld_weak_v4_if(line, granule, wanted);
      ld_weak_v4_if(high, granule + TWOSHOT_LINE_BYTES, wanted && granule != address);
      line = from_byte<T>(line, high, static_cast<uint32_t>(in % TWOSHOT_LINE_BYTES));
    }
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
  // for index grows by one from lane to lane. FULL: all 32 U lines are there, and full; this
  // saves what looks after ends

  // Loads the full ones, in two steps for those who have more loads to issue before they wait for these. A poll that acquires
  // empties the first-level cache, so that what two lanes need is loaded once and handed on.
  template <bool FULL, int U>
  TWOSHOT_DEVICE void load_run(RawRun<ALIGNED, U>& raw, uint32_t index, uint32_t end) const {
    const uint64_t address = granule_of(index);
TWOSHOT_UNROLL
    for (int u = 0; u < U; u++) {
      const uint32_t i = index + 32 * u;
      if constexpr (FULL) {
        ld_weak_v4(raw.line[u], address + 32 * TWOSHOT_LINE_BYTES * u);
      } else {
        ld_weak_v4_if(raw.line[u], granule_of(i), ALIGNED ? i < end && full(i) : i <= end && owns_granule_of(i));
      }
    }
    if constexpr (!ALIGNED) {
      static_assert(kGranules, "whole lines");
      const uint32_t behind = index + 32 * U;
      const bool there = FULL || (behind <= end && owns_granule_of(behind));
      ld_weak_v4_if(raw.behind, address + 32 * TWOSHOT_LINE_BYTES * U, there && threadIdx.x % 32 == 0);
    }
  }

  // Where line i begins, and whether all of it is the buffer's.
  TWOSHOT_DEVICE uint64_t granule_of(uint32_t i) const {
    return (ALIGNED ? in : in / TWOSHOT_LINE_BYTES * TWOSHOT_LINE_BYTES) + uint64_t{i} * TWOSHOT_LINE_BYTES;
  }
  TWOSHOT_DEVICE bool owns_granule_of(uint32_t i) const { return i != 0 && i + 1 < lines; }

  template <int U>
  TWOSHOT_DEVICE void loaded_run(Line (&line)[U], const RawRun<ALIGNED, U>& raw) const {
    if constexpr (ALIGNED) {
TWOSHOT_UNROLL
      for (int u = 0; u < U; u++) line[u] = raw.line[u];
    } else {
      shift_run<T>(line, raw.line, raw.behind, static_cast<uint32_t>(in % TWOSHOT_LINE_BYTES));
    }
  }

  // Unaligned: a granule that lies in two lines is stored at once by who has the first, for a line in pieces costs the
  // second-level cache a write for each; the two halves at the warp's ends, whose granule is another's too, by elements.
  template <bool FULL, int U>
  TWOSHOT_DEVICE void store_run(uint32_t index, const Line (&line)[U], uint32_t end) const {
    const uint32_t shift = ALIGNED ? 0 : static_cast<uint32_t>(out % TWOSHOT_LINE_BYTES);
    if (FULL && shift == 0) {
      const uint64_t to = out + uint64_t{index} * TWOSHOT_LINE_BYTES;
TWOSHOT_UNROLL
      for (int u = 0; u < U; u++) st_weak_v4(to + 32 * TWOSHOT_LINE_BYTES * u, line[u]);
    } else if (shift == 0) {
TWOSHOT_UNROLL
      for (int u = 0; u < U; u++) {
        const uint32_t i = index + 32 * u;
        st_weak_v4_if(out + uint64_t{i} * TWOSHOT_LINE_BYTES, line[u], i < end && i != partial);
      }
      const uint32_t u = (partial - index) / 32;
      if (partial >= index && partial < end && u < U && (partial - index) % 32 == 0) store_elements(partial, picked(line, u));
    } else if constexpr (!ALIGNED) {
      store_shifted_run<FULL>(index, line, end, shift);
    }
  }

  template <bool FULL, int U>
  TWOSHOT_DEVICE void store_shifted_run(uint32_t index, const Line (&line)[U], uint32_t end, uint32_t shift) const {
    static_assert(kGranules, "whole lines");
    const uint32_t lane = threadIdx.x % 32, in_first = (TWOSHOT_LINE_BYTES - shift) / T::kBytes;
    const uint64_t behind_first = out - shift + uint64_t{index + 1} * TWOSHOT_LINE_BYTES;
    Line granule[U];
    shift_run<T>(granule, line, Line{}, TWOSHOT_LINE_BYTES - shift);
    if constexpr (FULL) {
TWOSHOT_UNROLL
      for (int u = 0; u < U; u++) {
        st_weak_v4_if(behind_first + 32 * TWOSHOT_LINE_BYTES * u, granule[u], u + 1 != U || lane != 31);
      }
      const bool last = lane == 31;
      if (lane == 0 || last) {
        store_elements(last ? index + 32 * (U - 1) : index, either(last, line[U - 1], line[0]), last ? in_first : 0,
                       last ? kPerLine : in_first);
      }
    } else {
      const auto with_next = [&](uint32_t u) {
        const uint32_t next = index + 32 * u + 1;
        return next < end && next != partial && (u + 1 != U || lane != 31);
      };
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < U; u++) {
        st_weak_v4_if(behind_first + 32 * TWOSHOT_LINE_BYTES * u, granule[u], with_next(u));
      }
TWOSHOT_UNROLL_BY(1)
      for (uint32_t u = 0; u < U; u++) {
        const uint32_t i = index + 32 * u;
        const uint32_t from = i != partial && (u != 0 || lane != 0) ? in_first : 0, to = with_next(u) ? in_first : kPerLine;
        if (i < end && from < to) store_elements(i, picked(line, u), from, to);
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
