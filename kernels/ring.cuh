// The ring that bulk.cuh moves its payload through: where chunks and flags are, who announces them, who waits for them.
// Plain data and one flag per chunk; no sentinel, so any bits may be a payload and every type has all of a line.
//
// Units      Part: the lines that a rank folds. All of them if there are two ranks (one-shot), else its shard (two-shot).
//            Chunk: 2^chunk_log2 lines of a part. Chunk g of every part belongs to channel g % channels and is the
//            channel's chunk k = g / channels. Tile: what a warp moves at once. A block does a channel; where there are
//            fewer blocks, one after the other. Channels, chunks and the ring are the same on every rank, grids need not.
// Ring       Behind the stages, in every window, for each phase (scatter; in two-shot also broadcast), peer and channel:
//            2^ring_log2 flags of 8 bytes, and as many slots of a chunk. Chunk k of a launch has position p = base + k: it is
//            in slot p % ring, and its flag's value is p / ring + 1. Every launch adds the chunks of channel 0 to the base,
//            on every rank; it is kept in the header like the epoch, a copy per block, but has 64 bits and never wraps. So
//            no flag has a value twice, and it is awaited as exactly this value: by Reuse no peer can be further.
// Writers    Flags and slots of rank r's window for peer s: rank s alone, for both phases.
// Roles      Warps of a block: one polls, one signals, the others scatter (phase 1: line of `in` to whoever folds it),
//            reduce (fold a line of the own part, to `out` and in two-shot to all peers) or, in two-shot, collect (phase 2:
//            a line of another shard to `out`). No role waits for another in program order, so links, polls and memory are
//            busy together. Tile t of a channel is warp t % warps's of each role.
// Release    The lanes of a warp store a tile; barrier of the warp; its lane 0 releases, within the block, how many chunks
//            are complete as far as this warp goes. The signaller acquires all warps' words, takes the least, fences at
//            system scope once for everything that has become complete, and stores those flags. So a slow fence delays
//            flags, not stores, and makes the next batch larger.
// Acquire    The lane of the poller that is responsible for a phase, a peer and every A-th chunk loads the next flag with
//            acquire at system scope and releases its count within the block; every lane of a worker acquires that, then
//            loads the chunk with relaxed loads at system scope, which no first-level cache serves.
// Reuse      A slot is stored into again only when the chunk in it has been used.
//            Two-shot, scatter slot of chunk k at owner o, with k + ring: the scatterers first wait until this rank has
//            collected chunk k of every shard; o's among them, so o had reduced it, from this slot.
//            Two-shot, broadcast slot of chunk k at rank r, stored to again by o with k + ring, once o has the scatter
//            chunks k + ring of all ranks: r sent its own after it had collected chunk k, from this slot.
//            Two-shot across launches: a rank that has ended one has collected everything, so its peers have reduced
//            everything; and a peer reduces a chunk of launch e + 1 only with this rank's, which e + 1 has sent.
//            One-shot, with w = ring / 2 - 1: the scatterers send position p once this rank has reduced p - w. It had the
//            peer's p - w, which the peer had sent once it had reduced p - 2 w; so p - ring, in p's slot, is behind it.
//            One-shot across launches: a peer whose last flag of launch e is here has reduced all but the last w chunks of
//            e, whose positions are above base - 2 - w, base being that of e + 1 (a channel may lack its last one). Nobody
//            waits before the first w chunks of e + 1, which are below base + w: less than a ring apart.
//            Ranks end a launch only when all have begun it, as lamport.cuh wants.
// Progress   A worker waits for chunks of the same or a lower number, of an earlier role or, for room, of a lower number; a
//            channel for the same channel, and blocks take channels in ascending order. So somebody can always go on.
// Bound      Only the poller waits for peers, with lamport.cuh's bound. When it gives up it says so to the block first
//            (kQuit), then says that everything has arrived: the workers run to their ends on whatever is there, but look
//            behind every wait and store nothing to peers any more, for one that is a launch behind may still read what is
//            in the slots, and end well. The signaller, which acquired that from them, stores no flag any more.
// Requires   Between 2 and TWOSHOT_BULK_MAX_RANKS ranks; blocks of TWOSHOT_BULK_THREADS threads, all of them resident;
//            ring_log2 of at least 2; chunks of whole tiles.
#pragma once

