// Pre-multiplied sums, first half: out[i] = in[i] * factor, rounded to the elements' type. The ordinary sum then runs in
// place on `out`, which is the caller's to be overwritten. One kernel per element type, integers by their width.
//
// Regions    The caller's `in`, `out` and, on the device, its factor. No window, no control record, no peer: this kernel
//            waits for nobody, so it ends whatever the other ranks do, and needs no place beside other kernels.
// Order      Nothing is touched before the launch before this one has ended (griddepcontrol.wait): it may have written
//            the input or the factor, which is read when the kernel runs and not when it was queued. The sum behind it
//            waits in the same way until this grid is complete and its stores are visible.
// Elements   Each is read and then written by one thread, once, so `in` may be `out`. Where both buffers lie alike in 16
//            bytes, the elements between the first and the last such boundary go 16 bytes at a time, the others one by
//            one; else all go one by one. The host says where (`head`). Indices have 64 bits.
// Rounding   As NCCL's FuncPreMulSum: f16 and bf16 multiplied in their own type, rounded once; f32 and f64 too; integers
//            modulo 2 to the number of bits. e4m3 and e5m2: NCCL multiplies in f16 and converts that, saturating to the
//            largest finite value. f32 instead of f16 gives the same bits: a product has at most 8 bits, is exact in f16
//            wherever it is not below half of the smallest e4m3 or e5m2 subnormal (0 in both), and beyond f16 it is the
//            largest finite value in both.
#pragma once

#include "args.h"
#include "folds.cuh"
#include "ptx.cuh"
#include "types.cuh"

namespace twoshot {

// ---- what a factor does to a unit: one word of elements, or the two of one element of eight bytes ---------------------
// `of` makes a factor of its bits.

struct scale_f32 {
  static constexpr uint32_t kBytes = 4, kWords = 1;
  using Factor = float;
  static TWOSHOT_DEVICE Factor of(const Line& bits, uint32_t) { return mov_b32_f32(bits.word[0]); }
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t) {
    unit[0] = mov_f32_b32(mul_rn_f32(mov_b32_f32(unit[0]), factor));
  }
};

// The factor in both halves.
struct Halves {
  static constexpr uint32_t kBytes = 2, kWords = 1;
  using Factor = uint32_t;
  static TWOSHOT_DEVICE Factor of(const Line& bits, uint32_t) { return (bits.word[0] & 0xFFFFu) * 0x10001u; }
};

struct scale_f16 : Halves {
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t) { unit[0] = mul_rn_f16x2(unit[0], factor); }
};

struct scale_bf16 : Halves {
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t) {
    unit[0] = mul_rn_bf16x2(unit[0], factor);
  }
};

struct scale_fp8 {
  static constexpr uint32_t kBytes = 1, kWords = 1;
  using Factor = float;
  static TWOSHOT_DEVICE Factor of(const Line& bits, uint32_t type) {
    float values[8];
    fp8::unpack(Line{{bits.word[0] & 0xFFu, 0, 0, 0}}, values, type);
    return values[0];
  }
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t type) {
    float values[8];
    fp8::unpack(Line{{unit[0], 0, 0, 0}}, values, type);
TWOSHOT_UNROLL
    for (int e = 0; e < 4; e++) values[e] = mul_rn_f32(values[e], factor);
    unit[0] = fp8::pack(values, type).word[0];
  }
};

struct scale_i8 {
  static constexpr uint32_t kBytes = 1, kWords = 1;
  using Factor = uint32_t;
  static TWOSHOT_DEVICE Factor of(const Line& bits, uint32_t) { return bits.word[0]; }
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t) {
    uint32_t word = 0;
TWOSHOT_UNROLL
    for (int e = 0; e < 4; e++) word |= ((unit[0] >> (8 * e)) * factor & 0xFFu) << (8 * e);
    unit[0] = word;
  }
};

struct scale_i32 {
  static constexpr uint32_t kBytes = 4, kWords = 1;
  using Factor = uint32_t;
  static TWOSHOT_DEVICE Factor of(const Line& bits, uint32_t) { return bits.word[0]; }
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t) { unit[0] *= factor; }
};

