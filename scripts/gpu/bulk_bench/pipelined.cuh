// A, B, D, G, H: every worker warp does all phases, at distances e2 and e3 in rounds. With service warps (A, B, D) or
// with a flag per tile that each warp polls and raises itself (G, H: kDirect). D may keep its own input in shared
// memory (kStash).
#pragma once

#include "block.cuh"

namespace {

template <int N, int U, int MODE, int OPT>
__global__ void __launch_bounds__(U * (N > 2 ? 2 : 1) >= 4 ? 640 : 1024, 1) fused(const __grid_constant__ Args a) {
  static_assert(OPT != kStash || MODE == kOneShot, "");
  extern __shared__ uint4 stash[];
  __shared__ Shared sh;
  constexpr bool kServed = OPT != kDirect;
  constexpr int P = N - 1;
  using B = Block<N, U, MODE>;
  B me(a, sh);
  const uint32_t workers = a.w1;
  if (kServed) me.start(workers, workers);

  if (kServed && me.warp == workers) {
    me.poll();
  } else if (kServed && me.warp == workers + 1) {
    me.signal();
  } else {
    const uint32_t rounds = (me.tiles + workers - 1) / workers;
    const uint32_t end = rounds == 0 ? 0 : rounds + (B::kTwo ? a.e3 : a.e2);
    const uint32_t slots = a.e2 + 1;
    uint32_t slot = 0;
    bool pending1 = false, pending2 = false;
    uint32_t was1 = 0, was2 = 0;
#pragma unroll 1
    for (uint32_t q = 0; q < end; q++) {
      // Before its first round a phase's number wraps around to a large one.
      const uint32_t t1 = me.warp + q * workers;
      const uint32_t t2 = me.warp + (q - a.e2) * workers, t3 = me.warp + (q - a.e3) * workers;
      const bool v1 = q < rounds && t1 < me.tiles;
      const bool v2 = q - a.e2 < rounds && t2 < me.tiles;
      const bool v3 = B::kTwo && q - a.e3 < rounds && t3 < me.tiles;
      Line x1[P][U] = {}, own[U] = {}, x2[P][U] = {}, x3[P][U] = {};
      if (v1) me.load1(x1, t1);
      if (v2 && OPT != kStash) me.load_own(own, t2);
      // Flags of the round before: the fence waits while the loads above are on their way.
      if (!kServed) me.signal_directly(pending1, was1, pending2, was2);
      if (v2) {
        if (kServed) me.await(0, t2); else me.await_directly(0, t2);
        me.load2(x2, t2);
      }
      if (v3) {
        if (kServed) me.await(1, t3); else me.await_directly(1, t3);
        me.load3(x3, t3);
      }
      if (v1) {
        me.store1(x1, t1);
        if (kServed) me.mark(0, me.warp, workers, t1);
      }
      if constexpr (OPT == kStash) {
        // A thread meets nobody else's entries. Round q - e2 is at (q + 1) % slots.
        const uint32_t read = slot + 1 == slots ? 0 : slot + 1, pitch = workers * 32;
        if (v1) {
#pragma unroll
          for (int u = 0; u < U; u++) {
            const Line& x = x1[0][u];
            stash[(slot * U + u) * pitch + threadIdx.x] = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
          }
        }
        if (v2) {
#pragma unroll
          for (int u = 0; u < U; u++) {
            const uint4 x = stash[(read * U + u) * pitch + threadIdx.x];
            own[u] = Line{{x.x, x.y, x.z, x.w}};
          }
        }
        slot = read;
      }
      if (v2) {
        me.store2(own, x2, t2);
        if (kServed && B::kTwo) me.mark(1, me.warp, workers, t2);
      }
      if (v3) me.store3(x3, t3);
      pending1 = v1, was1 = t1;
      pending2 = B::kTwo && v2, was2 = t2;
    }
    // Nothing is pending here: e2 >= 1, and in two-shot the last e3 - e2 >= 1 rounds are phase 3's alone.
  }
  me.finish();
}

}  // namespace
