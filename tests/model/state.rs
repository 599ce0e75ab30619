//! The packed global state: memory with in-flight and buffered stores, device words, and where each thread is.

use super::call::Call;
use super::fingerprint::Mixer;

pub const MAX_ACTORS: usize = 4;
pub const MAX_THREADS: usize = 2;
pub const MAX_STAGES: usize = 3;
pub const MAX_LINES: usize = 108;
pub const MAX_LAUNCHES: usize = 8;
/// Words of a line. Two stand for four: a fault shows on one word that another word hides.
pub const WORDS: usize = 2;
/// Content that no launch in sight has written.
pub const OLD: u32 = 15;

/// One 32-bit word of a stage with the stores on their way to it.
///
/// Bits 0..4: content, 0 is the sentinel, otherwise a tag (see `Model::tag`). Bit 4: a sentinel store waits in the owner's
/// store buffer. From bit 8, four entries of 6 bits: remote stores in flight, oldest first, tag and sender.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Word(pub u32);

impl Word {
    const PENDING: u32 = 1 << 4;
    pub const SLOTS: usize = 4;

    pub fn content(self) -> u32 {
        self.0 & 15
    }

    pub fn with_content(self, tag: u32) -> Self {
        Self(self.0 & !15 | tag)
    }

    pub fn pending(self) -> bool {
        self.0 & Self::PENDING != 0
    }

    pub fn with_pending(self) -> Self {
        Self(self.0 | Self::PENDING)
    }

    /// The buffered sentinel store reaches memory.
    pub fn drained(self) -> Self {
        if self.pending() { Self(self.0 & !Self::PENDING & !15) } else { self }
    }

    pub fn in_flight(self) -> bool {
        self.0 >> 8 != 0
    }

    /// Tag and sender of the k-th store in flight.
    pub fn entry(self, k: usize) -> Option<(u32, u32)> {
        let entry = self.0 >> (8 + 6 * k) & 63;
        (entry != 0).then_some((entry & 15, entry >> 4))
    }

    /// Adds a store in flight; `None` when more are under way than the model can hold.
    pub fn send(self, tag: u32, sender: u32) -> Option<Self> {
        let free = (0..Self::SLOTS).find(|&k| self.entry(k).is_none())?;
        Some(Self(self.0 | (tag | sender << 4) << (8 + 6 * free)))
    }

    /// The k-th store in flight lands. `None` when an older store of the same sender is still under way.
    pub fn land(self, k: usize) -> Option<Self> {
        let (tag, sender) = self.entry(k)?;
        if (0..k).any(|older| self.entry(older).is_some_and(|(_, s)| s == sender)) {
            return None;
        }
        let flight = self.0 >> 8;
        let below = flight & ((1 << (6 * k)) - 1);
        let above = (flight >> (6 * k)) >> 6;
        let rest = below | above << (6 * k);
        Some(Self(rest << 8 | self.0 & 0xF0 | tag))
    }

    /// Renames the tags after the base epoch moved up by one.
    fn aged(self) -> Self {
        let age = |tag: u32| match tag {
            0 => 0,
            1 | OLD => OLD,
            tag => tag - 1,
        };
        let mut word = Self(self.0 & 0xF0 | age(self.content()));
        for k in 0..Self::SLOTS {
            if let Some((tag, sender)) = self.entry(k) {
                word.0 |= (age(tag) | sender << 4) << (8 + 6 * k);
            }
        }
        word
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Thread {
    /// Launches that this thread has finished.
    pub launch: u8,
    /// 0: idle; k: about to do step k - 1 of its program.
    pub pc: u8,
    /// Lines of the current poll that have been consumed.
    pub mask: u8,
    /// The epoch that it read plus one (0: not read yet), and the size to clear.
    pub epoch: u8,
    pub dirty: u8,
    /// It found that its rank gave up.
    pub quiet: bool,
    /// It gave up and goes on all the same (a fault).
    pub unfinished: bool,
}

/// One communicator on one rank.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Actor {
    pub filled: bool,
    /// Index of the running launch's shape, 0 when idle.
    pub shape: u8,
    /// Epoch words (the lagged variant uses the first) and buffered stores to them (value + 1, 0 when none).
    pub replica: [u8; MAX_THREADS],
    pub replica_store: [u8; MAX_THREADS],
    /// Lagged variant: dirty lines per stage, and their buffered update, which drains with `replica_store[0]`.
    pub dirty: [u8; MAX_STAGES],
    pub dirty_store: [u8; MAX_STAGES],
    pub arrived: u8,
    /// 0 until a thread gives up, then the epoch that it read plus one; and the launches begun since.
    pub claim: u8,
    pub behind: u8,
    /// A wrong word was taken in this launch, by a rank that has not given up.
    pub wrong: bool,
}

#[derive(Clone, Copy)]
pub struct State {
    /// Lines of all windows: `(window * stages + stage) * lines_per_stage + line`, two words each.
    pub memory: [[Word; WORDS]; MAX_LINES],
    pub actors: [Actor; MAX_ACTORS],
    pub threads: [[Thread; MAX_THREADS]; MAX_ACTORS],
    /// Chosen call of each launch in sight, plus one; 0 when not chosen yet. One row per communicator.
    pub calls: [[u8; MAX_LAUNCHES]; 2],
    /// By how much epochs have been renamed: for printing only, not part of the identity.
    pub base: u32,
}

/// Sizes that tell how much of the arrays is in use.
#[derive(Clone, Copy)]
pub struct Dimensions {
    pub windows: usize,
    pub stages: usize,
    pub lines_per_stage: usize,
    pub actors: usize,
}

impl Dimensions {
    pub fn lines(self) -> usize {
        self.windows * self.stages * self.lines_per_stage
    }

