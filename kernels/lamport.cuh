// The protocol that both kernels share: what a window holds, who writes it when, how arrival is seen.
//
// Unit       The line, 16 bytes. lines = ceil(bytes / 16), the last one padded with zero bits.
// Regions    Every rank owns a window: [header][stage 0][stage 1][stage 2], mapped by all ranks.
//            header (TwoshotState): its owner's alone.
//            stage, one-shot: slot s holds rank s's lines. Slot s starts at line s * slot.
//            stage, two-shot: scatter slot s holds rank s's share of the owner's shard, at line s * shard; broadcast
//            slot s holds rank s's reduced shard, at line (ranks + s) * shard.
// Writers    Line i of slot s of rank r's stage: payload by rank s and nobody else, sentinel by rank r and nobody
//            else. Over multicast one store reaches all windows, the writer's own included.
// Epoch      Launches of this communicator so far; launch e uses stage e % 3. In device memory, so a replayed graph
//            goes on counting. One replica per block: block b reads replica b and, once all its threads have read it,
//            advances the replicas i with i % blocks == b. No replica is touched by two blocks of a launch.
// Sentinel   Word 0xFFFAFFFA: never published, for which wire.cuh seals every line: by a neighbouring NaN where the
//            elements are f32, f16 or bf16, by an escape word in the line where any bits may be a value.
// Granule    One word: a 16-byte store may land in parts, so a line has arrived when none of its four words is the
//            sentinel. Words are compared as integers; a float compare would call every NaN unequal.
// Re-arm     The thread that polled a line stores the sentinel back, in the same launch. So the set that is re-armed
//            is the set that was polled, whatever the sizes of earlier and later calls. Over multicast the own copy
//            is polled too: else it could land after its re-arm.
// Ordering   The payload is its own flag: stores and polls are relaxed at system scope, with no fence.
//            A peer writes a stage again in launch e + 3. It starts e + 2 only after it polled our payload of e + 1,
//            and our stream starts e + 1 only after launch e ended, its re-arm included. So two stages would do and
//            one would not; the third is slack.
// Ticket     One thread of a launch puts 2 e + 1 into state.ticket behind its push and 2 e + 2 when it is done (epochs
//            are counted modulo 2^32 - 1, a multiple of the stages, and 2 e modulo 2^32). Who
//            finds anything but 2 e there runs at the same time as another launch: fault.
// Bound      Every TWOSHOT_SPINS_PER_CHECK failed polls a thread reads control->abort and the clock. Whoever gives
//            up first writes the fault record; all others see it and leave too.
//            Launches behind that one end as they begin: a peer may be some launches behind with all that it needs there, and
//            what they would store comes to stages that it still reads.
// Requires   Blocks of a launch co-resident; at most TWOSHOT_MAX_BLOCKS of them, at most TWOSHOT_MAX_THREADS threads.
//            Launches of one communicator serialised by stream order (programmatic launch included: griddepcontrol.wait
//            waits for the end of the previous grid and its flush; only then may the next grid become resident, or a
//            chain of launches would fill the GPU with waiting blocks and starve the kernel a peer waits for). Same count, type and kernel on every rank for the
//            same launch. Stages filled with the sentinel and the header with zero before the first launch.
//            ranks * slot (one-shot) or 2 * ranks * shard (two-shot) lines fit in stage_bytes, and 32 bits.
#pragma once

#include "args.h"
#include "ptx.cuh"
#include "wire.cuh"

namespace twoshot {

// The ranks. Their number is a constant in the kernels made for it (N > 0). How many of them a thread deals with
// together is a matter of speed alone: all, if the number is known; else chunks of 8, or of 2 where an unaligned buffer
// costs several accesses per line anyway and the code should stay small.
template <int N, bool ALIGNED, int MOST>
struct Team {
  static constexpr bool kWhole = N > 0 && ALIGNED;
  static constexpr uint32_t kChunk = kWhole ? N : ALIGNED ? MOST : 2;     // ranks polled together
  static constexpr uint32_t kPeers = kWhole ? N - 1 : ALIGNED ? MOST : 1; // peers pushed to together
  static constexpr int kUnroll = kWhole ? N : 1;
  uint32_t rank, count;

  explicit TWOSHOT_DEVICE Team(const TwoshotArgs& args) : rank(args.rank), count(args.ranks) {}
  TWOSHOT_DEVICE uint32_t size() const { return N > 0 ? N : count; }

