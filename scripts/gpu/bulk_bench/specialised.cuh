// C, E, F: w1 warps do phase 1, w2 phase 2, w3 phase 3; no phase waits for another in program order.
#pragma once

#include "block.cuh"

namespace {

template <int N, int U, int MODE>
__global__ void __launch_bounds__(N > 2 ? 640 : 1024, 1) specialised(const __grid_constant__ Args a) {
  __shared__ Shared sh;
  constexpr int P = N - 1;
  using B = Block<N, U, MODE>;
  B me(a, sh);
  me.start(a.w1, a.w2);
  const uint32_t workers = a.w1 + a.w2 + a.w3;
  if (me.warp < a.w1) {
#pragma unroll 1
    for (uint32_t t = me.warp; t < me.tiles; t += a.w1) {
      Line x[P][U];
      me.load1(x, t);
      me.store1(x, t);
      me.mark(0, me.warp, a.w1, t);
    }
  } else if (me.warp < a.w1 + a.w2) {
    const uint32_t w = me.warp - a.w1;
#pragma unroll 1
    for (uint32_t t = w; t < me.tiles; t += a.w2) {
      Line own[U], x[P][U];
      me.load_own(own, t);
      me.await(0, t);
      me.load2(x, t);
      me.store2(own, x, t);
      if (B::kTwo) me.mark(1, w, a.w2, t);
    }
  } else if (me.warp < workers) {
    if (B::kTwo) {
#pragma unroll 1
      for (uint32_t t = me.warp - a.w1 - a.w2; t < me.tiles; t += a.w3) {
        Line x[P][U];
        me.await(1, t);
        me.load3(x, t);
        me.store3(x, t);
      }
    }
  } else if (me.warp == workers) {
    me.poll();
  } else {
    me.signal();
  }
  me.finish();
}

}  // namespace