    pub fn index(self, window: usize, stage: usize, line: usize) -> usize {
        (window * self.stages + stage) * self.lines_per_stage + line
    }

    /// Window, stage and line of an index.
    pub fn place(self, index: usize) -> (usize, usize, usize) {
        let row = index / self.lines_per_stage;
        (row / self.stages, row % self.stages, index % self.lines_per_stage)
    }
}

impl State {
    /// Renames epochs so that the slowest thread is at launch 0: epoch e becomes e - 1, stage s becomes s - 1.
    pub fn age(&mut self, size: Dimensions, modulus: u8) {
        self.base += 1;
        let before = self.memory;
        for (index, line) in self.memory.iter_mut().enumerate().take(size.lines()) {
            let (window, stage, at) = size.place(index);
            let from = &before[size.index(window, (stage + 1) % size.stages, at)];
            *line = from.map(|word| if word.0 == 0 { word } else { word.aged() });
        }
        let less = |epoch: u8| (epoch + modulus - 1) % modulus;
        let less_one = |stored: u8| if stored == 0 { 0 } else { less(stored - 1) + 1 };
        for actor in &mut self.actors[..size.actors] {
            for word in &mut actor.replica {
                *word = less(*word);
            }
            for word in &mut actor.replica_store {
                *word = less_one(*word);
            }
            actor.claim = less_one(actor.claim);
            actor.dirty[..size.stages].rotate_left(1);
            actor.dirty_store[..size.stages].rotate_left(1);
        }
        for thread in self.threads[..size.actors].iter_mut().flatten() {
            thread.launch -= 1;
            thread.epoch = less_one(thread.epoch);
        }
        for calls in &mut self.calls {
            calls.rotate_left(1);
            calls[MAX_LAUNCHES - 1] = 0;
        }
    }

    /// A 128-bit fingerprint; two of ten million states collide with a probability below 1e-24.
    pub fn fingerprint(&self, size: Dimensions) -> u128 {
        let mut mix = Mixer::default();
        for (index, line) in self.memory[..size.lines()].iter().enumerate() {
            let both = u64::from(line[0].0) | u64::from(line[1].0) << 32;
            if both != 0 {
                mix.add(both);
                mix.add(index as u64);
            }
        }
        for a in 0..size.actors {
            let actor = &self.actors[a];
            let [r0, r1] = actor.replica;
            let [s0, s1] = actor.replica_store;
            let head = [
                u8::from(actor.filled) | u8::from(actor.wrong) << 1,
                actor.shape,
                r0,
                r1,
                s0,
                s1,
                actor.arrived,
                actor.claim | actor.behind << 4,
            ];
            mix.add(u64::from_le_bytes(head));
            let ([d0, d1, d2], [n0, n1, n2]) = (actor.dirty, actor.dirty_store);
            mix.add(u64::from_le_bytes([d0, d1, d2, n0, n1, n2, 0, 0]));
            for t in &self.threads[a] {
                let gave_up = u8::from(t.quiet) | u8::from(t.unfinished) << 1;
                mix.add(u64::from_le_bytes([t.launch, t.pc, t.mask, t.epoch, t.dirty, gave_up, 0, 0]));
            }
        }
        for calls in &self.calls {
            mix.add(u64::from_le_bytes(*calls));
        }
        mix.finish()
    }
}

/// How a call reads in a trace.
pub fn describe(call: Call) -> String {
    let cast = if call.multicast { "multicast " } else { "" };
    format!("{cast}{:?}, {} line(s)", call.algorithm, call.lines)
}
