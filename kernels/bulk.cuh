// Bulk AllReduce, for payloads that are bandwidth alone: plain data through the ring of ring.cuh, whatever the size.
// Nothing is re-armed, a wait asks for a flag and not for the data, and the memory in use stays within the second-level
// cache. What a flag costs, a fence, is too much below some MiB: docs/performance.md.
//
// Two ranks: one-shot, every rank folds everything; the links carry no more than in two-shot, and there is one phase less.
// More: two-shot, like twoshot.cuh.
//
// What lamport.cuh says of lines, epochs, the ticket, bounds and the boundary of a launch holds here too; its stages are
// not touched. The result is that of its kernels to the last bit.
//
// in == out  Two-shot: line i of another shard is overwritten with what its owner made from our line i, and one of the own
//            shard by the lane that read it. One-shot: the reducer waits until its chunk has been scattered.
#pragma once

#include "folds.cuh"
#include "lamport.cuh"
#include "payload.cuh"
#include "ring.cuh"
#include "types.cuh"

namespace twoshot {

// ---- a type whose lines are all payload ---------------------------------------------------------------------------

// Both halves of a line of a type that lamport.cuh's kernels pack by the half.
template <typename T>
struct HalvesFold {
  RuntimeFold<T> low, high;

  static TWOSHOT_DEVICE Line half(uint32_t a, uint32_t b) { return Line{{a, b, 0, 0}}; }
  TWOSHOT_DEVICE void clear() {
    low.clear();
    high.clear();
  }
  TWOSHOT_DEVICE void start(const Line& line, const TwoshotArgs& args) {
    low.start(half(line.word[0], line.word[1]), args);
    high.start(half(line.word[2], line.word[3]), args);
  }
  TWOSHOT_DEVICE void add(const Line& line, const TwoshotArgs& args, uint32_t rank) {
    low.add(half(line.word[0], line.word[1]), args, rank);
    high.add(half(line.word[2], line.word[3]), args, rank);
  }
  TWOSHOT_DEVICE Line round(const TwoshotArgs& args) const {
    const Line a = low.round(args), b = high.round(args);
    return Line{{a.word[0], a.word[1], b.word[0], b.word[1]}};
  }
};

template <typename T, uint32_t BYTES = T::kLineBytes>
struct Whole {
  static constexpr uint32_t kBytes = T::kBytes, kLineBytes = TWOSHOT_LINE_BYTES;
  static constexpr int kMostTogether = T::kMostTogether;
  using Fold = typename T::Fold;
};

template <typename T>
struct Whole<T, TWOSHOT_HALF_BYTES> {
  static constexpr uint32_t kBytes = T::kBytes, kLineBytes = TWOSHOT_LINE_BYTES;
  static constexpr int kMostTogether = 1;  // a fold is twice as large
  using Fold = HalvesFold<T>;
};

// ---- the roles that move payload ----------------------------------------------------------------------------------

// Lines of a lane, as a power of two: several loads in each phase, of peers or of lines.
template <int N>
constexpr uint32_t kBatchLog2 = N == 2 ? 2 : 0;

// The roles are busy in the same way whether the buffers are aligned or not, but a line of the one kind takes twice as many
// registers.
template <typename T, int N, bool ALIGNED>
using TeamOf = Team<N, true, ALIGNED ? T::kMostTogether : (T::kMostTogether + 1) / 2>;

template <typename T, int N, bool ALIGNED>
struct Bulk : Ring<TeamOf<T, N, ALIGNED>, N == 2, 5 + kBatchLog2<N>> {
  using Ranks = TeamOf<T, N, ALIGNED>;
  using Base = Ring<Ranks, N == 2, 5 + kBatchLog2<N>>;
  using Base::args;
  using Base::await;
  using Base::first_of;
  using Base::line_of;
  using Base::lines_of;
  using Base::staged;
  using Base::team;
  using Base::tile_shift;
  using Base::tiles;
  static constexpr bool kOne = N == 2;
  static constexpr uint32_t kChunk = Ranks::kChunk;
  static constexpr uint32_t kPeers = Ranks::kPeers;
  static constexpr uint32_t kBatch = 1u << kBatchLog2<N>;
  using Tile = RawRun<ALIGNED, kBatch>;  // of a part

  const Payload<T, ALIGNED> payload;

  explicit TWOSHOT_DEVICE Bulk(const TwoshotArgs& args) : Base(args, Payload<T, ALIGNED>(args).lines), payload(args) {}

