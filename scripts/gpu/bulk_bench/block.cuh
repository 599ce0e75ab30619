// One block's view of a launch: its addresses, its part of each phase, and how it waits and signals. N ranks, U lines
// of a tile per lane; two-shot by push or by pull, or one-shot.
#pragma once

#include "protocol.cuh"

namespace {

template <int N, int U, int MODE>
struct Block {
  static constexpr int kLogU = U == 1 ? 0 : U == 2 ? 1 : U == 4 ? 2 : 3;
  static constexpr bool kTwo = MODE != kOneShot;  // phases that have flags: two, or one
  static constexpr int P = N - 1;
  static_assert(MODE != kOneShot || N == 2, "one-shot is for two ranks");

  const Args& a;
  Shared& sh;
  uint32_t epoch, error, lane, warp, chunks, tiles, tile_shift;
  Bound bound;

  __device__ __forceinline__ Block(const Args& a, Shared& sh) : a(a), sh(sh) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (a.trigger) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    epoch = ld_relaxed_u32(a.window[a.rank] + 4 * blockIdx.x) + 1;
    error = ld_relaxed_u32(a.window[a.rank] + kErrorOffset);
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    tile_shift = a.chunk_shift - (5 + kLogU);
    chunks = blockIdx.x < a.chunks ? (a.chunks - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    tiles = chunks << tile_shift;
  }

  // done[p] for the `workers` warps of that phase; all threads, then a barrier.
  __device__ __forceinline__ void start(uint32_t workers1, uint32_t workers2) {
    if (threadIdx.x < 64) {
      const uint32_t p = threadIdx.x / 32, w = threadIdx.x % 32, workers = p == 0 ? workers1 : workers2;
      sh.done[p][w] = w >= workers ? kAll : w < tiles ? w >> tile_shift : chunks;
      if (w == 0) sh.ready[p] = 0;
    }
    __syncthreads();
  }
  __device__ __forceinline__ void finish() {
    __syncthreads();  // every thread has used the epoch
    for (uint32_t i = blockIdx.x + threadIdx.x * gridDim.x; i < kReplicas; i += gridDim.x * blockDim.x) {
      st_relaxed_u32(a.window[a.rank] + 4 * i, epoch);
    }
  }
  __device__ __forceinline__ void fail() { st_relaxed_u32(a.window[a.rank] + kErrorOffset, 1); }

  __device__ __forceinline__ uint32_t peer(uint32_t distance) const { return (a.rank + distance) % N; }
  __device__ __forceinline__ uint64_t flag(uint32_t at, uint32_t phase, uint32_t source, uint32_t chunk) const {
    return a.window[at] + kFlagsOffset +
           4ull * ((phase * kMaxRanks + source) * kMaxFlags + blockIdx.x * a.kmax + chunk);
  }
  // Of this lane's first line of tile t, in a shard.
  __device__ __forceinline__ uint64_t offset(uint32_t t) const {
    const uint32_t g = blockIdx.x + (t >> tile_shift) * gridDim.x, within = t & ((1u << tile_shift) - 1);
    return 16ull * ((g << a.chunk_shift) + (within << (5 + kLogU)) + lane);
  }
  __device__ __forceinline__ uint64_t shard(uint32_t r) const {
    return MODE == kOneShot ? 0 : uint64_t{r} * a.shard_bytes;
  }
  __device__ __forceinline__ uint64_t stage(uint32_t at) const {
    return a.window[at] + kDataOffset + (epoch & 1) * (MODE == kOneShot ? a.bytes : 2 * a.bytes);
  }
  __device__ __forceinline__ uint64_t scatter(uint32_t at, uint32_t source) const { return stage(at) + shard(source); }
  __device__ __forceinline__ uint64_t broadcast(uint32_t at, uint32_t source) const {
    return stage(at) + a.bytes + shard(source);
  }

  // ---- phases: d counts the peers by distance - 1