#include "lamport.cuh"

namespace twoshot {

// Where in the block's words a role's are. Of the poller one for each lane: how many of its chunks have arrived. Of the
// workers one for each warp: chunks that are complete as far as this warp goes.
constexpr uint32_t kReady = 0, kScattered = 32, kReduced = 48, kCollected = 64, kQuit = 80;
constexpr uint32_t kAll = 0xFFFFFFFFu;
static_assert(kQuit < TWOSHOT_BLOCK_WORDS && TWOSHOT_BULK_MAX_RANKS <= 17, "the block's words are shared out");

template <typename Ranks, bool ONE, uint32_t TILE_LOG2>
struct Ring {
  // Warps of each role.
  static constexpr uint32_t kScatterers = ONE ? TWOSHOT_BULK_SCATTERERS_OF_TWO : TWOSHOT_BULK_SCATTERERS;
  static constexpr uint32_t kReducers = ONE ? TWOSHOT_BULK_REDUCERS_OF_TWO : TWOSHOT_BULK_REDUCERS;
  static constexpr uint32_t kCollectors = ONE ? 0 : TWOSHOT_BULK_COLLECTORS;
  static_assert(32 * (2 + kScatterers + kReducers + kCollectors) == TWOSHOT_BULK_THREADS, "every warp has a role");
  static_assert(kScatterers <= 16 && kReducers <= 16 && kCollectors <= 16, "and a word");

  const TwoshotArgs& args;
  const Ranks team;
  const uint32_t lines;       // of the payload
  const uint32_t shard;       // lines per shard, the last ones may have fewer
  const uint32_t warp, lane;
  const uint32_t ahead_log2;  // lanes of the poller for one peer and phase
  uint32_t channel = 0, chunks = 0, tiles = 0;
  uint64_t base = 0;

  TWOSHOT_DEVICE Ring(const TwoshotArgs& args, uint32_t lines)
      : args(args),
        team(args),
        lines(lines),
        shard(round_to_slot((lines + team.size() - 1) / team.size())),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        ahead_log2(peers() > 8 ? 0 : peers() > 4 ? 1 : peers() > 2 ? 2 : peers() > 1 ? 3 : 4) {}

  TWOSHOT_DEVICE uint32_t peers() const { return team.size() - 1; }
  TWOSHOT_DEVICE uint32_t ring() const { return 1u << args.ring_log2; }
  TWOSHOT_DEVICE uint32_t tile_shift() const { return args.chunk_log2 - TILE_LOG2; }

  // ---- parts, chunks, tiles

  TWOSHOT_DEVICE uint32_t first_of(uint32_t r) const { return ONE ? 0 : r * shard; }
  TWOSHOT_DEVICE uint32_t lines_of(uint32_t r) const {
    const uint32_t first = first_of(r);
    if (ONE) return lines;
    return first >= lines ? 0 : lines - first < shard ? lines - first : shard;
  }
  // Chunks of so many lines of a part that are this channel's.
  TWOSHOT_DEVICE uint32_t chunks_in(uint32_t channel, uint32_t lines) const {
    const uint32_t all = (lines + (1u << args.chunk_log2) - 1) >> args.chunk_log2;
    return all > channel ? (all - channel - 1) / args.channels + 1 : 0;
  }
  TWOSHOT_DEVICE uint32_t chunks_of(uint32_t r) const { return chunks_in(channel, lines_of(r)); }
  // Of this lane's first line of tile t, in any part.
  TWOSHOT_DEVICE uint32_t line_of(uint32_t t) const {
    const uint32_t k = t >> tile_shift(), within = t & ((1u << tile_shift()) - 1);
    return ((channel + k * args.channels) << args.chunk_log2) + (within << TILE_LOG2) + lane;
  }

  // ---- flags and slots

