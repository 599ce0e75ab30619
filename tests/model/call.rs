//! Calls, launch shapes and what each thread of a launch does: pure functions of the call, nothing else.
//!
//! Offsets follow the shipped layout with a rounding unit of one line instead of eight, so that two ranks can own
//! non-empty shards with very few lines (with eight, every call small enough to model would give all lines to rank 0).

use super::config::Mutant;

/// Which AllReduce a call uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Every rank sends everything to every rank.
    OneShot,
    /// Scatter, reduce the own shard, broadcast it.
    TwoShot,
    /// Lay the input out in the own window, announce it, load the own shard from all windows at once, broadcast it.
    Switch,
}

/// One AllReduce, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub algorithm: Algorithm,
    pub lines: u8,
    /// One store reaches every window, the sender's own one included.
    pub multicast: bool,
    /// Line indices of a shard that are announced together (`kernels/switch.cuh`); blocks have a multiple of it.
    pub chunk: u8,
}

impl Call {
    pub const fn one_shot(lines: u8) -> Self {
        Self { algorithm: Algorithm::OneShot, lines, multicast: false, chunk: 1 }
    }

    pub const fn two_shot(lines: u8) -> Self {
        Self { algorithm: Algorithm::TwoShot, lines, multicast: false, chunk: 1 }
    }

    pub const fn switch(lines: u8, chunk: u8) -> Self {
        Self { algorithm: Algorithm::Switch, lines, multicast: true, chunk }
    }

    pub const fn multicast(self) -> Self {
        Self { multicast: true, ..self }
    }

    fn shard(self, ranks: u8) -> u8 {
        self.lines.div_ceil(ranks)
    }

    fn shard_len(self, ranks: u8, rank: u8) -> u8 {
        let shard = self.shard(ranks);
        self.lines.saturating_sub(rank * shard).min(shard)
    }

    /// Lines of a stage that this call may touch: the size that the lagged variant records.
    pub fn extent(self, ranks: u8) -> u8 {
        match self.algorithm {
            Algorithm::OneShot => ranks * self.lines,
            Algorithm::TwoShot => 2 * ranks * self.shard(ranks),
            Algorithm::Switch => 2 * ranks * self.shard(ranks) + self.shard(ranks).div_ceil(self.chunk) * ranks,
        }
    }
}

/// Blocks and threads per block of one launch; ranks choose independently of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub grid: u8,
    pub block: u8,
}

impl Shape {
    pub const SINGLE: Self = Self { grid: 1, block: 1 };
    pub const TWO_BLOCKS: Self = Self { grid: 2, block: 1 };
    pub const TWO_THREADS: Self = Self { grid: 1, block: 2 };

    pub fn threads(self) -> u8 {
        self.grid * self.block
    }
}

/// One step of a thread's program. Line numbers are relative to the stage that the thread's epoch selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read the epoch (and, in the lagged variant, the dirty size) from device memory.
    Read,
    /// Wait until every thread of the block is here: each has read the epoch (and laid out its input).
    Barrier,
    /// The same at the end of a switch call's second phase: each has seen its arrivals.
    SecondBarrier,
    /// Write epoch + 1 into the replicas of this block.
    Advance,
    /// Lagged variant: clear this thread's share of the stage to be cleared.
    Clear,
    /// Lagged variant: count this thread as arrived; the last one writes epoch + 1.
    Arrive,
    /// Send one line to the rank, or to all other ranks, or (multicast) to all ranks.
    Push { to: Target, line: u8 },
    /// Send an arrival, once the inputs it speaks of have reached the own memory (release).
    Announce { to: u8, line: u8, inputs: Inputs },
    /// Wait for these lines in any order.
    Poll { set: PollSet, what: Polled },
    /// Load this line from every window, in any order, as the switch does.
    Load { line: u8 },
    /// Store the sentinel to this line of the own window.
    Rearm { line: u8 },
}

/// Lines `first .. first + len` of every shard, of `shard` lines each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inputs {
    pub shard: u8,
    pub first: u8,
    pub len: u8,
}