  __device__ __forceinline__ void load1(Line (&x)[P][U], uint32_t t) const {
    const uint64_t o = offset(t);
#pragma unroll
    for (int d = 0; d < P; d++)
#pragma unroll
      for (int u = 0; u < U; u++) x[d][u] = ld_in(a.in + shard(peer(d + 1)) + o + 512 * u);
  }
  __device__ __forceinline__ void store1(const Line (&x)[P][U], uint32_t t) const {
    const uint64_t o = offset(t);
#pragma unroll
    for (int d = 0; d < P; d++)
#pragma unroll
      for (int u = 0; u < U; u++) st_sys(scatter(peer(d + 1), MODE == kOneShot ? 0 : a.rank) + o + 512 * u, x[d][u]);
  }
  __device__ __forceinline__ void load_own(Line (&x)[U], uint32_t t) const {
    const uint64_t o = offset(t);
#pragma unroll
    for (int u = 0; u < U; u++) x[u] = ld_in(a.in + shard(a.rank) + o + 512 * u);
  }
  __device__ __forceinline__ void load2(Line (&x)[P][U], uint32_t t) const {
    const uint64_t o = offset(t);
#pragma unroll
    for (int d = 0; d < P; d++)
#pragma unroll
      for (int u = 0; u < U; u++) x[d][u] = ld_sys(scatter(a.rank, MODE == kOneShot ? 0 : peer(d + 1)) + o + 512 * u);
  }
  // In rank order: rank r is at distance r - rank. With two ranks the order does not matter.
  __device__ __forceinline__ Line sum(const Line& own, const Line (&x)[P][U], int u) const {
    Line s;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (N == 2) {
        s.word[w] = pack(low(own.word[w]) + low(x[0][u].word[w]), high(own.word[w]) + high(x[0][u].word[w]));
        continue;
      }
      float l = 0, h = 0;
#pragma unroll
      for (int r = 0; r < N; r++) {
        uint32_t v = own.word[w];
#pragma unroll
        for (int d = 0; d < P; d++) v = peer(d + 1) == r ? x[d][u].word[w] : v;
        l = r == 0 ? low(v) : l + low(v);
        h = r == 0 ? high(v) : h + high(v);
      }
      s.word[w] = pack(l, h);
    }
    return s;
  }
  __device__ __forceinline__ void store2(Line (&own)[U], const Line (&x)[P][U], uint32_t t) const {
    const uint64_t o = offset(t);
#pragma unroll
    for (int u = 0; u < U; u++) own[u] = sum(own[u], x, u);
    if (MODE == kPush) {
#pragma unroll
      for (int d = 0; d < P; d++)
#pragma unroll
        for (int u = 0; u < U; u++) st_sys(broadcast(peer(d + 1), a.rank) + o + 512 * u, own[u]);
    }
    if (MODE == kPull) {
#pragma unroll
      for (int u = 0; u < U; u++) st_sys(broadcast(a.rank, a.rank) + o + 512 * u, own[u]);
    }
#pragma unroll
    for (int u = 0; u < U; u++) st_out(a.out + shard(a.rank) + o + 512 * u, own[u]);
  }
  __device__ __forceinline__ void load3(Line (&x)[P][U], uint32_t t) const {
    const uint64_t o = offset(t);
#pragma unroll
    for (int d = 0; d < P; d++)
#pragma unroll
      for (int u = 0; u < U; u++) {
        x[d][u] = ld_sys(broadcast(MODE == kPull ? peer(d + 1) : a.rank, peer(d + 1)) + o + 512 * u);
      }
  }
  __device__ __forceinline__ void store3(const Line (&x)[P][U], uint32_t t) const {
    const uint64_t o = offset(t);
#pragma unroll
    for (int d = 0; d < P; d++)
#pragma unroll
      for (int u = 0; u < U; u++) st_out(a.out + shard(peer(d + 1)) + o + 512 * u, x[d][u]);
  }

  // ---- arrival and completion, as a worker warp sees them