struct scale_i64 {
  static constexpr uint32_t kBytes = 8, kWords = 2;
  using Factor = uint64_t;
  static TWOSHOT_DEVICE Factor of(const Line& bits, uint32_t) { return uint64_t{bits.word[1]} << 32 | bits.word[0]; }
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t) {
    const uint64_t product = (uint64_t{unit[1]} << 32 | unit[0]) * factor;
    unit[0] = static_cast<uint32_t>(product);
    unit[1] = static_cast<uint32_t>(product >> 32);
  }
};

struct scale_f64 {
  static constexpr uint32_t kBytes = 8, kWords = 2;
  using Factor = double;
  static TWOSHOT_DEVICE Factor of(const Line& bits, uint32_t) { return mov_b64_f64(bits.word[0], bits.word[1]); }
  static TWOSHOT_DEVICE void apply(uint32_t* unit, Factor factor, uint32_t) {
    mov_f64_b64(mul_rn_f64(mov_b64_f64(unit[0], unit[1]), factor), unit[0], unit[1]);
  }
};

// ---- the kernel -------------------------------------------------------------------------------------------------------

template <typename S>
struct Scale {
  static constexpr uint64_t kPerLine = TWOSHOT_LINE_BYTES / S::kBytes;
  // Lines that a thread has in flight together.
  static constexpr uint32_t kBatch = 4;
  using Factor = typename S::Factor;

  const uint64_t in, out, count, head, value, address;
  const uint32_t type, trigger;

  explicit TWOSHOT_DEVICE Scale(const TwoshotScaleArgs& args)
      : in(args.in),
        out(args.out),
        count(args.count),
        head(args.head),
        value(args.factor),
        address(args.factor_address),
        type(args.type),
        trigger(args.trigger) {}

  // One element, in the low bytes.
  static TWOSHOT_DEVICE Line load(uint64_t address) {
    Line line = {};
    if constexpr (S::kBytes == 8) {
      ld_weak_v2_if(line, address, true);
    } else if constexpr (S::kBytes == 4) {
      line.word[0] = ld_weak_b32(address);
    } else if constexpr (S::kBytes == 2) {
      line.word[0] = ld_weak_b16(address);
    } else {
      line.word[0] = ld_weak_b8(address);
    }
    return line;
  }

  static TWOSHOT_DEVICE void store(uint64_t address, const Line& line) {
    if constexpr (S::kBytes == 8) {
      st_weak_v2_if(address, line, true);
    } else if constexpr (S::kBytes == 4) {
      st_weak_b32(address, line.word[0]);
    } else if constexpr (S::kBytes == 2) {
      st_weak_b16(address, line.word[0]);
    } else {
      st_weak_b8(address, line.word[0]);
    }
  }

  TWOSHOT_DEVICE Factor factor() const {
    Line bits = {{static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32), 0, 0}};
    if (address != 0) bits = load(address);
    return S::of(bits, type);
  }

  TWOSHOT_DEVICE void run() const {
    const uint64_t first = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
    griddepcontrol_wait();
    griddepcontrol_launch_dependents_if(trigger != 0);
    const Factor factor = this->factor();

    const uint64_t lines = (count - head) / kPerLine;
    const uint64_t from = in + head * S::kBytes, to = out + head * S::kBytes;
TWOSHOT_UNROLL_BY(1)
    for (uint64_t i = first; i < lines; i += kBatch * step) {
      Line line[kBatch];
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < kBatch; u++) {
        line[u] = Line{};
        ld_weak_v4_if(line[u], from + (i + u * step) * TWOSHOT_LINE_BYTES, i + u * step < lines);
      }
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < kBatch; u++) {
TWOSHOT_UNROLL
        for (uint32_t w = 0; w < 4; w += S::kWords) S::apply(line[u].word + w, factor, type);
        st_weak_v4_if(to + (i + u * step) * TWOSHOT_LINE_BYTES, line[u], i + u * step < lines);
      }
    }

    // [0, head) and what is behind the lines, one by one.
    const uint64_t alone = count - lines * kPerLine;
TWOSHOT_UNROLL_BY(1)
    for (uint64_t i = first; i < alone; i += step) {
      const uint64_t offset = (i < head ? i : i + lines * kPerLine) * S::kBytes;
      Line line = load(in + offset);
      S::apply(line.word, factor, type);
      store(out + offset, line);
    }
  }
};

}  // namespace twoshot