/// What is polled, which says what is re-armed with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    Scatter,
    Broadcast,
    /// Re-armed by the block, later.
    Arrivals,
    /// Results of a switch call: with each the own input that is in it, so many lines before.
    Results {
        inputs: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Rank(u8),
    Peers,
    All,
}

/// Up to three lines that one thread polls together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollSet {
    pub lines: [u8; 3],
    pub len: u8,
}

impl PollSet {
    fn collect(lines: impl Iterator<Item = u8>) -> Self {
        let mut set = Self { lines: [0; 3], len: 0 };
        for line in lines {
            set.lines[set.len as usize] = line;
            set.len += 1;
        }
        set
    }
}

/// What changes the program besides the call and the shape.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    pub ranks: u8,
    pub lagged: bool,
    /// One-shot pushes a line right before it polls it, instead of all lines first.
    pub interleaved: bool,
    /// The block's barrier between reading and advancing the epoch is there.
    pub barrier: bool,
    /// The arrival is ordered behind the reads (release); otherwise it may overtake them.
    pub arrival_release: bool,
    /// Multicast calls also poll the copy that the sender stored into its own window.
    pub poll_own_copy: bool,
    /// The fault of a switch call, if it is in what threads do.
    pub mutant: Option<Mutant>,
}

/// The program of one thread.
pub fn program(call: Call, shape: Shape, rank: u8, thread: u8, style: Style) -> Vec<Op> {
    let mut ops = Vec::new();
    if style.lagged && !style.arrival_release {
        ops.push(Op::Arrive);
    }
    ops.push(Op::Read);
    let mut work = match call.algorithm {
        Algorithm::OneShot => one_shot(call, shape, rank, thread, style),
        Algorithm::TwoShot => two_shot(call, shape, rank, thread, style),
        Algorithm::Switch => switch(call, shape, rank, thread, style),
    }
    .into_iter()
    .peekable();
    // The epoch is written behind the first pushes, where their latency hides the barrier.
    let early = style.mutant == Some(Mutant::AnnouncedBeforeBarrier);
    while let Some(push) =
        work.next_if(|op| matches!(op, Op::Push { .. }) || early && matches!(op, Op::Announce { .. }))
    {
        ops.push(push);
    }
    if style.lagged {
        ops.push(Op::Clear);
        if style.arrival_release {
            ops.push(Op::Arrive);
        }
    } else {
        if shape.block > 1 && style.barrier {
            ops.push(Op::Barrier);
        }
        if thread.is_multiple_of(shape.block) {
            ops.push(Op::Advance);
        }
    }
    ops.extend(work);
    ops
}

fn senders(call: Call, rank: u8, style: Style) -> impl Iterator<Item = u8> {
    let own = call.multicast && style.poll_own_copy;
    (0..style.ranks).filter(move |&r| r != rank || own)
}

fn to_everyone(call: Call) -> Target {
    if call.multicast { Target::All } else { Target::Peers }
}

fn one_shot(call: Call, shape: Shape, rank: u8, thread: u8, style: Style) -> Vec<Op> {
    let stride = shape.threads() as usize;
    let (mut ops, mut polls) = (Vec::new(), Vec::new());
    for i in (thread..call.lines).step_by(stride) {
        ops.push(Op::Push { to: to_everyone(call), line: rank * call.lines + i });
        let poll = Op::Poll {
            set: PollSet::collect(senders(call, rank, style).map(|r| r * call.lines + i)),
            what: Polled::Scatter,
        };
        if style.interleaved {
            ops.push(poll);
        } else {
            polls.push(poll);
        }
    }
    ops.extend(polls);
    ops
}

