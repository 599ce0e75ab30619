//! Calls, launch shapes and what each thread of a launch does: pure functions of the call, nothing else.
//!
//! Offsets follow the shipped layout with a rounding unit of one line instead of eight, so that two ranks can own
//! non-empty shards with very few lines (with eight, every call small enough to model would give all lines to rank 0).

/// Which AllReduce a call uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Every rank sends everything to every rank.
    OneShot,
    /// Scatter, reduce the own shard, broadcast it.
    TwoShot,
}

/// One AllReduce, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub algorithm: Algorithm,
    pub lines: u8,
    /// One store reaches every window, the sender's own one included.
    pub multicast: bool,
}

impl Call {
    pub const fn one_shot(lines: u8) -> Self {
        Self { algorithm: Algorithm::OneShot, lines, multicast: false }
    }

    pub const fn two_shot(lines: u8) -> Self {
        Self { algorithm: Algorithm::TwoShot, lines, multicast: false }
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
    /// Wait until every thread of the block is here: each has read the epoch.
    Barrier,
    /// Write epoch + 1 into the replicas of this block.
    Advance,
    /// Lagged variant: clear this thread's share of the stage to be cleared.
    Clear,
    /// Lagged variant: count this thread as arrived; the last one writes epoch + 1.
    Arrive,
    /// Send one line to the rank, or to all other ranks, or (multicast) to all ranks.
    Push { to: Target, line: u8 },
    /// Wait for these lines in any order; `own_shard` tells scatter from broadcast.
    Poll { set: PollSet, own_shard: bool },
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
    }
    .into_iter()
    .peekable();
    // The epoch is written behind the first pushes, where their latency hides the barrier.
    while let Some(push) = work.next_if(|op| matches!(op, Op::Push { .. })) {
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
        let poll =
            Op::Poll { set: PollSet::collect(senders(call, rank, style).map(|r| r * call.lines + i)), own_shard: true };
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
        ops.push(Op::Poll { set: PollSet::collect(peers.map(|r| r * shard + i)), own_shard: true });
        ops.push(Op::Push { to: to_everyone(call), line: ranks * shard + rank * shard + i });
    }
    for i in mine() {
        let filled = senders(call, rank, style).filter(|&r| i < call.shard_len(ranks, r));
        let set = PollSet::collect(filled.map(|r| ranks * shard + r * shard + i));
        if set.len > 0 {
            ops.push(Op::Poll { set, own_shard: false });
        }
    }
    ops
}