  // Whether the part of the peer at this distance has such a line.
  TWOSHOT_DEVICE bool exists(uint32_t distance, uint32_t index) const {
    return (Ranks::kWhole || distance < team.size()) && index < lines_of(team.peer(distance));
  }
  // Whether a line index is among those of the lane that begins with i.
  TWOSHOT_DEVICE bool holds(uint32_t i, uint32_t index) const {
    return index >= i && index - i < (kBatch << 5) && (index - i) % 32 == 0;
  }
  // Who has the partial line in its part, to whom this rank scatters it or from whom it collects it.
  TWOSHOT_DEVICE uint32_t owner_of_partial() const { return kOne ? team.peer(1) : payload.partial / this->shard; }

  // Phase 1: line i of every peer's part to that peer. A warp's loads of a tile are under way while it stores the tile
  // before, or it would be idle for a memory's latency.
  TWOSHOT_DEVICE void scatter(uint32_t w) const {
    constexpr uint32_t kStep = Base::kScatterers;
    if constexpr (Ranks::kWhole) {
      Tile even[kPeers], odd[kPeers];
      load_tile(even, w, 1);
TWOSHOT_UNROLL_BY(1)
      for (uint32_t t = w; t < tiles; t += 2 * kStep) {
        load_tile(odd, t + kStep, 1);
        scatter_tile(even, w, t);
        load_tile(even, t + 2 * kStep, 1);
        scatter_tile(odd, w, t + kStep);
      }
    } else {
TWOSHOT_UNROLL_BY(1)
      for (uint32_t t = w; t < tiles; t += kStep) {
        this->await_room(t >> tile_shift());
        const bool stores = this->stores();
TWOSHOT_UNROLL_BY(1)
        for (uint32_t near = 1; near < team.size(); near += kPeers) {
          Tile raw[kPeers];
          load_tile(raw, t, near);
          store_tile(raw, t, near, stores);
        }
        end_of_tile(w, t, stores);
      }
    }
  }

  TWOSHOT_DEVICE void scatter_tile(const Tile (&raw)[kPeers], uint32_t w, uint32_t t) const {
    if (t >= tiles) return;
    this->await_room(t >> tile_shift());
    const bool stores = this->stores();
    store_tile(raw, t, 1, stores);
    end_of_tile(w, t, stores);
  }

  // Where the part of the peer at this distance ends; 0 if there is none.
  TWOSHOT_DEVICE uint32_t end_of(uint32_t distance) const {
    const uint32_t peer = team.peer(distance);
    return Ranks::kWhole || distance < team.size() ? first_of(peer) + lines_of(peer) : 0;
  }

  TWOSHOT_DEVICE void load_tile(Tile (&raw)[kPeers], uint32_t t, uint32_t near) const {
TWOSHOT_UNROLL
    for (uint32_t p = 0; p < kPeers; p++) {
      raw[p] = Tile{};
      payload.load_run(raw[p], first_of(team.peer(near + p)) + line_of(t), t < tiles ? end_of(near + p) : 0);
    }
  }

  TWOSHOT_DEVICE void store_tile(const Tile (&raw)[kPeers], uint32_t t, uint32_t near, bool stores) const {
    const uint32_t k = t >> tile_shift(), i = line_of(t);
TWOSHOT_UNROLL
    for (uint32_t p = 0; p < kPeers; p++) {
      const uint32_t peer = team.peer(near + p);
      Line line[kBatch];
      payload.loaded_run(line, raw[p]);
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < kBatch; u++) {
        const uint32_t index = i + 32 * u;
        const bool here = stores && exists(near + p, index) && payload.full(first_of(peer) + index);
        st_relaxed_sys_v4_if(staged(peer, TWOSHOT_PHASE_SCATTER, team.rank, k, index), line[u], here);
      }
    }
  }

  // Whether tile t of some part may hold a line of those at the buffer's ends: the first, and the last two, which lie in the
  // last part that there is and, where that has one alone, in the part before.
  TWOSHOT_DEVICE bool at_an_end(uint32_t t) const {
    const uint32_t i = line_of(t) - this->lane;
    return i == 0 || i + 32 * kBatch + 2 > lines_of(kOne ? 0 : team.size() - 1);
  }