fn two_shot(call: Call, shape: Shape, rank: u8, thread: u8, style: Style) -> Vec<Op> {
    let ranks = style.ranks;
    let stride = shape.threads() as usize;
    let shard = call.shard(ranks);
    let mine = || (thread..shard).step_by(stride);
    let mut ops = Vec::new();
    for i in mine() {
        for step in 1..ranks {
            let peer = (rank + step) % ranks;
            if i < call.shard_len(ranks, peer) {
                ops.push(Op::Push { to: Target::Rank(peer), line: rank * shard + i });
            }
        }
    }
    for i in mine().filter(|&i| i < call.shard_len(ranks, rank)) {
        let peers = (0..ranks).filter(|&r| r != rank);
        ops.push(Op::Poll { set: PollSet::collect(peers.map(|r| r * shard + i)), what: Polled::Scatter });
        ops.push(Op::Push { to: to_everyone(call), line: ranks * shard + rank * shard + i });
    }
    for i in mine() {
        let filled = senders(call, rank, style).filter(|&r| i < call.shard_len(ranks, r));
        let set = PollSet::collect(filled.map(|r| ranks * shard + r * shard + i));
        if set.len > 0 {
            ops.push(Op::Poll { set, what: Polled::Broadcast });
        }
    }
    ops
}

fn switch(call: Call, shape: Shape, rank: u8, thread: u8, style: Style) -> Vec<Op> {
    let (ranks, shard, chunk) = (style.ranks, call.shard(style.ranks), call.chunk);
    let (block, lane) = (thread / shape.block, thread % shape.block);
    assert!(shape.block.is_multiple_of(chunk) && (shape.block == 1 || shard <= shape.block), "one tile, or no barrier");
    let has = |mutant| style.mutant == Some(mutant);
    let exists = |r: u8, i: u8| i < call.shard_len(ranks, r);
    let tiles = || (block * shape.block..shard).step_by(shape.threads() as usize);
    let mine = || tiles().map(move |tile| tile + lane);
    let arrivals = |i: u8| {
        let keyed = if has(Mutant::ArrivalsByBlock) { block } else { i / chunk };
        2 * ranks * shard + keyed * ranks
    };
    let everyone = || (0..ranks).filter(move |&r| r != rank || style.mutant != Some(Mutant::OwnArrivalSkipped));
    let mut ops = Vec::new();
    for (tile, i) in tiles().zip(mine()) {
        for r in (0..ranks).filter(|&r| exists(r, i)) {
            ops.push(Op::Push { to: Target::Rank(rank), line: r * shard + i });
        }
        for first in (tile..tile + shape.block).step_by(chunk as usize).filter(|_| lane == 0) {
            for to in everyone().filter(|&r| exists(r, first)) {
                let inputs = Inputs { shard, first, len: chunk };
                ops.push(Op::Announce { to, line: arrivals(first) + rank, inputs });
            }
        }
    }
    for i in mine().filter(|&i| exists(rank, i)) {
        let set = PollSet::collect(everyone().map(|r| arrivals(i) + r));
        let (poll, load) = (Op::Poll { set, what: Polled::Arrivals }, Op::Load { line: rank * shard + i });
        ops.extend(if has(Mutant::LoadWithoutAcquire) { [load, poll] } else { [poll, load] });
        ops.push(Op::Push { to: Target::All, line: (ranks + rank) * shard + i });
        for r in (0..ranks).filter(|&r| has(Mutant::InputsRearmedEarly) && exists(r, i)) {
            ops.push(Op::Rearm { line: r * shard + i });
        }
    }
    if shape.block > 1 && !has(Mutant::ArrivalsRearmedEarly) {
        ops.push(Op::SecondBarrier);
    }
    for tile in tiles().filter(|_| lane == 0 && !has(Mutant::ArrivalsNotRearmed)) {
        for first in (tile..tile + shape.block).step_by(chunk as usize).filter(|&first| exists(rank, first)) {
            ops.extend(everyone().map(|r| Op::Rearm { line: arrivals(first) + r }));
        }
    }
    let kept = has(Mutant::InputsRearmedEarly) || has(Mutant::InputsNotRearmed);
    let what = if kept { Polled::Broadcast } else { Polled::Results { inputs: ranks * shard } };
    for i in mine() {
        let set = PollSet::collect((0..ranks).filter(|&r| exists(r, i)).map(|r| (ranks + r) * shard + i));
        if set.len > 0 {
            ops.push(Op::Poll { set, what });
        }
    }
    ops
}
