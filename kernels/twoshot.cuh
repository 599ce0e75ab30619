// Two-shot AllReduce: push shard r to rank r, reduce the own shard, push the result to all, copy out. Two trips over
// the links, but each rank moves only twice the message in total, whatever the number of ranks. Protocol: lamport.cuh.
//
// The three phases are separate loops, and the same thread handles the same line index of every shard in all of them:
// a line of `in` is read by the thread that later writes that line of `out`, so in == out needs no care.
#pragma once

#include "folds.cuh"
#include "lamport.cuh"
#include "payload.cuh"
#include "types.cuh"

namespace twoshot {

template <typename T, int N, bool MC, bool ALIGNED>
struct TwoShot {
  using Ranks = Team<N, ALIGNED, T::kMostTogether>;
  static constexpr uint32_t kChunk = Ranks::kChunk;
  static constexpr uint32_t kPeers = Ranks::kPeers;
  // Line indices that a thread has in flight together when it has several: about six loads in each phase.
  static constexpr uint32_t kBatch = !ALIGNED ? 1 : N == 2 ? 4 : N == 4 ? 2 : 1;

  const TwoshotArgs& args;
  const Ranks team;
  const Payload<T, ALIGNED> payload;
  const uint32_t shard;      // lines per shard, the last ones may have fewer
  const uint32_t begin;      // first line of the own shard
  const uint32_t own_lines;  // lines of the own shard
  const uint32_t step;

  explicit TWOSHOT_DEVICE TwoShot(const TwoshotArgs& args)
      : args(args),
        team(args),
        payload(args),
        shard(round_to_slot((payload.lines + team.size() - 1) / team.size())),
        begin(team.rank * shard),
        own_lines(begin >= payload.lines ? 0 : payload.lines - begin < shard ? payload.lines - begin : shard),
        step(gridDim.x * blockDim.x) {}

  TWOSHOT_DEVICE uint32_t scatter_line(uint32_t source, uint32_t i) const { return source * shard + i; }
  TWOSHOT_DEVICE uint32_t broadcast_line(uint32_t source, uint32_t i) const {
    return (team.size() + source) * shard + i;
  }