  // Every rank begins with its right neighbour, so that no window is everyone's first.
  TWOSHOT_DEVICE uint32_t peer(uint32_t distance) const {
    const uint32_t r = rank + distance;
    return r < size() ? r : r - size();
  }
};

TWOSHOT_DEVICE uint32_t round_to_slot(uint32_t lines) {
  return (lines + TWOSHOT_SLOT_LINES - 1) / TWOSHOT_SLOT_LINES * TWOSHOT_SLOT_LINES;
}

TWOSHOT_DEVICE uint64_t window(const TwoshotArgs& args, uint32_t rank) {
  return args.windows + rank * args.window_stride;
}

// Offset of the stage of this epoch in every window.
TWOSHOT_DEVICE uint64_t stage_offset(const TwoshotArgs& args, uint32_t epoch) {
  return TWOSHOT_HEADER_BYTES + uint64_t{epoch % TWOSHOT_STAGES} * args.stage_bytes;
}

TWOSHOT_DEVICE uint64_t line_offset(uint32_t line) { return uint64_t{line} * TWOSHOT_LINE_BYTES; }

// ---- re-arm ---------------------------------------------------------------------------------------------------

TWOSHOT_DEVICE void rearm_if(uint64_t address, bool polled) {
#ifndef TWOSHOT_WITHOUT_REARM  // defined by a negative control only
  const Line sentinel = {{TWOSHOT_SENTINEL, TWOSHOT_SENTINEL, TWOSHOT_SENTINEL, TWOSHOT_SENTINEL}};
  st_relaxed_sys_v4_if(address, sentinel, polled);
#else
  (void)address, (void)polled;
#endif
}

// ---- publishing ---------------------------------------------------------------------------------------------------

// One line to the same offset of every peer's window, or of every window at once.
template <bool MC, typename Ranks>
TWOSHOT_DEVICE void publish(const TwoshotArgs& args, const Ranks& team, uint64_t offset, const Line& line,
                            bool wanted) {
  if constexpr (MC) {
    multimem_st_relaxed_sys_v4_if(args.multicast + offset, line, wanted);
  } else {
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
    for (uint32_t d = 1; d < team.size(); d++) st_relaxed_sys_v4_if(window(args, team.peer(d)) + offset, line, wanted);
  }
}

// ---- programmatic dependent launch ----------------------------------------------------------------------------------

// In this order: at most one launch of a communicator waits on the GPU behind the one that runs. Only where the host
// says so: a kernel of the program's that does not wait would read `out` before it is there, and one that waits would
// hold the multiprocessors that another communicator's peers need.
TWOSHOT_DEVICE void griddepcontrol_wait_then_launch_dependents(const TwoshotArgs& args) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents_if(args.trigger != 0);
}

// ---- epoch ------------------------------------------------------------------------------------------------------

TWOSHOT_DEVICE uint64_t epoch_replica(const TwoshotArgs& args, uint32_t i) {
  return window(args, args.rank) + offsetof(TwoshotState, epoch) + sizeof(TwoshotEpoch) * i;
}

TWOSHOT_DEVICE TwoshotEpoch epoch_read(const TwoshotArgs& args) {
  TwoshotEpoch epoch;
  ld_relaxed_sys_v2_u32(epoch_replica(args, blockIdx.x), epoch.number, epoch.given_up);
  return epoch;
}

// Whether a thread of an earlier launch gave up: all threads of this one see the same. It comes with the epoch, for a load of
// its own cost a launch 0.12 us.
TWOSHOT_DEVICE bool given_up_before(const TwoshotEpoch& epoch) {
  return epoch.given_up != 0 && epoch.given_up != epoch.number + 1;
}

// The epoch after this one. It wraps one early: the number of epochs must be a multiple of the number of stages, or the
// wrap (reached in hours) would use one stage twice in a row.
constexpr uint32_t kLastEpoch = 0xFFFFFFFE, kNoEpoch = 0xFFFFFFFF;
static_assert((uint64_t{kLastEpoch} + 1) % TWOSHOT_STAGES == 0, "the wrap must go on with the next stage");
TWOSHOT_DEVICE uint32_t epoch_after(uint32_t epoch) { return epoch == kLastEpoch ? 0 : epoch + 1; }

// Called behind the first push: the barrier then costs nothing that the links do not cost anyway.
TWOSHOT_DEVICE void epoch_advance(const TwoshotArgs& args, uint32_t epoch) {
  __syncthreads();
  for (uint32_t i = blockIdx.x + threadIdx.x * gridDim.x; i < TWOSHOT_MAX_BLOCKS; i += gridDim.x * blockDim.x) {
    st_relaxed_sys_u32(epoch_replica(args, i) + offsetof(TwoshotEpoch, number), epoch_after(epoch));
  }
}

// ---- the bounded wait ---------------------------------------------------------------------------------------------

// Which line a thread waits for.
struct Missing {
  uint32_t peer, phase, line;
};

// What a thread needs to know when to give up. Costs the fast path one counter.
struct Watch {
  const TwoshotArgs& args;
  uint32_t kernel, epoch;
  uint32_t ticket;  // 2 * epoch, unless launches of this communicator overlapped (known to one thread)
  uint32_t spins = 0;
  uint64_t deadline = 0;

