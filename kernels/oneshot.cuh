// One-shot AllReduce: every rank pushes all its lines to all peers and sums everything itself. One trip over the
// links; the right shape while latency, not bandwidth, is the cost. Protocol: lamport.cuh.
#pragma once

#include "folds.cuh"
#include "lamport.cuh"
#include "types.cuh"

namespace twoshot {

template <typename T, int N, bool MC, bool ALIGNED>
TWOSHOT_DEVICE void oneshot_body(const TwoshotArgs& args) {
  using Ranks = Team<N, ALIGNED, T::kMostTogether>;
  constexpr uint32_t kChunk = Ranks::kChunk;
  const Ranks team(args);
  const Payload<T, ALIGNED> payload(args);
  const uint32_t slot = round_to_slot(payload.lines);
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t step = gridDim.x * blockDim.x;

  griddepcontrol_wait_then_launch_dependents();

  // Push. The first line and the epoch are fetched together; the line stays in registers, for mostly it is the only one.
  Line own = payload.begin_load(first);
  const uint32_t epoch = epoch_read(args);
  payload.finish_load(own, first);
  own = seal<T>(own);
  const uint64_t stage = stage_offset(args, epoch);
  publish<MC>(args, team, stage + line_offset(team.rank * slot + first), own, first < payload.lines);
TWOSHOT_UNROLL_BY(1)
  for (uint32_t i = first + step; i < payload.lines; i += step) {
    const Line line = seal<T>(payload.load(i));
    publish<MC>(args, team, stage + line_offset(team.rank * slot + i), line, true);
  }

  Watch watch(args, TWOSHOT_KERNEL_ONESHOT, epoch);
  epoch_advance(args, epoch);

  const uint64_t mine = window(args, team.rank) + stage;
TWOSHOT_UNROLL_BY(1)
  for (uint32_t i = first; i < payload.lines; i += step) {
    if (i != first) own = seal<T>(payload.load(i));
    const auto address = [&](uint32_t r) { return mine + line_offset(r * slot + i); };
    const auto polled = [&](uint32_t r) { return r < team.size() && (MC || r != team.rank); };

    typename T::Fold sum;
    if constexpr (!Ranks::kWhole) sum.clear();
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
    for (uint32_t base = 0; base < team.size(); base += kChunk) {
      Line line[kChunk];
      bool wanted[kChunk];
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < kChunk; k++) {
        line[k] = own;
        wanted[k] = polled(base + k);
      }
      const bool arrived = poll(
          watch, wanted, line, [&](uint32_t k) { return address(base + k); },
          [&](uint32_t k) { return Missing{base + k, TWOSHOT_PHASE_SCATTER, i}; });
      if (!arrived) return;
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < kChunk; k++) {
        if (Ranks::kWhole && k == 0) {
          sum.start(line[k], args);
        } else if (base + k < team.size()) {
          sum.add(line[k], args, base + k);
        }
      }
    }
    payload.store(i, sum.round(args));
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
    for (uint32_t r = 0; r < team.size(); r++) rearm_if(address(r), polled(r));
  }
  watch.finish(TWOSHOT_PHASE_SCATTER);
}

template <typename T, int N, bool MC>
TWOSHOT_DEVICE void oneshot(const TwoshotArgs& args) {
  if (payload_aligned<T>(args)) {
    oneshot_body<T, N, MC, true>(args);
  } else {
    oneshot_body<T, N, MC, false>(args);
  }
}

}  // namespace twoshot