  __device__ __forceinline__ void await(uint32_t phase, uint32_t t) {
    const uint32_t needed = (t >> tile_shift) + 1;
    while (ld_acquire_cta(&sh.ready[phase]) < needed) {
      if (bound.expired()) {
        fail();
        break;
      }
    }
    __syncwarp();
  }
  // Worker w of `workers` in this phase has stored its part of tile t: chunks below that of its next tile are complete.
  __device__ __forceinline__ void mark(uint32_t phase, uint32_t w, uint32_t workers, uint32_t t) {
    const uint32_t next = t + workers, complete = next >= tiles ? chunks : next >> tile_shift;
    if (complete == t >> tile_shift) return;
    __syncwarp();
    if (lane == 0) st_release_cta(&sh.done[phase][w], complete);
  }
  // The same without service warps, a chunk being a tile.
  __device__ __forceinline__ void await_directly(uint32_t phase, uint32_t t) {
    if (error != 0) bound.dead = true;
    if (lane < P) {
      const uint64_t where = flag(a.rank, phase, peer(lane + 1), t);
      while (static_cast<int32_t>(ld_acquire_u32(where) - epoch) < 0) {
        if (bound.expired()) {
          fail();
          break;
        }
      }
    }
    __syncwarp();
  }
  __device__ __forceinline__ void signal_directly(bool v1, uint32_t t1, bool v2, uint32_t t2) {
    if (!v1 && !v2) return;
    __syncwarp();
    if (lane < P) {
      fence_sys();
      const uint32_t p = peer(lane + 1);
      if (v1) st_relaxed_u32(flag(p, 0, a.rank, t1), epoch);
      if (v2) st_relaxed_u32(flag(p, 1, a.rank, t2), epoch);
    }
    __syncwarp();
  }

  // ---- service warps

  __device__ __forceinline__ void poll() {
    const uint32_t phase = lane / 16, source = lane % 16 % N, ahead = lane % 16 / N;
    uint32_t got0 = 0, got1 = kTwo ? 0 : chunks;
    bool give_up = error != 0;
    while (!give_up && (got0 < chunks || got1 < chunks)) {
      const uint32_t k = (phase == 0 ? got0 : got1) + ahead;
      bool here = true;
      if (k < chunks && source != a.rank) {
        here = static_cast<int32_t>(ld_acquire_u32(flag(a.rank, phase, source, k)) - epoch) >= 0;
      }
      const uint32_t missing = ~__ballot_sync(kAll, here);
      const uint32_t miss0 = missing & 0xFFFF, miss1 = missing >> 16;
      const uint32_t new0 = min(got0 + (miss0 ? __ffs(miss0) - 1 : 16) / N, chunks);
      const uint32_t new1 = min(got1 + (miss1 ? __ffs(miss1) - 1 : 16) / N, chunks);
      if (new0 != got0 || new1 != got1) {
        __syncwarp();  // lane 0 passes on what all lanes have acquired
        if (lane == 0) {
          if (new0 != got0) st_release_cta(&sh.ready[0], new0);
          if (new1 != got1) st_release_cta(&sh.ready[1], new1);
        }
        got0 = new0, got1 = new1;
      } else {
        give_up = __any_sync(kAll, bound.expired());
        if (give_up) fail();
      }
    }
    if (give_up && lane == 0) {
      st_release_cta(&sh.ready[0], kAll);
      st_release_cta(&sh.ready[1], kAll);
    }
  }

  __device__ __forceinline__ void raise(uint32_t phase, uint32_t from, uint32_t to) const {
    for (uint32_t i = lane; i < (to - from) * P; i += 32) {
      st_relaxed_u32(flag(peer(i % P + 1), phase, a.rank, from + i / P), epoch);
    }
  }
  __device__ __forceinline__ void signal() {
    uint32_t sent0 = 0, sent1 = kTwo ? 0 : chunks;
    while (sent0 < chunks || sent1 < chunks) {
      const uint32_t now0 = __reduce_min_sync(kAll, ld_acquire_cta(&sh.done[0][lane]));
      const uint32_t now1 = kTwo ? __reduce_min_sync(kAll, ld_acquire_cta(&sh.done[1][lane])) : chunks;
      if (now0 != sent0 || now1 != sent1) {
        __syncwarp();
        fence_sys();  // by every lane that stores a flag
        raise(0, sent0, now0);
        if (kTwo) raise(1, sent1, now1);
        sent0 = now0, sent1 = now1;
        __syncwarp();
      } else if (__any_sync(kAll, bound.expired())) {
        fail();
        break;
      }
    }
  }
};

}  // namespace
