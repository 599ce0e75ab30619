// How payload travels in a line whose four words must never be the sentinel, so that every word is its own flag and a
// line may land in parts. Knows nothing of element types, windows and epochs.
//
// 16 bytes   All four words are payload. Only for types of which the sentinel is a NaN and the results of NaN are
//            canonical: a word equal to it is replaced by a NaN beside it, and no result changes.
// 8 bytes    Any bits are a value: words 0 and 1 are payload, bit w of word 2 says that word w was the sentinel (it
//            travels as zero), word 3 is zero. A flag beside the data, as in NCCL's LL, would be as large and would need
//            8 bytes to arrive together, also through multicast; this needs nothing that the 16-byte form does not.
#pragma once

#include "args.h"
#include "ptx.cuh"

namespace twoshot {

TWOSHOT_DEVICE bool has_sentinel(const Line& line) {
  return line.word[0] == TWOSHOT_SENTINEL || line.word[1] == TWOSHOT_SENTINEL || line.word[2] == TWOSHOT_SENTINEL ||
         line.word[3] == TWOSHOT_SENTINEL;
}

// T::kLineBytes says which form. Opening a line that was never sealed changes nothing if words 2 and 3 are zero.
template <typename T>
TWOSHOT_DEVICE Line seal(Line line) {
  static_assert(T::kLineBytes == TWOSHOT_LINE_BYTES || T::kLineBytes == TWOSHOT_HALF_BYTES, "no such form");
  if constexpr (T::kLineBytes == TWOSHOT_LINE_BYTES) {
TWOSHOT_UNROLL
    for (int w = 0; w < 4; w++) {
      if (line.word[w] == TWOSHOT_SENTINEL) line.word[w] = TWOSHOT_REPLACEMENT;
    }
  } else {
    line.word[2] = line.word[3] = 0;
TWOSHOT_UNROLL
    for (int w = 0; w < 2; w++) {
      if (line.word[w] == TWOSHOT_SENTINEL) {
        line.word[w] = 0;
        line.word[2] |= 1u << w;
      }
    }
  }
  return line;
}

template <typename T>
TWOSHOT_DEVICE Line open(Line line) {
  if constexpr (T::kLineBytes == TWOSHOT_HALF_BYTES) {
TWOSHOT_UNROLL
    for (int w = 0; w < 2; w++) {
      if ((line.word[2] >> w & 1) != 0) line.word[w] = TWOSHOT_SENTINEL;
    }
  }
  return line;
}

}  // namespace twoshot
