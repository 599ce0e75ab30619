// kernels/ptx.cuh for the CPU: the same names, the same results bit for bit. Memory is read and written word by word,
// as relaxed atomics, so that a 16-byte store really lands in parts; every access may be where a thread is preempted.
#pragma once

#include <time.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "args.h"
#include "exec.h"

namespace twoshot::sim {

struct Dim {
  unsigned x;
};

// Where the running fiber is in its grid.
struct Place {
  Dim grid, block, block_index, thread_index;
};

const Place& here();
void barrier();            // __syncthreads
void warp_barrier();       // bar.warp.sync of all lanes
// shfl.sync.idx of four words of all lanes
void warp_exchange(const uint32_t mine[4], unsigned lane, uint32_t theirs[4]);
// vote.sync.any of all lanes
bool warp_any(bool mine);
uint32_t& block_word(uint32_t index);  // shared memory of the running block
void pause();              // after a failed poll: let the others run
void progressed();         // this thread wrote something
bool preempt();            // maybe run others first; true: and tear this store
unsigned tear_order();     // for preempt() == true, a number that permutes four words
uint32_t half_of(float value);
float float_of_half(uint32_t half);
uint32_t half_of_e4m3(uint32_t byte);
// With so many exponent bits, 4 (e4m3) or 5 (e5m2): to nearest even, too large becomes the largest finite value.
uint32_t fp8_of(float value, unsigned exponent_bits);

}  // namespace twoshot::sim

// What nvcc provides.
#define __global__ __attribute__((visibility("hidden")))
#define __launch_bounds__(...)
#define __grid_constant__
#define blockIdx (::twoshot::sim::here().block_index)
#define threadIdx (::twoshot::sim::here().thread_index)
#define blockDim (::twoshot::sim::here().block)
#define gridDim (::twoshot::sim::here().grid)
#define __syncthreads ::twoshot::sim::barrier
#define TWOSHOT_DEVICE inline
#define TWOSHOT_UNROLL
#define TWOSHOT_UNROLL_BY(factor)

namespace twoshot {

struct alignas(16) Line {
  uint32_t word[4];
};

template <typename T>
inline T* host_pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

inline uint32_t host_load(uint64_t address) { return __atomic_load_n(host_pointer<uint32_t>(address), __ATOMIC_RELAXED); }

inline void host_store(uint64_t address, uint32_t value) {
  __atomic_store_n(host_pointer<uint32_t>(address), value, __ATOMIC_RELAXED);
}

inline void griddepcontrol_launch_dependents_if(bool) {}
inline void griddepcontrol_wait() {}

inline void ld_relaxed_sys_v4_if(Line& line, uint64_t address, bool wanted) {
  if (!wanted) return;
  for (unsigned w = 0; w < 4; w++) line.word[w] = host_load(address + 4 * w);
}

inline void st_relaxed_sys_v4_if(uint64_t address, const Line& line, bool wanted) {
  if (!wanted) return;
  sim::progressed();
  if (!sim::preempt()) {
    for (unsigned w = 0; w < 4; w++) host_store(address + 4 * w, line.word[w]);
    return;
  }
  // Torn: in another order, with other threads running in between.
  const unsigned order = sim::tear_order();
  for (unsigned i = 0; i < 4; i++) {
    const unsigned w = (i ^ order) & 3;
    host_store(address + 4 * w, line.word[w]);
    sim::preempt();
  }
}

inline void ld_weak_v4(Line& line, uint64_t address) { ld_relaxed_sys_v4_if(line, address, true); }
inline void st_weak_v4(uint64_t address, const Line& line) { st_relaxed_sys_v4_if(address, line, true); }
inline void ld_weak_v4_if(Line& line, uint64_t address, bool wanted) { ld_relaxed_sys_v4_if(line, address, wanted); }
inline void st_weak_v4_if(uint64_t address, const Line& line, bool wanted) { st_relaxed_sys_v4_if(address, line, wanted); }

inline void ld_weak_v2_if(Line& line, uint64_t address, bool wanted) {
  for (unsigned w = 0; w < 2 && wanted; w++) line.word[w] = host_load(address + 4 * w);
}

inline void st_weak_v2_if(uint64_t address, const Line& line, bool wanted) {
  for (unsigned w = 0; w < 2 && wanted; w++) host_store(address + 4 * w, line.word[w]);
}

inline uint32_t ld_weak_b8(uint64_t address) { return *host_pointer<uint8_t>(address); }
inline void st_weak_b8(uint64_t address, uint32_t value) {
  *host_pointer<uint8_t>(address) = static_cast<uint8_t>(value);
}

inline uint32_t ld_weak_b32(uint64_t address) { return *host_pointer<uint32_t>(address); }
inline uint32_t ld_weak_b16(uint64_t address) { return *host_pointer<uint16_t>(address); }
inline void st_weak_b32(uint64_t address, uint32_t value) { *host_pointer<uint32_t>(address) = value; }
inline void st_weak_b16(uint64_t address, uint32_t value) {
  *host_pointer<uint16_t>(address) = static_cast<uint16_t>(value);
}

inline uint32_t shf_r_b32(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> bits);
}