  // The partial line by itself, or where buffers are not aligned those at their ends, so that full ones pay for no more
  // than this.
  TWOSHOT_DEVICE void end_of_tile(uint32_t w, uint32_t t, bool stores) const {
    if (!ALIGNED && at_an_end(t)) {
      const uint32_t k = t >> tile_shift();
TWOSHOT_UNROLL_BY(1)
      for (uint32_t d = 1; d < team.size(); d++) {
        const uint32_t peer = team.peer(d);
TWOSHOT_UNROLL_BY(1)
        for (uint32_t index = line_of(t); index < line_of(t) + 32 * kBatch && index < lines_of(peer); index += 32) {
          const uint32_t source = first_of(peer) + index;
          if (payload.full(source)) continue;
          st_relaxed_sys_v4_if(staged(peer, TWOSHOT_PHASE_SCATTER, team.rank, k, index), payload.load_elements(source), stores);
        }
      }
    }
    if (ALIGNED && payload.partial != payload.kNone) {
      const uint32_t owner = owner_of_partial(), index = payload.partial - first_of(owner), k = t >> tile_shift();
      if (owner != team.rank && holds(line_of(t), index)) {
        st_relaxed_sys_v4_if(staged(owner, TWOSHOT_PHASE_SCATTER, team.rank, k, index),
                             payload.load_elements(payload.partial), stores);
      }
    }
    this->template mark<Base::kScatterers>(kScattered, w, t);
  }

  // A line of rank r's, of the own part; `own` if that is this rank.
  TWOSHOT_DEVICE Line load_staged(const Line& own, uint32_t k, uint32_t r, uint32_t index) const {
    Line line = own;
    const bool wanted = (Ranks::kWhole || r < team.size()) && r != team.rank && index < lines_of(team.rank);
    ld_relaxed_sys_v4_if(line, staged(team.rank, TWOSHOT_PHASE_SCATTER, r, k, index), wanted);
    return line;
  }

  // This rank's lines of the own part, where there is such a tile.
  TWOSHOT_DEVICE void load_own(Tile& raw, uint32_t t) const {
    const uint32_t begin = first_of(team.rank);
    payload.load_run(raw, begin + line_of(t), t < tiles ? begin + lines_of(team.rank) : 0);
  }

