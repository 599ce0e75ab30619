// All inline PTX of the project, and nothing else. Names: op_semantics_scope_width. What touches memory is volatile
// and clobbers "memory", so the compiler keeps its order; `_if` forms are predicated, so they never branch.
// tests/sim/exec/host_ptx.h gives the same names a meaning on the CPU.
#pragma once

#include <stdint.h>

#include "args.h"

#ifdef TWOSHOT_HOST
#include "host_ptx.h"
#else

#define TWOSHOT_DEVICE __device__ __forceinline__
#define TWOSHOT_PRAGMA(text) _Pragma(#text)
#define TWOSHOT_UNROLL TWOSHOT_PRAGMA(unroll)
#define TWOSHOT_UNROLL_BY(factor) TWOSHOT_PRAGMA(unroll factor)

namespace twoshot {

// The unit of transfer. A 16-byte store may become visible word by word.
struct alignas(16) Line {
  uint32_t word[4];
};

// ---- kernel boundary ------------------------------------------------------------------------------------------

TWOSHOT_DEVICE void griddepcontrol_launch_dependents_if(bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %0, 0;\n\t"
      "@p griddepcontrol.launch_dependents; }" ::"r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- the caller's buffers: ordinary accesses ------------------------------------------------------------------

TWOSHOT_DEVICE void ld_weak_v4_if(Line& line, uint64_t address, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(line.word[0]), "+r"(line.word[1]), "+r"(line.word[2]), "+r"(line.word[3])
      : "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE void st_weak_v4_if(uint64_t address, const Line& line, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(address),
      "r"(line.word[0]), "r"(line.word[1]), "r"(line.word[2]), "r"(line.word[3]), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE void ld_weak_v4(Line& line, uint64_t address) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(line.word[0]), "=r"(line.word[1]), "=r"(line.word[2]), "=r"(line.word[3])
               : "l"(address)
               : "memory");
}

TWOSHOT_DEVICE void st_weak_v4(uint64_t address, const Line& line) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(line.word[0]), "r"(line.word[1]),
               "r"(line.word[2]), "r"(line.word[3])
               : "memory");
}

