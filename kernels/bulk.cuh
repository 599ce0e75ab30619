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

// kBatchLog2: lines of a lane in a tile where more than two ranks are folded, as a power of two: their folds are all under way
// at once.
template <typename T, uint32_t BYTES = T::kLineBytes>
struct Whole {
  static constexpr uint32_t kBytes = T::kBytes, kLineBytes = TWOSHOT_LINE_BYTES;
  static constexpr uint32_t kBatchLog2 = T::kInAnyOrder ? 2 : 1;  // one operation alone takes fewer registers
  static constexpr bool kInAnyOrder = T::kInAnyOrder;
  using Fold = typename T::Fold;
};

template <typename T>
struct Whole<T, TWOSHOT_HALF_BYTES> {
  static constexpr uint32_t kBytes = T::kBytes, kLineBytes = TWOSHOT_LINE_BYTES;
  static constexpr uint32_t kBatchLog2 = 0;  // a fold is twice as large
  static constexpr bool kInAnyOrder = T::kInAnyOrder;
  using Fold = HalvesFold<T>;
};

// ---- the roles that move payload ----------------------------------------------------------------------------------

template <typename T, int N>
constexpr uint32_t kBatchLog2 = N == 2 ? 2 : T::kBatchLog2;

// A tile is 2^kBatchLog2 times 32 lines of a part. Inner tiles, which are nearly all, have nothing but full lines in every
// part; which those are depends on the payload's size alone.
template <typename T, int N, bool ALIGNED>
struct Bulk : Ring<Team<N, true, 1>, N == 2, 5 + kBatchLog2<T, N>> {
  using Base = Ring<Team<N, true, 1>, N == 2, 5 + kBatchLog2<T, N>>;
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
  static constexpr uint32_t kBatch = 1u << kBatchLog2<T, N>;
  static constexpr uint32_t kApart = 32 * TWOSHOT_LINE_BYTES;  // two lines of a lane
  using Tile = RawRun<ALIGNED, kBatch>;                         // of a part
  using Lines = Line[kBatch];

  const Payload<T, ALIGNED> payload;
  const uint32_t least;  // lines of the smallest part

  explicit TWOSHOT_DEVICE Bulk(const TwoshotArgs& args)
      : Base(args, Payload<T, ALIGNED>(args).lines), payload(args), least(lines_of(kOne ? 0 : team.size() - 1)) {}

  // The same for all lanes of a warp.
  TWOSHOT_DEVICE bool inner(uint32_t t) const {
    const uint32_t i = line_of(t) - this->lane;
    return t < tiles && (ALIGNED || i != 0) && i + 32 * kBatch + (ALIGNED ? 1 : 2) <= least;
  }

  TWOSHOT_DEVICE uint32_t end_of(uint32_t r) const { return first_of(r) + lines_of(r); }

  // What this rank has of a tile of rank `part`'s part; not inner: what is not there, or not full, as zeros.
  template <bool INNER>
  TWOSHOT_DEVICE void load_tile(Tile& raw, uint32_t t, uint32_t part) const {
    if constexpr (!INNER) raw = Tile{};
    payload.template load_run<INNER>(raw, first_of(part) + line_of(t), t < tiles ? end_of(part) : 0);
  }

  // Its lines; not inner: those that are not full are looked for by elements.
  template <bool INNER>
  TWOSHOT_DEVICE void finish_tile(Lines& line, const Tile& raw, uint32_t t, uint32_t part) const {
    payload.loaded_run(line, raw);
    if constexpr (!INNER) {
TWOSHOT_UNROLL_BY(1)
      for (uint32_t u = 0; u < kBatch; u++) {
        const uint32_t index = line_of(t) + 32 * u, source = first_of(part) + index;
        if (index < lines_of(part) && !payload.full(source)) replace(line, u, payload.load_elements(source));
      }
    }
  }