  // Once their loads are under way.
  TWOSHOT_DEVICE void finish_own(Line (&own)[kBatch], const Tile& raw, uint32_t begin, uint32_t i, uint32_t own_lines) const {
    payload.loaded_run(own, raw);
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < kBatch; u++) {
      const uint32_t index = i + 32 * u;
      if (index < own_lines && !payload.full(begin + index)) own[u] = payload.load_elements(begin + index);
    }
  }

  // Folds line i of the own part; two-shot: and publishes the result.
  TWOSHOT_DEVICE void reduce(uint32_t w) const {
    const uint32_t own_lines = lines_of(team.rank), begin = first_of(team.rank);
    // What is made of unaligned lines waits until all loads are under way, and takes so long that the own ones are loaded a tile
    // ahead.
    constexpr bool kLate = Ranks::kWhole && !ALIGNED;
    Tile ahead;
    if constexpr (kLate) load_own(ahead, w);
TWOSHOT_UNROLL_BY(1)
    for (uint32_t t = w; t < tiles; t += Base::kReducers) {
      const uint32_t k = t >> tile_shift(), i = line_of(t);
      Tile raw;
      Line own[kBatch];
      if constexpr (kLate) {
        raw = ahead;
        ahead = Tile{};
        load_own(ahead, t + Base::kReducers);
      } else {
        load_own(raw, t);
        finish_own(own, raw, begin, i, own_lines);
      }
      await(TWOSHOT_PHASE_SCATTER, k);
      if (kOne && args.in == args.out) this->template await_own<Base::kScatterers>(kScattered, k);
      const bool stores = kOne || this->stores();
      if constexpr (Ranks::kWhole) {
        // All loads first; then a line at a time, whose values may take many registers.
        Line line[kBatch * N];
TWOSHOT_UNROLL
        for (uint32_t j = 0; j < kBatch * N; j++) {
          line[j] = load_staged(kLate ? Line{} : own[j / N], k, j % N, i + 32 * (j / N));
        }
        if constexpr (kLate) {
          finish_own(own, raw, begin, i, own_lines);
TWOSHOT_UNROLL
          for (uint32_t j = 0; j < kBatch * N; j++) {
            if (j % N == team.rank) line[j] = own[j / N];
          }
        }
TWOSHOT_UNROLL
        for (uint32_t u = 0; u < kBatch; u++) {
          typename T::Fold sum;
          sum.start(line[u * N], args);
TWOSHOT_UNROLL
          for (uint32_t r = 1; r < N; r++) sum.add(line[u * N + r], args, r);
          own[u] = sum.round(args);
        }
      } else {
        typename T::Fold sum;
        sum.clear();
TWOSHOT_UNROLL_BY(1)
        for (uint32_t base = 0; base < team.size(); base += kChunk) {
          Line line[kChunk];
TWOSHOT_UNROLL
          for (uint32_t j = 0; j < kChunk; j++) line[j] = load_staged(own[0], k, base + j, i);
TWOSHOT_UNROLL
          for (uint32_t j = 0; j < kChunk; j++) {
            if (base + j < team.size()) sum.add(line[j], args, base + j);
          }
        }
        own[0] = sum.round(args);
      }
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
      for (uint32_t d = 1; d < team.size() && !kOne; d++) {
TWOSHOT_UNROLL
        for (uint32_t u = 0; u < kBatch; u++) {
          const uint32_t index = i + 32 * u;
          st_relaxed_sys_v4_if(staged(team.peer(d), TWOSHOT_PHASE_BROADCAST, team.rank, k, index), own[u],
                               stores && index < own_lines);
        }
      }
      payload.store_run(begin + i, own, begin + own_lines);
      this->template mark<Base::kReducers>(kReduced, w, t);
    }
  }

  // Phase 2: line i of every other shard from its owner.
  TWOSHOT_DEVICE void collect(uint32_t w) const {
TWOSHOT_UNROLL_BY(1)
    for (uint32_t t = w; t < tiles; t += Base::kCollectors) {
      const uint32_t k = t >> tile_shift(), i = line_of(t);
      await(TWOSHOT_PHASE_BROADCAST, k);
TWOSHOT_UNROLL_BY(Ranks::kUnroll)
      for (uint32_t near = 1; near < team.size(); near += kPeers) {
        Line line[kBatch * kPeers];
TWOSHOT_UNROLL
        for (uint32_t j = 0; j < kBatch * kPeers; j++) {
          const uint32_t index = i + 32 * (j / kPeers), distance = near + j % kPeers;
          line[j] = Line{};
          ld_relaxed_sys_v4_if(line[j], staged(team.rank, TWOSHOT_PHASE_BROADCAST, team.peer(distance), k, index),
                               exists(distance, index));
        }
TWOSHOT_UNROLL
        for (uint32_t j = 0; j < kBatch * kPeers; j++) {
          const uint32_t index = i + 32 * (j / kPeers), distance = near + j % kPeers;
          const uint32_t peer = team.peer(distance), target = first_of(peer) + index;
          if constexpr (ALIGNED) {
            payload.store_full_if(target, line[j], exists(distance, index) && payload.full(target));
          } else {
            static_assert(kBatch == 1, "a lane's lines of a peer are not an array");
            const Line run[1] = {line[j]};
            payload.store_run(target, run, end_of(distance));
          }
        }
      }
      if (ALIGNED && payload.partial != payload.kNone) {
        const uint32_t owner = owner_of_partial(), index = payload.partial - first_of(owner);
        if (owner != team.rank && holds(i, index)) {
          Line line = {};
          ld_relaxed_sys_v4_if(line, staged(team.rank, TWOSHOT_PHASE_BROADCAST, owner, k, index), true);
          payload.store_elements(payload.partial, line);
        }
      }
      this->template mark<Base::kCollectors>(kCollected, w, t);
    }
  }

  // ---- the launch

  TWOSHOT_DEVICE void run_channel(Watch& watch) const {
    const uint32_t w = this->warp - 2;
    if (this->warp == 0) {
      this->poll_flags(watch);
    } else if (this->warp == 1) {
      if (this->lane == 0) this->signal();
    } else if (w < Base::kScatterers) {
      scatter(w);
    } else if (w < Base::kScatterers + Base::kReducers) {
      reduce(w - Base::kScatterers);
    } else if constexpr (!kOne) {
      collect(w - Base::kScatterers - Base::kReducers);
    }
  }

  TWOSHOT_DEVICE void run() {
    griddepcontrol_wait_then_launch_dependents(args);
    const TwoshotEpoch begun = epoch_read(args);
    this->base = this->base_read();
    if (given_up_before(begun)) return;
    const uint32_t epoch = begun.number;
    Watch watch(args, TWOSHOT_KERNEL_BULK, epoch);
    epoch_advance(args, epoch);
    this->base_advance();
    bool good = true;
TWOSHOT_UNROLL_BY(1)
    for (uint32_t channel = blockIdx.x; channel < args.channels && good; channel += gridDim.x) {
      this->begin_channel(channel);
      __syncthreads();
      run_channel(watch);
      __syncthreads();
      good = ld_acquire_cta_block_word(kQuit) == 0;
      __syncthreads();
    }
    if (good) watch.finish(TWOSHOT_PHASE_BROADCAST);
  }
};

template <typename T, int N, bool MC>
TWOSHOT_DEVICE void run_bulk(const TwoshotArgs& args) {
  static_assert(!MC, "no such kernel");
  if (payload_aligned<Whole<T>>(args)) {
    Bulk<Whole<T>, N, true>(args).run();
  } else {
    Bulk<Whole<T>, N, false>(args).run();
  }
}

}  // namespace twoshot
