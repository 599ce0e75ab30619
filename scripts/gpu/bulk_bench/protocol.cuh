// The protocol: plain data and one flag per chunk. What a window holds, why reuse of it is safe, and the PTX it takes.
//
// Units      Line: 16 bytes. Tile: 32 * U lines, what a warp moves at once (U lines per lane). Chunk: a power of two
//            of tiles, the unit of a flag. Chunk g of each shard belongs to block g % blocks and is its chunk
//            g / blocks. Tile T of a block (T counts through its chunks) belongs to warp T % workers of each phase's
//            workers.
// Window     [epoch replicas, error][flags: phase, source, block * kmax + chunk of block][stage 0][stage 1]
//            stage, two-shot: scatter slot r at r * shard (share of the owner's shard, from rank r), broadcast slot r
//            at S + r * shard. One-shot: one slot of S. Pull: only the owner's own broadcast slot is used.
// Epoch      Launches so far plus one, so never 0, which is what flags hold before the first launch. Block b reads
//            replica b; behind the barrier that ends the block it advances the replicas i with i % blocks == b, so no
//            replica is touched by two blocks of a launch.
// Flags      Flag >= epoch (signed difference): a peer may already be one launch ahead, never two. A flag of e + 1
//            says that the peer has ended e, so all of e's data is there too; e + 1 uses the other stage.
// Reuse      Two stages. Stage e % 2 is written again in launch e + 2, on our side after our e + 1 has ended. In
//            e + 1 some block awaited a flag of e + 1 from every peer (block 0 always has a chunk), which the peer
//            raised in its launch e + 1, hence after its launch e had ended, all its loads (also pulls from our
//            window) included. Layouts change only while all GPUs are idle. Every flag addressed to a rank is awaited
//            in the same launch, and data precedes its flag, so no store lands after its launch's end on the
//            receiver.
// Release    Workers store data; __syncwarp; lane 0: st.release.cta done[warp] in shared memory. The signaller warp
//            reads all done[] with acquire.cta, __syncwarp, fence.acq_rel.sys, st.relaxed.sys of the flags of all
//            chunks that became complete since its last fence: a slow fence delays only flags, and makes the next
//            batch larger.
// Acquire    The poller warp reads the block's next flags (several chunks ahead) with ld.acquire.sys, __syncwarp,
//            lane 0: st.release.cta ready[phase]; every lane of a worker reads ready[phase] with acquire.cta; then it
//            loads with ld.relaxed.sys, which no L1 serves.
// Progress   Round q of a warp: load tile of round q; wait for the chunks of rounds q - e2 (phase 2) and q - e3
//            (phase 3); then store all. The host sees to it that all tiles of a chunk awaited in round q are stored
//            in rounds < q, on any rank, so waits are well-founded whatever the blocks' speeds; all blocks are
//            co-resident. Between the barrier that begins a block and the one that ends it there is no block-wide
//            barrier, and no thread leaves early.
// Bound      Every spin gives up after 2 s and sets the error word; later launches see it and wait for nothing. The
//            host then clears all windows, reports and skips the configuration.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace {

constexpr int kMaxRanks = 4;
constexpr uint32_t kReplicas = 256;
constexpr uint32_t kErrorOffset = 4 * kReplicas;
constexpr uint32_t kFlagsOffset = 4096;
constexpr uint32_t kMaxFlags = 1u << 16;  // per phase and source
constexpr uint32_t kDataOffset = kFlagsOffset + 2 * kMaxRanks * kMaxFlags * 4;
constexpr uint64_t kTimeoutNs = 2000000000ull;
constexpr size_t kMaxBytes = size_t{64} << 20;
constexpr size_t kGuard = 4096;
constexpr size_t kMaxStash = 220 * 1024;
constexpr uint32_t kAll = 0xFFFFFFFFu;

enum Mode { kPush, kPull, kOneShot };
enum Opt { kService, kDirect, kStash };

struct Args {
  uint64_t in, out;
  uint64_t window[kMaxRanks];
  uint64_t bytes;  // S
  uint32_t rank, shard_bytes, chunks, chunk_shift /* log2 of lines in a chunk */, kmax, e2, e3, w1, w2, w3, trigger;
};

struct Line {
  uint32_t word[4];
};

struct Shared {
  uint32_t ready[2];
  uint32_t done[2][32];
};

// ---- PTX ----

__device__ __forceinline__ Line ld_in(uint64_t p) {
  Line v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ Line ld_sys(uint64_t p) {
  Line v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void st_out(uint64_t p, const Line& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3]) : "memory");
}
__device__ __forceinline__ void st_sys(uint64_t p, const Line& v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3]) : "memory");
}
__device__ __forceinline__ uint32_t ld_relaxed_u32(uint64_t p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t ld_acquire_u32(uint64_t p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void st_relaxed_u32(uint64_t p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t ld_acquire_cta(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
  return v;
}
__device__ __forceinline__ void st_release_cta(uint32_t* p, uint32_t v) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory");
}
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

// ---- sums ----

__device__ __forceinline__ float low(uint32_t w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float high(uint32_t w) { return __uint_as_float(w & 0xFFFF0000u); }
__device__ __forceinline__ uint32_t pack(float l, float h) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(h), "f"(l));
  return w;
}

// ---- the bounded wait ----

struct Bound {
  uint32_t spins = 0;
  bool dead = false;
  uint64_t deadline = 0;
  // After every failed poll; true once the time is over.
  __device__ __forceinline__ bool expired() {
    if (dead) return true;
    if (++spins % 1024 != 0) return false;
    const uint64_t now = now_ns();
    if (deadline == 0) deadline = now + kTimeoutNs;
    dead = now >= deadline;
    return dead;
  }
};

}  // namespace