  TWOSHOT_DEVICE Watch(const TwoshotArgs& args, uint32_t kernel, uint32_t epoch)
      : args(args), kernel(kernel), epoch(epoch), ticket(2 * epoch) {
    // Nothing waits for the answer before the polls are over or stall.
    if (keeps_ticket()) ticket = atom_relaxed_gpu_exchange_ticket(ticket_address(), 2 * epoch + 1);
  }

  static TWOSHOT_DEVICE bool keeps_ticket() { return blockIdx.x == 0 && threadIdx.x == 0; }
  TWOSHOT_DEVICE uint64_t ticket_address() const {
    return window(args, args.rank) + offsetof(TwoshotState, ticket);
  }

  // Called after every failed poll; true when it is time for give_up.
  TWOSHOT_DEVICE bool count_spin() { return ++spins % TWOSHOT_SPINS_PER_CHECK == 0; }

  TWOSHOT_DEVICE bool give_up(const Missing& missing) {
    uint32_t fault = TWOSHOT_FAULT_NONE;
    if (ld_relaxed_sys_u32(args.control + offsetof(TwoshotControl, abort)) != 0) {
      fault = TWOSHOT_FAULT_ABORTED;
    } else if (ld_relaxed_sys_u32(args.control + offsetof(TwoshotControl, fault)) != TWOSHOT_FAULT_NONE) {
      return true;
    } else if (ticket != 2 * epoch) {
      fault = TWOSHOT_FAULT_OVERLAP;
    } else if (args.timeout_ns != 0) {
      const uint64_t now = mov_globaltimer_u64();
      if (deadline == 0) deadline = now + args.timeout_ns;
      if (now >= deadline) fault = TWOSHOT_FAULT_DEADLINE;
    }
    if (fault == TWOSHOT_FAULT_NONE) return false;
    record(fault, missing);
    return true;
  }

  // The first to claim it writes the record; `fault` comes last, behind a fence, and makes it valid.
  TWOSHOT_DEVICE void record(uint32_t fault, const Missing& missing) {
    const uint64_t claim = window(args, args.rank) + offsetof(TwoshotState, fault_claim);
    if (atom_relaxed_gpu_claim_fault(claim, epoch + 1) != 0) return;
TWOSHOT_UNROLL_BY(1)
    for (uint32_t i = 0; i < TWOSHOT_MAX_BLOCKS; i++) {
      st_relaxed_sys_u32(epoch_replica(args, i) + offsetof(TwoshotEpoch, given_up), epoch + 1);
    }
    st_relaxed_sys_u32(args.control + offsetof(TwoshotControl, epoch), epoch);
    st_relaxed_sys_u32(args.control + offsetof(TwoshotControl, kernel), kernel);
    st_relaxed_sys_u32(args.control + offsetof(TwoshotControl, peer), missing.peer);
    st_relaxed_sys_u32(args.control + offsetof(TwoshotControl, phase), missing.phase);
    st_relaxed_sys_u64(args.control + offsetof(TwoshotControl, line), missing.line);
    st_relaxed_sys_u64(args.control + offsetof(TwoshotControl, count), args.count);
    fence_acq_rel_sys();
    st_relaxed_sys_u32(args.control + offsetof(TwoshotControl, fault), fault);
  }

  // At the end of a launch that went well: an overlap is an error even if all lines came.
  TWOSHOT_DEVICE void finish(uint32_t phase) {
    if (!keeps_ticket()) return;
    if (ticket != 2 * epoch) {
      record(TWOSHOT_FAULT_OVERLAP, Missing{args.rank, phase, 0});
    } else {
      st_relaxed_sys_u32(ticket_address(), 2 * epoch_after(epoch));
    }
  }
};

// Polls the lines k with wanted[k], all in flight together, until each has arrived; only those still missing are
// asked for again. Lines not wanted keep what they hold, which must be free of the sentinel.
template <int K, typename Address, typename Name>
TWOSHOT_DEVICE bool poll(Watch& watch, bool (&wanted)[K], Line (&line)[K], Address address, Name name) {
  for (;;) {
TWOSHOT_UNROLL
    for (int k = 0; k < K; k++) ld_relaxed_sys_v4_if(line[k], address(k), wanted[k]);
    bool missing = false;
TWOSHOT_UNROLL
    for (int k = 0; k < K; k++) {
      wanted[k] = has_sentinel(line[k]);
      missing = missing || wanted[k];
    }
    if (!missing) return true;
    spin_pause();
    if (watch.count_spin()) {
      Missing first = {};
TWOSHOT_UNROLL
      for (int k = K - 1; k >= 0; k--) {
        if (wanted[k]) first = name(k);
      }
      if (watch.give_up(first)) return false;
    }
  }
}

}  // namespace twoshot
