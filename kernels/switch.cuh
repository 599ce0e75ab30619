// Two-shot whose sums are made by the NVLink switch: every rank lays its lines out in its own window, the owner of a shard
// loads them from all windows at once, added up on the way (multimem.ld_reduce), and pushes the sum to all. A GPU's link
// then carries 1 + 1/ranks payloads each way instead of nearly two. Only for sums of f32, f16 and bf16, only over
// multicast, only where all ranks want it: in which order the switch adds is not known, so results differ in rounding
// from every other kernel's. They are the same on every rank, for one rank makes them and all get its bits.
//
// What lamport.cuh says of units, epochs, the sentinel, re-arming, the ticket and bounds holds here too, and what
// twoshot.cuh says of shards and in == out.
//
// Regions    In a stage: inputs, shard s at line s * shard, of this rank alone; results where two-shot's broadcast has
//            them, at line (ranks + s) * shard; arrivals behind both, at line 2 * ranks * shard: for each chunk of the
//            own shard (TWOSHOT_CHUNK_LINES line indices) one word for each rank, in whole lines.
// Writers    Inputs: payload and sentinel by the owner of the window alone. Arrivals of rank r's window, word s: by rank
//            s, the sentinel by rank r; the words behind the last rank's are stored by the last rank, so that a line
//            of arrivals is complete or has a sentinel, like every other line. Results: as in two-shot.
// Order      1. A block copies a tile of line indices (as many as it has threads, a multiple of a chunk) of all shards into
//               the own inputs; barrier; for each chunk and owner a thread stores the arrival: release at system scope,
//               which covers what the block stored before the barrier.
//            2. Whoever reduces line i of the own shard polls the arrivals of i's chunk from all ranks, itself included;
//               an acquire-release fence at system scope; a fence of the alias proxy, for the inputs were stored by the
//               windows' own addresses and are loaded by the multicast address; multimem.ld_reduce; multimem.st.
//            3. Line i of every shard is polled and copied out as in two-shot.
//            Which block or thread announces and which waits depends on each rank's own grid; what an arrival stands for
//            does not: chunks are counted in lines of the payload.
// Re-arm     Results by the thread that polled them, at once. Inputs, line i of shard s, by the thread that polled line
//            i of s's result: that result holds what its owner has loaded from here, so the load is over. Arrivals behind
//            a barrier that ends the block's phase 2: all threads that poll a chunk's arrivals are in one block.
//            So a stage holds nothing but sentinels when a launch ends, whatever kernel uses it three launches later.
// Reuse      When a launch e ends on this rank, nobody will read its inputs any more: each was loaded before its result was
//            pushed, and all results have been polled. Peers store into this stage again in launch e + 3. A peer starts
//            e + 2 only when it has every result of e + 1, and no owner pushes one before all ranks' arrivals of e + 1,
//            ours too; and we start e + 1 only when e has ended, its re-arm included.
// Sums       A sum that has the sentinel's bits is sealed like any payload. Inputs are not: nobody polls them. Lines are
//            padded with zero bits on every rank.
// Requires   Threads of a block a multiple of TWOSHOT_CHUNK_LINES. 2 * ranks * shard + chunks * ceil(ranks / 4) lines in
//            stage_bytes. args.multicast is bound to all windows, in which nothing else is ever loaded through it.
//
// Never run on hardware: docs/scaling.md says what is expected of it, docs/numerics.md what it may compute.
#pragma once

#include "twoshot.cuh"

namespace twoshot {

TWOSHOT_DEVICE void ld_reduce_if(f32, Line& line, uint64_t address, bool wanted) {
  multimem_ld_reduce_add_relaxed_sys_v4_f32_if(line, address, wanted);
}
TWOSHOT_DEVICE void ld_reduce_if(f16, Line& line, uint64_t address, bool wanted) {
  multimem_ld_reduce_add_relaxed_sys_v4_f16x2_if(line, address, wanted);
}
TWOSHOT_DEVICE void ld_reduce_if(bf16, Line& line, uint64_t address, bool wanted) {
  multimem_ld_reduce_add_relaxed_sys_v4_bf16x2_if(line, address, wanted);
}

template <typename T, bool ALIGNED>
struct InSwitch : TwoShot<T, 0, true, ALIGNED> {
  using Base = TwoShot<T, 0, true, ALIGNED>;
  using Base::args;
  using Base::begin;
  using Base::own_lines;
  using Base::payload;
  using Base::shard;
  using Base::step;
  using Base::team;
  static constexpr uint32_t kChunk = TWOSHOT_CHUNK_LINES;
  static constexpr uint32_t kArrived = 0;
  static constexpr uint32_t kCopied = ALIGNED ? 8 : 1;  // lines that a thread copies together
  static constexpr uint32_t kBatch = ALIGNED ? 4 : 1;   // lines that it has in the switch together
  static constexpr uint32_t kFlags = 2;                 // lines of arrivals that it polls together, for each of those