  // Of chunk k, among all slots of the window of rank `at`.
  TWOSHOT_DEVICE uint64_t slot(uint32_t at, uint32_t phase, uint32_t source, uint32_t k) const {
    const uint32_t of_source = (phase - 1) * peers() + source - (source > at ? 1 : 0);
    const uint32_t position = static_cast<uint32_t>(base) + k;
    return (uint64_t{of_source * args.channels + channel} << args.ring_log2) + (position & (ring() - 1));
  }
  TWOSHOT_DEVICE uint64_t ring_begin(uint32_t at) const {
    return window(args, at) + TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * args.stage_bytes;
  }
  TWOSHOT_DEVICE uint64_t flag(uint32_t at, uint32_t phase, uint32_t source, uint32_t k) const {
    return ring_begin(at) + TWOSHOT_FLAG_BYTES * slot(at, phase, source, k);
  }
  TWOSHOT_DEVICE uint64_t flag_value(uint32_t k) const { return ((base + k) >> args.ring_log2) + 1; }
  // Of the chunk's line with index i in its part.
  TWOSHOT_DEVICE uint64_t staged(uint32_t at, uint32_t phase, uint32_t source, uint32_t k, uint32_t i) const {
    const uint64_t flags = TWOSHOT_FLAG_BYTES * (uint64_t{(ONE ? 1 : 2) * peers() * args.channels} << args.ring_log2);
    const uint64_t data = (flags + TWOSHOT_STAGE_ALIGN - 1) / TWOSHOT_STAGE_ALIGN * TWOSHOT_STAGE_ALIGN;
    const uint32_t within = i & ((1u << args.chunk_log2) - 1);
    return ring_begin(at) + data + line_offset(within) + (slot(at, phase, source, k) << (args.chunk_log2 + 4));
  }

  TWOSHOT_DEVICE uint64_t base_read() const {
    return ld_relaxed_sys_u64(window(args, team.rank) + offsetof(TwoshotState, base) + 8 * blockIdx.x);
  }
  // Behind the barrier of epoch_advance.
  TWOSHOT_DEVICE void base_advance() const {
    const uint64_t copies = window(args, team.rank) + offsetof(TwoshotState, base), next = base + chunks_in(0, lines_of(0));
    for (uint32_t i = blockIdx.x + threadIdx.x * gridDim.x; i < TWOSHOT_MAX_BLOCKS; i += gridDim.x * blockDim.x) {
      st_relaxed_sys_u64(copies + 8 * i, next);
    }
  }

  // ---- the warps of a block among themselves

  // Before a barrier, and behind one that all have come to: what has arrived and is complete without anybody's doing.
  TWOSHOT_DEVICE void begin_channel(uint32_t number) {
    channel = number;
    chunks = chunks_in(channel, lines_of(0));
    tiles = chunks << tile_shift();
    for (uint32_t word = threadIdx.x; word < TWOSHOT_BLOCK_WORDS; word += blockDim.x) {
      uint32_t value = 0;
      if (word < kScattered) {
        const uint32_t phase = 1 + word / 16, p = word % 16 >> ahead_log2, k = word & ((1u << ahead_log2) - 1);
        value = p < peers() && k < awaited(phase, p) ? 0 : kAll;
      } else if (word < kQuit) {
        const uint32_t w = word % 16;
        value = w < tiles ? w >> tile_shift() : chunks;
      }
      st_relaxed_cta_block_word(word, value);
    }
  }

  // Waits until chunk k of a phase is here from every peer.
  TWOSHOT_DEVICE void await(uint32_t phase, uint32_t k) const {
    const uint32_t mine = kReady + 16 * (phase - 1) + (k & ((1u << ahead_log2) - 1));
    const uint32_t needed = (k >> ahead_log2) + 1;
    uint32_t p = 0;
    do {
      while (ld_acquire_cta_block_word(mine + (p << ahead_log2)) < needed) nanosleep_pause();
    } while (++p < peers());
  }

  // Chunks that all warps of a role have completed.
  template <uint32_t WARPS>
  TWOSHOT_DEVICE uint32_t complete(uint32_t role) const {
    uint32_t least = kAll;
TWOSHOT_UNROLL
    for (uint32_t w = 0; w < WARPS; w++) {
      const uint32_t word = ld_acquire_cta_block_word(role + w);
      least = word < least ? word : least;
    }
    return least;
  }

  // Waits until chunk k is complete.
  template <uint32_t WARPS>
  TWOSHOT_DEVICE void await_own(uint32_t role, uint32_t k) const {
    while (complete<WARPS>(role) <= k) nanosleep_pause();
  }