inline uint32_t ld_relaxed_sys_u32(uint64_t address) { return host_load(address); }
inline void ld_relaxed_sys_v2_u32(uint64_t address, uint32_t& first, uint32_t& second) {
  first = host_load(address);
  second = host_load(address + 4);
}

inline void st_relaxed_sys_u32(uint64_t address, uint32_t value) {
  sim::progressed();
  host_store(address, value);
}

inline void st_relaxed_sys_u64(uint64_t address, uint64_t value) {
  __atomic_store_n(host_pointer<uint64_t>(address), value, __ATOMIC_RELAXED);
}

inline void multimem_st_relaxed_sys_v4_if(uint64_t address, const Line& line, bool wanted) {
  if (!wanted) return;
  sim::progressed();
  sim::preempt();
  twoshot_sim_multimem_store(address, line.word);
}

inline void st_release_sys_u32(uint64_t address, uint32_t value) {
  sim::progressed();
  sim::preempt();
  __atomic_store_n(host_pointer<uint32_t>(address), value, __ATOMIC_RELEASE);
}

inline void fence_proxy_alias() {}

inline uint64_t ld_acquire_sys_u64(uint64_t address) {
  return __atomic_load_n(host_pointer<uint64_t>(address), __ATOMIC_ACQUIRE);
}

inline void st_relaxed_sys_b64(uint64_t address, uint64_t value) {
  sim::progressed();
  sim::preempt();
  __atomic_store_n(host_pointer<uint64_t>(address), value, __ATOMIC_RELAXED);
}

inline uint64_t ld_relaxed_sys_u64(uint64_t address) {
  return __atomic_load_n(host_pointer<uint64_t>(address), __ATOMIC_RELAXED);
}

// The threads of a block share an OS thread: what one has stored the others see.
inline void st_relaxed_cta_block_word(uint32_t index, uint32_t value) { sim::block_word(index) = value; }
inline uint32_t ld_acquire_cta_block_word(uint32_t index) { return sim::block_word(index); }
inline void st_release_cta_block_word_ready(uint32_t index, uint32_t value) {
  sim::progressed();
  sim::preempt();
  sim::block_word(index) = value;
}
inline void st_release_cta_block_word_done(uint32_t index, uint32_t value) {
  st_release_cta_block_word_ready(index, value);
}
inline bool vote_any(bool mine) { return sim::warp_any(mine); }
inline void bar_warp_sync() { sim::warp_barrier(); }

template <int WORDS>
inline Line shfl_idx(const Line& line, uint32_t lane) {
  Line other;
  sim::warp_exchange(line.word, lane, other.word);
  for (int w = WORDS; w < 4; w++) other.word[w] = 0;
  return other;
}

inline uint32_t atom_relaxed_gpu_exchange_ticket(uint64_t address, uint32_t ticket) {
  return __atomic_exchange_n(host_pointer<uint32_t>(address), ticket, __ATOMIC_RELAXED);
}

inline uint32_t atom_relaxed_gpu_claim_fault(uint64_t address, uint32_t claim) {
  uint32_t old = 0;
  __atomic_compare_exchange_n(host_pointer<uint32_t>(address), &old, claim, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return old;
}

inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }

inline uint64_t mov_globaltimer_u64() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

inline void nanosleep_pause() { sim::pause(); }
inline void spin_pause() { sim::pause(); }