  const uint32_t flag_lines;  // of one chunk

  explicit TWOSHOT_DEVICE InSwitch(const TwoshotArgs& args)
      : Base(args), flag_lines((args.ranks + TWOSHOT_LINE_FLAGS - 1) / TWOSHOT_LINE_FLAGS) {}

  TWOSHOT_DEVICE uint64_t mine(uint64_t stage) const { return window(args, team.rank) + stage; }
  TWOSHOT_DEVICE uint32_t input_line(uint32_t owner, uint32_t i) const { return owner * shard + i; }
  TWOSHOT_DEVICE uint32_t arrival_line(uint32_t chunk) const { return 2 * team.size() * shard + chunk * flag_lines; }
  TWOSHOT_DEVICE bool exists(uint32_t owner, uint32_t i) const {
    return owner < team.size() && i < shard && input_line(owner, i) < payload.lines;
  }

  // Phase 1: line i of every shard into the own inputs.
  TWOSHOT_DEVICE void copy(uint64_t stage, uint32_t i) const {
TWOSHOT_UNROLL_BY(1)
    for (uint32_t base = 0; base < team.size(); base += kCopied) {
      Line line[kCopied];
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < kCopied; k++) {
        const uint32_t index = input_line(base + k, i);
        line[k] = Line{};
        if constexpr (ALIGNED) {
          payload.load_full_if(line[k], index, exists(base + k, i) && payload.full(index));
        } else if (exists(base + k, i)) {
          line[k] = payload.load_any(index);
        }
      }
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < kCopied; k++) {
        const uint32_t index = input_line(base + k, i);
        const bool here = exists(base + k, i) && (!ALIGNED || payload.full(index));
        st_relaxed_sys_v4_if(mine(stage) + line_offset(index), line[k], here);
      }
    }
    // The partial line by itself, so that full ones pay for no more than this. kNone is no line that exists.
    if (ALIGNED && i < shard && payload.partial % shard == i && exists(payload.partial / shard, i)) {
      st_relaxed_sys_v4_if(mine(stage) + line_offset(payload.partial), payload.load_elements(payload.partial), true);
    }
  }

  // Behind a barrier: the chunks of the tile that begins at line index `tile` have been copied, for every owner.
  TWOSHOT_DEVICE void announce(uint64_t stage, uint32_t tile) const {
    const uint32_t last = team.size() - 1;
    const uint32_t words = team.rank == last ? flag_lines * TWOSHOT_LINE_FLAGS - last : 1;
TWOSHOT_UNROLL_BY(1)
    for (uint32_t k = threadIdx.x; k < blockDim.x / kChunk * team.size(); k += blockDim.x) {
      const uint32_t owner = team.peer(k % team.size()), i = tile + k / team.size() * kChunk;
      if (!exists(owner, i)) continue;
      const uint64_t arrivals = window(args, owner) + stage + line_offset(arrival_line(i / kChunk));
TWOSHOT_UNROLL_BY(1)
      for (uint32_t w = 0; w < words; w++) st_release_sys_u32(arrivals + 4 * (team.rank + w), kArrived);
    }
  }

  // Phase 2: waits until every rank has line i, i + step, ... of the own shard in place.
  template <uint32_t U>
  TWOSHOT_DEVICE bool await(Watch& watch, uint64_t stage, uint32_t i) const {
    const auto chunk = [&](uint32_t k) { return (i + k / kFlags * step) / kChunk; };
TWOSHOT_UNROLL_BY(1)
    for (uint32_t base = 0; base < flag_lines; base += kFlags) {
      Line line[U * kFlags];
      bool wanted[U * kFlags];
TWOSHOT_UNROLL
      for (uint32_t k = 0; k < U * kFlags; k++) {
        line[k] = Line{};
        wanted[k] = base + k % kFlags < flag_lines && i + k / kFlags * step < own_lines;
      }
      const bool arrived = poll(
          watch, wanted, line,
          [&](uint32_t k) { return mine(stage) + line_offset(arrival_line(chunk(k)) + base + k % kFlags); },
          [&](uint32_t k) {
            uint32_t peer = (base + k % kFlags) * TWOSHOT_LINE_FLAGS;
            bool here = true;
TWOSHOT_UNROLL
            for (int w = 0; w < TWOSHOT_LINE_FLAGS; w++) {
              here = here && line[k].word[w] != TWOSHOT_SENTINEL && peer + 1 < team.size();
              if (here) peer++;
            }
            return Missing{peer, TWOSHOT_PHASE_SCATTER, chunk(k) * kChunk};
          });
      if (!arrived) return false;
    }
    return true;
  }

  template <uint32_t U>
  TWOSHOT_DEVICE bool reduce(Watch& watch, uint64_t stage, uint32_t i) const {
    if (!await<U>(watch, stage, i)) return false;
    // Acquires what the arrivals speak of, for the loads through the other address.
    fence_acq_rel_sys();
    fence_proxy_alias();
    Line sum[U];
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) {
      const uint32_t index = i + u * step;
      sum[u] = Line{};
      ld_reduce_if(T{}, sum[u], args.multicast + stage + line_offset(input_line(team.rank, index)), index < own_lines);
    }
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < U; u++) {
      const uint32_t index = i + u * step;
      sum[u] = seal<T>(sum[u]);
      multimem_st_relaxed_sys_v4_if(args.multicast + stage + line_offset(Base::broadcast_line(team.rank, index)), sum[u],
                                    index < own_lines);
      if (index < own_lines) payload.store(begin + index, sum[u]);
    }
    return true;
  }

  TWOSHOT_DEVICE bool reduce_all(Watch& watch, uint64_t stage, uint32_t first) const {
TWOSHOT_UNROLL_BY(1)
    for (uint32_t i = first; i < own_lines;) {
      if (kBatch > 1 && i + step < own_lines) {
        if (!reduce<kBatch>(watch, stage, i)) return false;
        i += kBatch * step;
      } else {
        if (!reduce<1>(watch, stage, i)) return false;
        i += step;
      }
    }
    return true;
  }

  // Behind the barrier that ends phase 2: the arrivals of the chunks that this block has polled.
  TWOSHOT_DEVICE void rearm_arrivals(uint64_t stage) const {
    const uint32_t lines = blockDim.x / kChunk * flag_lines;
TWOSHOT_UNROLL_BY(1)
    for (uint32_t tile = blockIdx.x * blockDim.x; tile < own_lines; tile += step) {
TWOSHOT_UNROLL_BY(1)
      for (uint32_t k = threadIdx.x; k < lines; k += blockDim.x) {
        rearm_if(mine(stage) + line_offset(arrival_line(tile / kChunk) + k), tile + k / flag_lines * kChunk < own_lines);
      }
    }
  }

  TWOSHOT_DEVICE void run() const {
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
    griddepcontrol_wait_then_launch_dependents(args);
    const TwoshotEpoch begun = epoch_read(args);
    if (given_up_before(begun)) return;
    const uint32_t epoch = begun.number;
    const uint64_t stage = stage_offset(args, epoch);

    // Whole tiles, for all threads of a block go through its barriers. The epoch's is the first tile's.
    copy(stage, first);
    Watch watch(args, TWOSHOT_KERNEL_SWITCH, epoch);
    epoch_advance(args, epoch);
    announce(stage, first - threadIdx.x);
TWOSHOT_UNROLL_BY(1)
    for (uint32_t tile = first - threadIdx.x + step; tile < shard; tile += step) {
      copy(stage, tile + threadIdx.x);
      __syncthreads();
      announce(stage, tile);
    }

    const bool reduced = reduce_all(watch, stage, first);
    __syncthreads();
    if (!reduced) return;
    rearm_arrivals(stage);

TWOSHOT_UNROLL_BY(1)
    for (uint32_t i = first; i < shard; i += step) {
      if (!Base::template collect<1>(watch, stage, i)) return;
TWOSHOT_UNROLL_BY(1)
      for (uint32_t r = 0; r < team.size(); r++) rearm_if(mine(stage) + line_offset(input_line(r, i)), exists(r, i));
    }
    watch.finish(TWOSHOT_PHASE_BROADCAST);
  }
};

template <typename T, int, bool>
TWOSHOT_DEVICE void run_switch(const TwoshotArgs& args) {
  if (payload_aligned<T>(args)) {
    InSwitch<T, true>(args).run();
  } else {
    InSwitch<T, false>(args).run();
  }
}

}  // namespace twoshot