  // Stores a tile of rank `part`'s part to rank `to`.
  template <bool INNER>
  TWOSHOT_DEVICE void send_tile(const Lines& line, uint32_t to, uint32_t phase, uint32_t t, uint32_t part, bool stores) const {
    const uint32_t i = line_of(t);
    const uint64_t slot = staged(to, phase, team.rank, t >> tile_shift(), i);
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < kBatch; u++) {
      st_relaxed_sys_v4_if(slot + kApart * u, line[u], stores && (INNER || i + 32 * u < lines_of(part)));
    }
  }

  // Loads what rank r stored here of a tile of rank `part`'s part, if `wanted`. Other lines stay as they are.
  template <bool INNER>
  TWOSHOT_DEVICE void receive_tile(Lines& line, uint32_t r, uint32_t phase, uint32_t t, uint32_t part, bool wanted) const {
    const uint32_t i = line_of(t);
    const uint64_t slot = staged(team.rank, phase, r, t >> tile_shift(), i);
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < kBatch; u++) {
      ld_relaxed_sys_v4_if(line[u], slot + kApart * u, wanted && (INNER || i + 32 * u < lines_of(part)));
    }
  }

  // ---- phase 1: a tile of every peer's part to that peer

  TWOSHOT_DEVICE void scatter(uint32_t w) const {
    constexpr uint32_t kStep = Base::kScatterers;
    uint32_t t = w;
    if constexpr (kOne) {
      if (t < tiles && !inner(t)) {
        scatter_one(t, inner(t));
        this->template mark<kStep>(kScattered, w, t);
        t += kStep;
      }
      scatter_ahead(t, w);
    }
TWOSHOT_UNROLL_BY(1)
    for (; t < tiles; t += kStep) {
      scatter_one(t, inner(t));
      this->template mark<kStep>(kScattered, w, t);
    }
  }

  TWOSHOT_DEVICE void scatter_one(uint32_t t, bool all_full) const {
    this->await_room(t >> tile_shift());
    const bool stores = this->stores();
    if (!kOne && all_full) {
      scatter_tile<true>(t, stores);
    } else {
      scatter_tile<false>(t, stores);
    }
  }

  // To the only peer: the inner tiles from t on, which is moved behind them. The loads of the next ones are under way while one
  // is stored, for a memory's latency is that of storing several; of unaligned ones fewer, or the code outgrows its cache.
  TWOSHOT_DEVICE void scatter_ahead(uint32_t& t, uint32_t w) const {
    constexpr uint32_t kStep = Base::kScatterers;
    Tile a, b;
    load_inner(a, t);
    if constexpr (ALIGNED) {
      Tile c, d;
      load_inner(b, t + kStep);
      load_inner(c, t + 2 * kStep);
      for (;;) {
        load_inner(d, t + 3 * kStep);
        if (!send_inner(a, t, w)) return;
        load_inner(a, t + 3 * kStep);
        if (!send_inner(b, t, w)) return;
        load_inner(b, t + 3 * kStep);
        if (!send_inner(c, t, w)) return;
        load_inner(c, t + 3 * kStep);
        if (!send_inner(d, t, w)) return;
      }
    } else {
      for (;;) {
        load_inner(b, t + kStep);
        if (!send_inner(a, t, w)) return;
        load_inner(a, t + kStep);
        if (!send_inner(b, t, w)) return;
      }
    }
  }

  TWOSHOT_DEVICE void load_inner(Tile& raw, uint32_t t) const {
    if (inner(t)) load_tile<true>(raw, t, 0);
  }

  TWOSHOT_DEVICE bool send_inner(const Tile& raw, uint32_t& t, uint32_t w) const {
    if (!inner(t)) return false;
    this->await_room(t >> tile_shift());
    const bool stores = this->stores();
    Lines line;
    finish_tile<true>(line, raw, t, 0);
    send_tile<true>(line, team.peer(1), TWOSHOT_PHASE_SCATTER, t, 0, stores);
    this->template mark<Base::kScatterers>(kScattered, w, t);
    t += Base::kScatterers;
    return true;
  }

  // The next peer's loads are under way while one's lines are stored.
  template <bool INNER>
  TWOSHOT_DEVICE void scatter_tile(uint32_t t, bool stores) const {
    Tile ahead;
    load_tile<INNER>(ahead, t, team.peer(1));
TWOSHOT_UNROLL_BY(1)
    for (uint32_t d = 1; d < team.size(); d++) {
      const uint32_t peer = team.peer(d);
      const Tile raw = ahead;
      if (d + 1 < team.size()) load_tile<INNER>(ahead, t, team.peer(d + 1));
      Lines line;
      finish_tile<INNER>(line, raw, t, peer);
      send_tile<INNER>(line, peer, TWOSHOT_PHASE_SCATTER, t, peer, stores);
    }
  }

  // ---- the own part: folds a tile of it; two-shot: and publishes the result

  TWOSHOT_DEVICE void reduce(uint32_t w) const {
    constexpr uint32_t kStep = Base::kReducers;
    uint32_t t = w;
    if constexpr (kOne && ALIGNED) reduce_ahead(t, w);
TWOSHOT_UNROLL_BY(1)
    for (; t < tiles; t += kStep) {
      Tile raw;
      if (inner(t)) {
        load_tile<true>(raw, t, team.rank);
        reduce_tile<true>(raw, t);
      } else {
        load_tile<false>(raw, t, team.rank);
        reduce_tile<false>(raw, t);
      }
      this->template mark<kStep>(kReduced, w, t);
    }
  }

  // As scatter_ahead.
  TWOSHOT_DEVICE void reduce_ahead(uint32_t& t, uint32_t w) const {
    constexpr uint32_t kStep = Base::kReducers;
    Tile a, b;
    load_inner(a, t);
    for (;;) {
      load_inner(b, t + kStep);
      if (!reduce_inner(a, t, w)) return;
      load_inner(a, t + kStep);
      if (!reduce_inner(b, t, w)) return;
    }
  }

  TWOSHOT_DEVICE bool reduce_inner(const Tile& raw, uint32_t& t, uint32_t w) const {
    if (!inner(t)) return false;
    reduce_tile<true>(raw, t);
    this->template mark<Base::kReducers>(kReduced, w, t);
    t += Base::kReducers;
    return true;
  }

  template <bool INNER>
  TWOSHOT_DEVICE void reduce_tile(const Tile& raw, uint32_t t) const {
    const uint32_t k = t >> tile_shift();
    await(TWOSHOT_PHASE_SCATTER, k);
    if (kOne && args.in == args.out) this->template await_own<Base::kScatterers>(kScattered, k);
    Lines sum;
    if constexpr (kOne) {
      fold_two<INNER>(sum, raw, t);
    } else {
      const bool stores = this->stores();
      fold_all<INNER>(sum, raw, t);
TWOSHOT_UNROLL_BY(1)
      for (uint32_t d = 1; d < team.size(); d++) {
        send_tile<INNER>(sum, team.peer(d), TWOSHOT_PHASE_BROADCAST, t, team.rank, stores);
      }
    }
    payload.template store_run<INNER>(first_of(team.rank) + line_of(t), sum, end_of(team.rank));
  }

  // What is made of the own lines waits until all loads are under way.
  template <bool INNER>
  TWOSHOT_DEVICE void fold_two(Lines& sum, const Tile& raw, uint32_t t) const {
    Lines own, other = {};
    receive_tile<INNER>(other, 1 - team.rank, TWOSHOT_PHASE_SCATTER, t, 0, true);
    finish_tile<INNER>(own, raw, t, 0);
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < kBatch; u++) {
      const bool swap = !T::kInAnyOrder && team.rank != 0;
      typename T::Fold fold;
      fold.start(either(swap, other[u], own[u]), args);
      fold.add(either(swap, own[u], other[u]), args, 1);
      sum[u] = fold.round(args);
    }
  }

  // A rank's loads are under way while the one before is added.
  template <bool INNER>
  TWOSHOT_DEVICE void fold_all(Lines& sum, const Tile& raw, uint32_t t) const {
    Lines own, ahead;
    finish_tile<INNER>(own, raw, t, team.rank);
    typename T::Fold fold[kBatch];
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < kBatch; u++) {
      fold[u].clear();
      ahead[u] = own[u];
    }
    receive_tile<INNER>(ahead, 0, TWOSHOT_PHASE_SCATTER, t, team.rank, team.rank != 0);