inline float mov_b32_f32(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t mov_f32_b32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// The GPU's one NaN instead of the CPU's propagated payload.
inline float add_rn_f32(float a, float b) {
  const float sum = a + b;
  return sum != sum ? mov_b32_f32(0x7FFFFFFFu) : sum;
}

inline void cvt_f16x2_f32(uint32_t pair, float& low, float& high) {
  low = sim::float_of_half(pair & 0xFFFF);
  high = sim::float_of_half(pair >> 16);
}

inline uint32_t cvt_rn_f16x2_f32(float low, float high) { return sim::half_of(low) | sim::half_of(high) << 16; }

inline uint32_t host_bf16(float value) {
  const uint32_t bits = mov_f32_b32(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest even; carries into the exponent, up to infinity
}

inline uint32_t cvt_rn_bf16x2_f32(float low, float high) { return host_bf16(low) | host_bf16(high) << 16; }

inline float host_canonical(float value) { return value != value ? mov_b32_f32(0x7FFFFFFFu) : value; }

inline float mul_rn_f32(float a, float b) { return host_canonical(a * b); }
inline float div_rn_f32(float a, float b) { return host_canonical(a / b); }

inline uint32_t mul_rn_f16x2(uint32_t a, uint32_t b) {
  float low[2], high[2];
  cvt_f16x2_f32(a, low[0], high[0]);
  cvt_f16x2_f32(b, low[1], high[1]);
  // The products are exact in f32.
  return cvt_rn_f16x2_f32(low[0] * low[1], high[0] * high[1]);
}

// Exact in f64, but not below f32's subnormals: what f32 cannot hold leaves its mark in the last bit, which is far below
// the one that decides.
inline uint32_t host_bf16_product(uint32_t a, uint32_t b) {
  const double product = double{mov_b32_f32(a << 16)} * double{mov_b32_f32(b << 16)};
  const float rounded = static_cast<float>(product);
  uint32_t bits = mov_f32_b32(rounded);
  if (product == product && double{rounded} != product) {
    if (std::fabs(double{rounded}) > std::fabs(product)) bits--;
    bits |= 1;
  }
  return host_bf16(mov_b32_f32(bits));
}

inline uint32_t mul_rn_bf16x2(uint32_t a, uint32_t b) {
  return host_bf16_product(a & 0xFFFF, b & 0xFFFF) | host_bf16_product(a >> 16, b >> 16) << 16;
}

inline double mov_b64_f64(uint32_t low, uint32_t high) {
  const uint64_t bits = uint64_t{high} << 32 | low;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

inline void mov_f64_b64(double value, uint32_t& low, uint32_t& high) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  low = static_cast<uint32_t>(bits);
  high = static_cast<uint32_t>(bits >> 32);
}

inline double host_canonical(double value) { return value != value ? mov_b64_f64(0, 0x7FF80000u) : value; }
inline double add_rn_f64(double a, double b) { return host_canonical(a + b); }
inline double mul_rn_f64(double a, double b) { return host_canonical(a * b); }
inline double div_rn_f64(double a, double b) { return host_canonical(a / b); }

// Of two values one of which is a NaN the other; +0 is more than -0.
template <typename F>
inline F host_larger(F a, F b) {
  if (a != a) return host_canonical(b);
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
inline float max_f32(float a, float b) { return host_larger(a, b); }
inline float min_f32(float a, float b) { return host_canonical(-host_larger(-a, -b)); }
inline double max_f64(double a, double b) { return host_larger(a, b); }
inline double min_f64(double a, double b) { return host_canonical(-host_larger(-a, -b)); }

inline uint32_t cvt_rn_f16x2_e4m3x2(uint32_t bits) {
  return sim::half_of_e4m3(bits & 0xFF) | sim::half_of_e4m3(bits >> 8 & 0xFF) << 16;
}
inline uint32_t cvt_rn_satfinite_e4m3x2_f32(float low, float high) {
  return sim::fp8_of(low, 4) | sim::fp8_of(high, 4) << 8;
}
inline uint32_t cvt_rn_satfinite_e5m2x2_f32(float low, float high) {
  return sim::fp8_of(low, 5) | sim::fp8_of(high, 5) << 8;
}

// One load through the switch, which adds in f32 in an order of its own: it begins with another memory at every line and
// goes backwards. A NaN keeps the bits of the first one met, whatever they stand for elsewhere. unpack makes `values`
// numbers of a word, pack a word of them.
template <typename Unpack, typename Pack>
inline void host_ld_reduce(Line& line, uint64_t address, int values, Unpack unpack, Pack pack) {
  uint32_t words[256][4];
  sim::preempt();
  const unsigned memories = twoshot_sim_multimem_load(address, words, 256);
  const unsigned start = static_cast<unsigned>(address / 16 % memories), bits = 32u / static_cast<unsigned>(values);
  for (int w = 0; w < 4; w++) {
    float sum[2] = {};
    uint32_t nan = 0, nan_mask = 0;  // of the elements that were one
    for (unsigned k = 0; k < memories; k++) {
      const uint32_t word = words[(start + memories - k) % memories][w];
      float term[2] = {};
      unpack(word, term);
      for (int e = 0; e < values; e++) {
        sum[e] = k == 0 ? term[e] : add_rn_f32(sum[e], term[e]);
        const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << bits) - 1) << (static_cast<unsigned>(e) * bits % 32);
        if (term[e] == term[e] || (nan_mask & mask) != 0) continue;
        nan |= word & mask;
        nan_mask |= mask;
      }
    }
    line.word[w] = (pack(sum) & ~nan_mask) | nan;
  }
}

inline void multimem_ld_reduce_add_relaxed_sys_v4_f32_if(Line& line, uint64_t address, bool wanted) {
  if (!wanted) return;
  host_ld_reduce(
      line, address, 1, [](uint32_t word, float* values) { values[0] = mov_b32_f32(word); },
      [](const float* values) { return mov_f32_b32(values[0]); });
}

inline void multimem_ld_reduce_add_relaxed_sys_v4_f16x2_if(Line& line, uint64_t address, bool wanted) {
  if (!wanted) return;
  host_ld_reduce(
      line, address, 2, [](uint32_t word, float* values) { cvt_f16x2_f32(word, values[0], values[1]); },
      [](const float* values) { return cvt_rn_f16x2_f32(values[0], values[1]); });
}

inline void multimem_ld_reduce_add_relaxed_sys_v4_bf16x2_if(Line& line, uint64_t address, bool wanted) {
  if (!wanted) return;
  host_ld_reduce(
      line, address, 2,
      [](uint32_t word, float* values) {
        values[0] = mov_b32_f32(word << 16);
        values[1] = mov_b32_f32(word & 0xFFFF0000u);
      },
      [](const float* values) { return cvt_rn_bf16x2_f32(values[0], values[1]); });
}

}  // namespace twoshot