  // Phase 1: line i of shard r to rank r, for every peer r. Returns the epoch, or kNoEpoch behind a launch that gave up. It
  // is read here, behind the loads of the payload, so that nothing can wait for it before those are on their way.
  template <uint32_t U>
  TWOSHOT_DEVICE uint32_t scatter(uint32_t i) const {
    uint32_t epoch = 0;
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
    for (uint32_t near = 1; near < team.size(); near += kPeers) {
      Line line[U * kPeers];
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kPeers; k++) {
        const uint32_t distance = near + k % kPeers, index = i + k / kPeers * step;
        const uint32_t source = team.peer(distance) * shard + index;
        const bool exists = (Ranks::kWhole || distance < team.size()) && index < shard;
        line[k] = Line{};
        if constexpr (ALIGNED) {
          payload.load_full_if(line[k], source, exists && payload.full(source));
        } else if (exists && source < payload.lines) {
          line[k] = payload.load_any(source);
        }
      }
      const TwoshotEpoch begun = epoch_read(args);
      if (given_up_before(begun)) return kNoEpoch;
      epoch = begun.number;
      if constexpr (ALIGNED) patch_partial<U>(line, near, i);
      const uint64_t stage = stage_offset(args, epoch);
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kPeers; k++) {
        const uint32_t distance = near + k % kPeers, index = i + k / kPeers * step;
        const uint32_t peer = team.peer(distance);
        const bool exists = (Ranks::kWhole || distance < team.size()) && index < shard;
        st_relaxed_sys_v4_if(window(args, peer) + stage + line_offset(scatter_line(team.rank, index)),
                             seal<T>(line[k]), exists && peer * shard + index < payload.lines);
      }
    }
    return epoch;
  }

  // If the message's partial line is among these, loads it: out of line, so that full lines pay one compare.
  template <uint32_t U>
  TWOSHOT_DEVICE void patch_partial(Line (&line)[U * kPeers], uint32_t near, uint32_t i) const {
    if (payload.partial == Payload<T, ALIGNED>::kNone) return;
    const uint32_t owner = (payload.lines - 1) / shard, index = payload.partial - owner * shard;
    if (owner == team.rank || index < i || (index - i) % step != 0) return;
    const uint32_t distance = owner > team.rank ? owner - team.rank : owner + team.size() - team.rank;
    const uint32_t u = (index - i) / step;
    if (u >= U || distance - near >= kPeers) return;
    const Line partial = payload.load_elements(payload.partial);
TWOSHOT_UNROLL
    for (uint32_t k = 0; k < U * kPeers; k++) {
      const bool here = k == u * kPeers + distance - near;
      // Selects, word by word: as a conditional store this would become an indexed one, and the lines a stack array.
TWOSHOT_UNROLL
      for (int w = 0; w < 4; w++) line[k].word[w] = here ? partial.word[w] : line[k].word[w];
    }
  }

  // Phase 2: sum line i of the own shard, publish the sum.
  template <uint32_t U>
  TWOSHOT_DEVICE bool reduce(Watch& watch, uint64_t stage, uint32_t i) const {
    const uint64_t mine = window(args, team.rank) + stage;
    const auto address = [&](uint32_t r, uint32_t index) { return mine + line_offset(scatter_line(r, index)); };
    Line own[U];
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) {
      own[u] = Line{};
      if (i + u * step < own_lines) own[u] = seal<T>(payload.load(begin + i + u * step));
    }

    typename T::Fold sum[U];
    if constexpr (!Ranks::kWhole) sum[0].clear();
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
    for (uint32_t base = 0; base < team.size(); base += kChunk) {
      Line line[U * kChunk];
      bool wanted[U * kChunk];
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kChunk; k++) {
        const uint32_t r = base + k % kChunk;
        wanted[k] = r < team.size() && r != team.rank && i + k / kChunk * step < own_lines;
        line[k] = own[k / kChunk];
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
      own[u] = seal<T>(sum[u].round(args));
      publish<MC>(args, team, stage + line_offset(broadcast_line(team.rank, index)), own[u], index < own_lines);
    }
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) {
      const uint32_t index = i + u * step;
      if (index < own_lines) payload.store(begin + index, own[u]);
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
      for (uint32_t r = 0; r < team.size(); r++) {
        rearm_if(address(r, index), r != team.rank && index < own_lines);
      }
    }
    return true;
  }

  // Phase 3: line i of every other shard from its owner.
  template <uint32_t U>
  TWOSHOT_DEVICE bool collect(Watch& watch, uint64_t stage, uint32_t i) const {
    const uint64_t mine = window(args, team.rank) + stage;
    const auto address = [&](uint32_t r, uint32_t index) { return mine + line_offset(broadcast_line(r, index)); };
    const auto exists = [&](uint32_t r, uint32_t index) {
      return r < team.size() && index < shard && r * shard + index < payload.lines;
    };
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
    for (uint32_t base = 0; base < team.size(); base += kChunk) {
      Line line[U * kChunk];
      bool wanted[U * kChunk];
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kChunk; k++) {
        const uint32_t r = base + k % kChunk;
        wanted[k] = (MC || r != team.rank) && exists(r, i + k / kChunk * step);
        line[k] = Line{};
      }
      const bool arrived = poll(
          watch, wanted, line, [&](uint32_t k) { return address(base + k % kChunk, i + k / kChunk * step); },
          [&](uint32_t k) { return Missing{base + k % kChunk, TWOSHOT_PHASE_BROADCAST, i + k / kChunk * step}; });
      if (!arrived) return false;
      Line partial = {};
      bool holds_partial = false;
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kChunk; k++) {
        const uint32_t r = base + k % kChunk, index = i + k / kChunk * step, target = r * shard + index;
        const bool copied = r != team.rank && exists(r, index);
        if constexpr (ALIGNED) {
          payload.store_full_if(target, line[k], copied && payload.full(target));
          const bool here = copied && target == payload.partial;
          holds_partial = holds_partial || here;
TWOSHOT_UNROLL
          for (int w = 0; w < 4; w++) partial.word[w] = here ? line[k].word[w] : partial.word[w];
        } else if (copied) {
          payload.store(target, line[k]);
        }
      }
      if (holds_partial) payload.store_elements(payload.partial, partial);
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kChunk; k++) {
        const uint32_t r = base + k % kChunk, index = i + k / kChunk * step;
        rearm_if(address(r, index), (MC || r != team.rank) && exists(r, index));
      }
    }
    return true;
  }

  TWOSHOT_DEVICE void run() const {
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
    griddepcontrol_wait_then_launch_dependents(args);

    // At least once: a thread without lines needs the epoch too.
    uint32_t i = first, epoch;
    do {
      if (kBatch > 1 && i + step < shard) {
        epoch = scatter<kBatch>(i);
        i += kBatch * step;
      } else {
        epoch = scatter<1>(i);
        i += step;
      }
      if (epoch == kNoEpoch) return;
    } while (i < shard);
    const uint64_t stage = stage_offset(args, epoch);

    Watch watch(args, TWOSHOT_KERNEL_TWOSHOT, epoch);
    epoch_advance(args, epoch);

TWOSHOT_UNROLL_BY(1)
    for (i = first; i < own_lines;) {
      if (kBatch > 1 && i + step < own_lines) {
        if (!reduce<kBatch>(watch, stage, i)) return;
        i += kBatch * step;
      } else {
        if (!reduce<1>(watch, stage, i)) return;
        i += step;
      }
    }

TWOSHOT_UNROLL_BY(1)
    for (i = first; i < shard;) {
      if (kBatch > 1 && i + step < shard) {
        if (!collect<kBatch>(watch, stage, i)) return;
        i += kBatch * step;
      } else {
        if (!collect<1>(watch, stage, i)) return;
        i += step;
      }
    }
    watch.finish(TWOSHOT_PHASE_BROADCAST);
  }
};

template <typename T, int N, bool MC>
TWOSHOT_DEVICE void run_twoshot(const TwoshotArgs& args) {
  if (payload_aligned<T>(args)) {
    TwoShot<T, N, MC, true>(args).run();
  } else {
    TwoShot<T, N, MC, false>(args).run();
  }
}

}  // namespace twoshot