// The first two words of a line.
TWOSHOT_DEVICE void ld_weak_v2_if(Line& line, uint64_t address, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %3, 0;\n\t"
      "@p ld.global.v2.b32 {%0, %1}, [%2]; }"
      : "+r"(line.word[0]), "+r"(line.word[1])
      : "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE void st_weak_v2_if(uint64_t address, const Line& line, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %3, 0;\n\t"
      "@p st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(address),
      "r"(line.word[0]), "r"(line.word[1]), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE uint32_t ld_weak_b32(uint64_t address) {
  uint32_t value;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

TWOSHOT_DEVICE uint32_t ld_weak_b16(uint64_t address) {
  uint16_t value;
  asm volatile("ld.global.b16 %0, [%1];" : "=h"(value) : "l"(address) : "memory");
  return value;
}

TWOSHOT_DEVICE uint32_t ld_weak_b8(uint64_t address) {
  uint32_t value;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

TWOSHOT_DEVICE void st_weak_b8(uint64_t address, uint32_t value) {
  asm volatile("st.global.u8 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

TWOSHOT_DEVICE void st_weak_b32(uint64_t address, uint32_t value) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

TWOSHOT_DEVICE void st_weak_b16(uint64_t address, uint32_t value) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(address), "h"(static_cast<uint16_t>(value)) : "memory");
}

// The word that begins so many bits, less than 32, into `low` and ends in `high`.
TWOSHOT_DEVICE uint32_t shf_r_b32(uint32_t low, uint32_t high, uint32_t bits) {
  uint32_t value;
  asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(value) : "r"(low), "r"(high), "r"(bits));
  return value;
}

// The first WORDS words of the line that this lane of the warp holds, zeros behind them; all lanes take part.
template <int WORDS>
TWOSHOT_DEVICE Line shfl_idx(const Line& line, uint32_t lane) {
  Line other = {};
TWOSHOT_UNROLL
  for (int w = 0; w < WORDS; w++) {
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xFFFFFFFF;"
                 : "=r"(other.word[w])
                 : "r"(line.word[w]), "r"(lane));
  }
  return other;
}

// ---- windows: every access is relaxed at system scope ----------------------------------------------------------

TWOSHOT_DEVICE void ld_relaxed_sys_v4_if(Line& line, uint64_t address, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(line.word[0]), "+r"(line.word[1]), "+r"(line.word[2]), "+r"(line.word[3])
      : "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE void st_relaxed_sys_v4_if(uint64_t address, const Line& line, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(address),
      "r"(line.word[0]), "r"(line.word[1]), "r"(line.word[2]), "r"(line.word[3]), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE uint32_t ld_relaxed_sys_u32(uint64_t address) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

TWOSHOT_DEVICE void ld_relaxed_sys_v2_u32(uint64_t address, uint32_t& first, uint32_t& second) {
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "l"(address) : "memory");
}

TWOSHOT_DEVICE void st_relaxed_sys_u32(uint64_t address, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

TWOSHOT_DEVICE void st_relaxed_sys_u64(uint64_t address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// A multicast address may reach this instruction and the three below. The type is nominal: the words travel as they are.
TWOSHOT_DEVICE void multimem_st_relaxed_sys_v4_if(uint64_t address, const Line& line, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4}; }" ::"l"(address),
      "r"(line.word[0]), "r"(line.word[1]), "r"(line.word[2]), "r"(line.word[3]), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

// Every rank's line, added up on the way here. In which order is the switch's secret; f16 and bf16 are added in f32.
TWOSHOT_DEVICE void multimem_ld_reduce_add_relaxed_sys_v4_f32_if(Line& line, uint64_t address, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(line.word[0]), "+r"(line.word[1]), "+r"(line.word[2]), "+r"(line.word[3])
      : "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE void multimem_ld_reduce_add_relaxed_sys_v4_f16x2_if(Line& line, uint64_t address, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(line.word[0]), "+r"(line.word[1]), "+r"(line.word[2]), "+r"(line.word[3])
      : "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

TWOSHOT_DEVICE void multimem_ld_reduce_add_relaxed_sys_v4_bf16x2_if(Line& line, uint64_t address, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
      "@p multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(line.word[0]), "+r"(line.word[1]), "+r"(line.word[2]), "+r"(line.word[3])
      : "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

// An arrival: whoever reads it and then fences sees all that this thread's block stored before its last barrier.
TWOSHOT_DEVICE void st_release_sys_u32(uint64_t address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// ---- flags of the ring: the only 8-byte arrivals ---------------------------------------------------------------

TWOSHOT_DEVICE uint64_t ld_acquire_sys_u64(uint64_t address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// Behind a fence that covers what it speaks of. (`.b64`: tests/ptx_lint.rs tells flags from all else by it.)
TWOSHOT_DEVICE void st_relaxed_sys_b64(uint64_t address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

TWOSHOT_DEVICE uint64_t ld_relaxed_sys_u64(uint64_t address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// ---- what the warps of a block tell each other ------------------------------------------------------------------

// Words of shared memory, by index.
TWOSHOT_DEVICE uint32_t block_word(uint32_t index) {
  __shared__ uint32_t words[TWOSHOT_BLOCK_WORDS];
  return static_cast<uint32_t>(__cvta_generic_to_shared(words)) + 4 * index;
}

TWOSHOT_DEVICE void st_relaxed_cta_block_word(uint32_t index, uint32_t value) {
  asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" ::"r"(block_word(index)), "r"(value) : "memory");
}

TWOSHOT_DEVICE uint32_t ld_acquire_cta_block_word(uint32_t index) {
  uint32_t value;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(block_word(index)) : "memory");
  return value;
}

// What has arrived, on behalf of a peer.
TWOSHOT_DEVICE void st_release_cta_block_word_ready(uint32_t index, uint32_t value) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(block_word(index)), "r"(value) : "memory");
}

// What a warp has done. (`.b32`: see above.)
TWOSHOT_DEVICE void st_release_cta_block_word_done(uint32_t index, uint32_t value) {
  asm volatile("st.release.cta.shared.b32 [%0], %1;" ::"r"(block_word(index)), "r"(value) : "memory");
}

// Whether any lane of the warp says so; all lanes take part and go on together.
TWOSHOT_DEVICE bool vote_any(bool mine) {
  uint32_t any;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0;\n\t"
               "vote.sync.any.pred q, p, 0xFFFFFFFF;\n\t"
               "selp.u32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(static_cast<uint32_t>(mine))
               : "memory");
  return any != 0;
}

// Orders what the lanes of a warp did before it and do behind it.
TWOSHOT_DEVICE void bar_warp_sync() { asm volatile("bar.warp.sync 0xFFFFFFFF;" ::: "memory"); }

// Between accesses to the same memory by its own address and by the multicast address.
TWOSHOT_DEVICE void fence_proxy_alias() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// ---- own header: bookkeeping that carries no data, hence relaxed (the marks are read by tests/ptx_lint.rs) --------

// An exchange, not an addition: ptxas surrounds an addition with a warp-wide vote and waits for the answer there.
TWOSHOT_DEVICE uint32_t atom_relaxed_gpu_exchange_ticket(uint64_t address, uint32_t ticket) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.exch.b32 %0, [%1], %2; // not-an-arrival: overlap ticket"
               : "=r"(old)
               : "l"(address), "r"(ticket)
               : "memory");
  return old;
}

TWOSHOT_DEVICE uint32_t atom_relaxed_gpu_claim_fault(uint64_t address, uint32_t claim) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], 0, %2; // not-an-arrival: fault claim"
               : "=r"(old)
               : "l"(address), "r"(claim)
               : "memory");
  return old;
}