TWOSHOT_UNROLL_BY(1)
    for (uint32_t r = 0; r < team.size(); r++) {
      Lines line;
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < kBatch; u++) {
        line[u] = ahead[u];
        ahead[u] = own[u];
      }
      receive_tile<INNER>(ahead, r + 1, TWOSHOT_PHASE_SCATTER, t, team.rank, r + 1 < team.size() && r + 1 != team.rank);
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < kBatch; u++) fold[u].add(line[u], args, r);
    }
TWOSHOT_UNROLL
    for (uint32_t u = 0; u < kBatch; u++) sum[u] = fold[u].round(args);
  }

  // ---- phase 2: a tile of every other shard from its owner

  TWOSHOT_DEVICE void collect(uint32_t w) const {
TWOSHOT_UNROLL_BY(1)
    for (uint32_t t = w; t < tiles; t += Base::kCollectors) {
      await(TWOSHOT_PHASE_BROADCAST, t >> tile_shift());
      if (inner(t)) {
        collect_tile<true>(t);
      } else {
        collect_tile<false>(t);
      }
      this->template mark<Base::kCollectors>(kCollected, w, t);
    }
  }

  template <bool INNER>
  TWOSHOT_DEVICE void collect_tile(uint32_t t) const {
    Lines ahead = {};
    receive_tile<INNER>(ahead, team.peer(1), TWOSHOT_PHASE_BROADCAST, t, team.peer(1), true);
TWOSHOT_UNROLL_BY(1)
    for (uint32_t d = 1; d < team.size(); d++) {
      const uint32_t peer = team.peer(d);
      Lines line;
TWOSHOT_UNROLL
      for (uint32_t u = 0; u < kBatch; u++) line[u] = ahead[u];
      if (d + 1 < team.size()) {
        receive_tile<INNER>(ahead, team.peer(d + 1), TWOSHOT_PHASE_BROADCAST, t, team.peer(d + 1), true);
      }
      payload.template store_run<INNER>(first_of(peer) + line_of(t), line, end_of(peer));
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