  // Whether stores to peers still have a reader: not once the poller gave up. Behind a wait, for whoever went on because
  // of that has acquired it.
  TWOSHOT_DEVICE bool stores() const { return ld_acquire_cta_block_word(kQuit) == 0; }

  // Waits until the slots of chunk k are free at all peers.
  TWOSHOT_DEVICE void await_room(uint32_t k) const {
    if constexpr (ONE) {
      const uint32_t w = ring() / 2 - 1;
      if (k >= w) await_own<kReducers>(kReduced, k - w);
    } else {
      if (k >= ring()) await_own<kCollectors>(kCollected, k - ring());
    }
  }

  // Warp w of a role has done tile t; chunks below that of its next tile are complete.
  template <uint32_t WARPS>
  TWOSHOT_DEVICE void mark(uint32_t role, uint32_t w, uint32_t t) const {
    const uint32_t next = t + WARPS, complete = next >= tiles ? chunks : next >> tile_shift();
    if (complete == t >> tile_shift()) return;
    bar_warp_sync();
    if (lane == 0) st_release_cta_block_word_done(role + w, complete);
  }

  // ---- the poller: lane 16 * (phase - 1) + (p << ahead_log2) + k % A for chunk k of the peer at distance p + 1

  TWOSHOT_DEVICE uint32_t awaited(uint32_t phase, uint32_t p) const {
    if (phase == TWOSHOT_PHASE_SCATTER) return chunks_of(team.rank);
    return ONE ? 0 : chunks_of(team.peer(p + 1));
  }

  // All lanes ask at once: lanes that went their own ways would be served one after the other, each for a memory's latency, and
  // the longer a launch the more of them do.
  TWOSHOT_DEVICE void poll_flags(Watch& watch) const {
    const uint32_t phase = 1 + lane / 16, p = lane % 16 >> ahead_log2, step = 1u << ahead_log2;
    const uint32_t source = team.peer(p < peers() ? p + 1 : 1), all = p < peers() ? awaited(phase, p) : 0;
    uint32_t k = lane & (step - 1);
    bool waits = k < all;
    while (vote_any(waits)) {
      if (!waits) continue;
      if (ld_acquire_sys_u64(flag(team.rank, phase, source, k)) == flag_value(k)) {
        st_release_cta_block_word_ready(kReady + lane, k + step < all ? (k >> ahead_log2) + 1 : kAll);
        k += step;
        waits = k < all;
        continue;
      }
      spin_pause();
      if (watch.count_spin() && watch.give_up(Missing{source, phase, (channel + k * args.channels) << args.chunk_log2})) {
        st_release_cta_block_word_ready(kQuit, 1);
        st_release_cta_block_word_ready(kReady + lane, kAll);
        waits = false;
      }
    }
  }

  // ---- the signaller: one lane

  TWOSHOT_DEVICE void raise(uint32_t phase, uint32_t from, uint32_t to) const {
TWOSHOT_UNROLL_BY(1)
    for (uint32_t p = 0; p < peers(); p++) {
      const uint32_t peer = team.peer(p + 1), all = chunks_of(phase == TWOSHOT_PHASE_SCATTER ? peer : team.rank);
TWOSHOT_UNROLL_BY(1)
      for (uint32_t k = from; k < to && k < all; k++) {
        st_relaxed_sys_b64(flag(peer, phase, team.rank, k), flag_value(k));
      }
    }
  }

  TWOSHOT_DEVICE void signal() const {
    uint32_t scattered = 0, reduced = ONE ? chunks : 0;
TWOSHOT_UNROLL_BY(1)
    while (scattered < chunks || reduced < chunks) {
      const uint32_t now_scattered = complete<kScatterers>(kScattered);
      const uint32_t now_reduced = ONE ? chunks : complete<kReducers>(kReduced);
      // Whoever went on because the poller gave up has acquired that it did, and so has who acquired from them.
      if (ld_acquire_cta_block_word(kQuit) != 0) return;
      if (now_scattered == scattered && now_reduced == reduced) {
        nanosleep_pause();
        continue;
      }
      fence_acq_rel_sys();
      raise(TWOSHOT_PHASE_SCATTER, scattered, now_scattered);
      if (!ONE) raise(TWOSHOT_PHASE_BROADCAST, reduced, now_reduced);
      scattered = now_scattered, reduced = now_reduced;
    }
  }
};

}  // namespace twoshot