TWOSHOT_DEVICE void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

TWOSHOT_DEVICE uint64_t mov_globaltimer_u64() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// Between two failed polls. Polls of one thread are spaced by their own latency; only the CPU has to give way.
TWOSHOT_DEVICE void spin_pause() {}

// Between two looks at a word of the block's: warps that ask without a pause take turns from those that work.
TWOSHOT_DEVICE void nanosleep_pause() { asm volatile("nanosleep.u32 32;" ::: "memory"); }

// ---- arithmetic: registers only, so neither volatile nor a clobber ------------------------------------------------

TWOSHOT_DEVICE float mov_b32_f32(uint32_t bits) { return __uint_as_float(bits); }

TWOSHOT_DEVICE uint32_t mov_f32_b32(float value) { return __float_as_uint(value); }

// Subnormals are kept, a NaN result is 0x7FFFFFFF.
TWOSHOT_DEVICE float add_rn_f32(float a, float b) {
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}

TWOSHOT_DEVICE void cvt_f16x2_f32(uint32_t pair, float& low, float& high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// To nearest even; a NaN becomes 0x7FFF.
TWOSHOT_DEVICE uint32_t cvt_rn_f16x2_f32(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

TWOSHOT_DEVICE uint32_t cvt_rn_bf16x2_f32(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

TWOSHOT_DEVICE float mul_rn_f32(float a, float b) {
  float result;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Both halves at once, each rounded once; a NaN becomes 0x7FFF.
TWOSHOT_DEVICE uint32_t mul_rn_f16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

TWOSHOT_DEVICE uint32_t mul_rn_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

TWOSHOT_DEVICE float div_rn_f32(float a, float b) {
  float result;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Of two values one of which is a NaN the other; +0 is more than -0.
TWOSHOT_DEVICE float max_f32(float a, float b) {
  float result;
  asm("max.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

TWOSHOT_DEVICE float min_f32(float a, float b) {
  float result;
  asm("min.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

TWOSHOT_DEVICE double mov_b64_f64(uint32_t low, uint32_t high) {
  return __longlong_as_double(static_cast<int64_t>(uint64_t{high} << 32 | low));
}

TWOSHOT_DEVICE void mov_f64_b64(double value, uint32_t& low, uint32_t& high) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(value));
  low = static_cast<uint32_t>(bits);
  high = static_cast<uint32_t>(bits >> 32);
}

TWOSHOT_DEVICE double add_rn_f64(double a, double b) {
  double result;
  asm("add.rn.f64 %0, %1, %2;" : "=d"(result) : "d"(a), "d"(b));
  return result;
}

TWOSHOT_DEVICE double mul_rn_f64(double a, double b) {
  double result;
  asm("mul.rn.f64 %0, %1, %2;" : "=d"(result) : "d"(a), "d"(b));
  return result;
}

TWOSHOT_DEVICE double div_rn_f64(double a, double b) {
  double result;
  asm("div.rn.f64 %0, %1, %2;" : "=d"(result) : "d"(a), "d"(b));
  return result;
}

TWOSHOT_DEVICE double max_f64(double a, double b) {
  double result;
  asm("max.f64 %0, %1, %2;" : "=d"(result) : "d"(a), "d"(b));
  return result;
}

TWOSHOT_DEVICE double min_f64(double a, double b) {
  double result;
  asm("min.f64 %0, %1, %2;" : "=d"(result) : "d"(a), "d"(b));
  return result;
}

// Exact; the upper half of the operand is ignored.
TWOSHOT_DEVICE uint32_t cvt_rn_f16x2_e4m3x2(uint32_t bits) {
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(bits)));
  return pair;
}

// To nearest even; what is too large, infinities too, becomes the largest finite value; a NaN becomes 0x7F.
TWOSHOT_DEVICE uint32_t cvt_rn_satfinite_e4m3x2_f32(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

TWOSHOT_DEVICE uint32_t cvt_rn_satfinite_e5m2x2_f32(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace twoshot

#endif
