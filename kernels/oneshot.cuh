// One-shot AllReduce: every rank pushes all its lines to all peers and folds everything itself. One trip over the
// links; the right shape while latency, not bandwidth, is the cost. Protocol: lamport.cuh.
//
// A thread that has many lines pushes kAhead batches ahead of the one it polls, so that the links carry later lines
// while earlier ones are folded, stored and re-armed. That cannot hang, whatever the grids of the ranks: a thread takes
// its lines in ascending order and has pushed all up to the one it waits for, so it waits for a thread that waits for a
// lower line, and so on down to one that waits for nobody.
#pragma once

#include "folds.cuh"
#include "lamport.cuh"
#include "payload.cuh"
#include "types.cuh"

namespace twoshot {

template <typename T, int N, bool MC, bool ALIGNED>
struct OneShot {
  using Ranks = Team<N, ALIGNED, T::kMostTogether>;
  static constexpr uint32_t kChunk = Ranks::kChunk;
  // Lines that a thread has in flight together when it has several. With more ranks a line is several loads anyway.
  static constexpr uint32_t kBatch = ALIGNED && N == 2 ? 2 : 1;
  static constexpr uint32_t kAhead = 2;

  const TwoshotArgs& args;
  const Ranks team;
  const Payload<T, ALIGNED> payload;
  const uint32_t slot, first, step;

  explicit TWOSHOT_DEVICE OneShot(const TwoshotArgs& args)
      : args(args),
        team(args),
        payload(args),
        slot(round_to_slot(payload.lines)),
        first(blockIdx.x * blockDim.x + threadIdx.x),
        step(gridDim.x * blockDim.x) {}

  // Whether the line of rank r comes by way of the stage. The own one does only over multicast.
  TWOSHOT_DEVICE bool travels(uint32_t r) const { return r < team.size() && (MC || r != team.rank); }

  template <uint32_t U>
  TWOSHOT_DEVICE void begin_load(Line (&line)[U], uint32_t i) const {
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) line[u] = payload.begin_load(i + u * step);
  }

  template <uint32_t U>
  TWOSHOT_DEVICE void finish_load(Line (&line)[U], uint32_t i) const {
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) {
      payload.finish_load(line[u], i + u * step);
      line[u] = seal<T>(line[u]);
    }
  }

  template <uint32_t U>
  TWOSHOT_DEVICE void push(const Line (&line)[U], uint64_t stage, uint32_t i) const {
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) {
      const uint32_t index = i + u * step;
      publish<MC>(args, team, stage + line_offset(team.rank * slot + index), line[u], index < payload.lines);
    }
  }

  // Folds lines i, i + step, ... of all ranks and stores the results.
  template <uint32_t U>
  TWOSHOT_DEVICE bool fold(Watch& watch, const Line (&own)[U], uint64_t stage, uint32_t i) const {
    const uint64_t mine = window(args, team.rank) + stage;
    const auto address = [&](uint32_t r, uint32_t index) { return mine + line_offset(r * slot + index); };
    typename T::Fold sum[U];
    if constexpr (!Ranks::kWhole) {
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < U; u++) sum[u].clear();
    }
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
    for (uint32_t base = 0; base < team.size(); base += kChunk) {
      Line line[U * kChunk];
      bool wanted[U * kChunk];
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kChunk; k++) {
        line[k] = own[k / kChunk];
        wanted[k] = travels(base + k % kChunk) && i + k / kChunk * step < payload.lines;
      }
      const bool arrived = poll(
          watch, wanted, line, [&](uint32_t k) { return address(base + k % kChunk, i + k / kChunk * step); },
          [&](uint32_t k) { return Missing{base + k % kChunk, TWOSHOT_PHASE_SCATTER, i + k / kChunk * step}; });
      if (!arrived) return false;
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kChunk; k++) {
        if (Ranks::kWhole && k % kChunk == 0) {
          sum[k / kChunk].start(line[k], args);
        } else if (base + k % kChunk < team.size()) {
          sum[k / kChunk].add(line[k], args, base + k % kChunk);
        }
      }
    }
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) {
      const uint32_t index = i + u * step;
      if (index < payload.lines) payload.store(index, sum[u].round(args));
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
      for (uint32_t r = 0; r < team.size(); r++) rearm_if(address(r, index), travels(r) && index < payload.lines);
    }
    return true;
  }

  template <uint32_t U>
  TWOSHOT_DEVICE void run() const {
    griddepcontrol_wait_then_launch_dependents(args);

    // The first batch and the epoch are fetched together; the batch stays in registers, for mostly it is the only one.
    Line own[U];
    begin_load(own, first);
    const TwoshotEpoch begun = epoch_read(args);
    if (given_up_before(begun)) return;
    const uint32_t epoch = begun.number;
    finish_load(own, first);
    const uint64_t stage = stage_offset(args, epoch);
    push(own, stage, first);

    uint32_t ahead = first + U * step;
    const auto push_next = [&] {
      if (ahead >= payload.lines) return;
      Line line[U];
      begin_load(line, ahead);
      finish_load(line, ahead);
      push(line, stage, ahead);
      ahead += U * step;
    };
TWOSHOT_UNROLL_BY(1)
    for (uint32_t d = 1; d < kAhead; d++) push_next();

    Watch watch(args, TWOSHOT_KERNEL_ONESHOT, epoch);
    epoch_advance(args, epoch);

TWOSHOT_UNROLL_BY(1)
    for (uint32_t i = first; i < payload.lines; i += U * step) {
      push_next();
      if (i != first) {
        begin_load(own, i);
        finish_load(own, i);
      }
      if (!fold(watch, own, stage, i)) return;
    }
    watch.finish(TWOSHOT_PHASE_SCATTER);
  }
};

template <typename T, int N, bool MC, bool ALIGNED>
TWOSHOT_DEVICE void oneshot_body(const TwoshotArgs& args) {
  using Kernel = OneShot<T, N, MC, ALIGNED>;
  const Kernel kernel(args);
  // One line per thread is the case that counts microseconds: it does not pay for batches.
  if (Kernel::kBatch > 1 && kernel.payload.lines > kernel.step) {
    kernel.template run<Kernel::kBatch>();
  } else {
    kernel.template run<1>();
  }
}

template <typename T, int N, bool MC>
TWOSHOT_DEVICE void run_oneshot(const TwoshotArgs& args) {
  if (payload_aligned<T>(args)) {
    oneshot_body<T, N, MC, true>(args);
  } else {
    oneshot_body<T, N, MC, false>(args);
  }
}

}  // namespace twoshot
