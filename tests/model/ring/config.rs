//! What is explored: algorithm, ranks, ring, launches, grids, warps, and at most one deliberate fault.

pub use super::super::search::Horizon;

/// Which of the two kernels, see ring.cuh: Parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Every rank folds everything (shipped for two ranks).
    OneShot,
    /// Every rank folds its shard (shipped for more).
    TwoShot,
}

/// A role of warps that move payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Scatter = 0,
    Reduce = 1,
    Collect = 2,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Scatter, Self::Reduce, Self::Collect];
}

/// Which flags and slots, by what they carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Scatter = 0,
    Broadcast = 1,
}

/// One AllReduce, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Chunks of each rank's part, over all channels; nobody has more than rank 0.
    pub parts: [u8; 3],
    /// `in == out`.
    pub in_place: bool,
}

impl Call {
    pub const fn one_shot(chunks: u8) -> Self {
        Self { parts: [chunks; 3], in_place: false }
    }

    pub const fn two_shot(parts: [u8; 3]) -> Self {
        Self { parts, in_place: false }
    }

    pub const fn in_place(self) -> Self {
        Self { in_place: true, ..self }
    }
}

/// A deliberate fault. The search must find a run that shows its harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Release: the signaller stores flags without a fence.
    NoFence,
    /// Release: the signaller takes the least of all words of a role but the last one.
    IgnoresOneWarp,
    /// Release: lane 0 tells that a tile of this role is done without the warp's barrier.
    NoWarpBarrier(Role),
    /// Release: a chunk of several tiles counts as complete with its first one.
    CompleteTooEarly,
    /// Release: the broadcast's flags are raised as far as has been scattered.
    BroadcastAsScattered,
    /// Acquire: a worker loads payload before the flag has been seen, for the poller or the worker does not acquire.
    LoadsAhead(Role),
    /// Acquire: workers wait for the nearest peer's flags only.
    OnePeer,
    /// Acquire: a flag counts if it is this value or a larger one.
    AtLeast,
    /// Reuse: scatterers do not wait for room.
    NoRoom,
    /// Reuse, one-shot: the window instead of `ring / 2 - 1`.
    Window(u8),
    /// Reuse, two-shot: scatterers wait until this rank has reduced the chunk, not until it has collected it.
    RoomByReduced,
    /// Ring: the base is not advanced.
    BaseStays,
    /// Ring: each copy of the base is advanced by the chunks of the channel that its block did first.
    BaseByOwnChannel,
    /// In place, one-shot: the reducer does not wait until its chunk has been scattered.
    NoWaitInPlace,
    /// Progress: rank 1 takes a block's channels in descending order.
    ChannelsDescend,
    /// Bound: the workers of a block whose poller gave up go on storing to peers (as bulk.cuh's once
    /// did: docs/ring-model.md).
    StoresOn,
    /// Bound: the signaller raises flags whether or not the poller gave up.
    QuitIgnored,
    /// Bound: the signaller looks whether the poller gave up before it looks at what is complete.
    QuitReadFirst,
    /// Bound: the poller says that everything is here before it says that it gave up.
    QuitSaidLast,
    /// Bound: launches behind one in which the poller gave up do their work (as bulk.cuh's once did, too).
    GoesOn,
    /// Every step is as shipped; the configuration is the fault.
    Configuration,
}

/// How much the search may leave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Every landing of every word and flag, every flag raised and every flag seen is a step of its own.
    None,
    /// The words of a store land at once; flags are as before.
    Words,
    /// Stores land at once; a worker's last tile of a chunk raises its flags; workers look at flags themselves. The
    /// search proves that this leaves out nothing (see `docs/ring-model.md`).
    Ordered,
}

/// One exploration.
#[derive(Clone, Debug)]
pub struct Config {
    pub algorithm: Algorithm,
    pub ranks: u8,
    /// Slots of a ring.
    pub ring: u8,
    pub channels: u8,
    pub calls: Vec<Call>,
    /// Calls of the first launches, as indices of `calls`; free choice beyond.
    pub sequence: Vec<u8>,
    /// Blocks of a launch; every rank chooses anew at every launch.
    pub grids: Vec<u8>,
    /// Warps of each role.
    pub workers: u8,
    /// Tiles of a chunk.
    pub tiles: u8,
    /// Words of a tile, each of another lane.
    pub lanes: u8,
    /// Lanes of the poller for one peer and phase.
    pub pollers: u8,
    pub horizon: Horizon,
    pub reduction: Reduction,
    pub mutant: Option<Mutant>,
    /// Broken invariants are violations, not harm alone.
    pub invariants: bool,
    /// The ranks whose pollers may give up, at any moment: a bit each.
    pub may_give_up: u8,
}

impl Config {
    /// As shipped: any number of launches, free choice of calls at every launch, one block, one warp of each role.
    pub fn new(algorithm: Algorithm, ranks: u8, ring: u8, calls: &[Call]) -> Self {
        Self {
            algorithm,
            ranks,
            ring,
            channels: 1,
            calls: calls.to_vec(),
            sequence: Vec::new(),
            grids: vec![1],
            workers: 1,
            tiles: 1,
            lanes: 1,
            pollers: 1,
            horizon: Horizon::Unbounded,
            reduction: Reduction::Ordered,
            mutant: None,
            invariants: true,
            may_give_up: 0,
        }
    }

    pub fn one_shot(ring: u8, calls: &[Call]) -> Self {
        Self::new(Algorithm::OneShot, 2, ring, calls)
    }

    pub fn two_shot(ranks: u8, ring: u8, calls: &[Call]) -> Self {
        Self::new(Algorithm::TwoShot, ranks, ring, calls)
    }

    /// Every interleaving of every word (two of a tile) and flag, without reduction.
    pub fn every_step(self) -> Self {
        Self { reduction: Reduction::None, lanes: 2, ..self }
    }

    /// Every interleaving of every flag, see `Reduction::Words`.
    pub fn every_flag(self) -> Self {
        Self { reduction: Reduction::Words, ..self }
    }

    /// Two channels, done by any of these numbers of blocks.
    pub fn two_channels(self, grids: &[u8]) -> Self {
        Self { channels: 2, grids: grids.to_vec(), ..self }
    }

    pub fn workers(self, workers: u8, tiles: u8) -> Self {
        Self { workers, tiles, ..self }
    }

    pub fn pollers(self, pollers: u8) -> Self {
        Self { pollers, ..self }
    }

    pub fn launches(self, launches: u8) -> Self {
        Self { horizon: Horizon::Launches(launches), ..self }
    }

    pub fn sequence(self, sequence: &[u8]) -> Self {
        Self { sequence: sequence.to_vec(), ..self }
    }

    /// The fault, over a bounded number of launches, until it does harm.
    pub fn mutant(self, mutant: Mutant, launches: u8) -> Self {
        Self { mutant: Some(mutant), invariants: false, ..self.launches(launches) }
    }

    /// The same as far as the first broken invariant.
    pub fn invariants(self) -> Self {
        Self { invariants: true, ..self }
    }

    /// This rank's poller may give up.
    pub fn gives_up(self, rank: u8) -> Self {
        Self { may_give_up: self.may_give_up | 1 << rank, ..self }
    }

    pub fn has(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub fn one_shot_window(&self) -> u8 {
        match self.mutant {
            Some(Mutant::Window(window)) => window,
            _ => self.ring / 2 - 1,
        }
    }

    /// Chunks of a part that belong to this channel.
    pub fn chunks_in(&self, channel: u8, part: u8) -> u8 {
        if part > channel { (part - channel - 1) / self.channels + 1 } else { 0 }
    }
}
