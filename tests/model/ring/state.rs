//! The packed global state: memory with what is on its way to it, and where every warp of every rank is.

use crate::model::fingerprint::Mixer;

pub const MAX_RANKS: usize = 3;
pub const MAX_CHANNELS: usize = 2;
pub const MAX_WORKERS: usize = 2;
pub const MAX_POLLERS: usize = 2;
pub const MAX_PEERS: usize = MAX_RANKS - 1;
pub const MAX_SLOTS: usize = 96;
pub const MAX_WORDS: usize = 128;
pub const MAX_LAUNCHES: usize = 5;
/// Chunks of a channel in a launch.
pub const MAX_CHUNKS: u8 = 7;

/// A word of a chunk or a flag, with the stores on their way to it.
///
/// Three fields of 5 bits: what has landed, then the stores in flight, oldest first; 0 is nothing. A flag is its
/// position plus one, counted from where all ranks are; a word of a chunk is a `tag`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Word(pub u16);

/// A result in which something was wrong.
pub const BAD: u8 = 31;
/// In flight since before all launches in sight.
pub const OLD: u8 = 30;

/// What the words of a chunk carry, by the launch's number (counted from the slowest rank's) and the chunk's.
pub fn tag(launch: u8, chunk: u8) -> u8 {
    let tag = 1 + launch * MAX_CHUNKS + chunk;
    assert!(chunk < MAX_CHUNKS && tag < OLD);
    tag
}

/// Launch and chunk of a tag.
pub fn tagged(tag: u8) -> Option<(u8, u8)> {
    (1..OLD).contains(&tag).then(|| ((tag - 1) / MAX_CHUNKS, (tag - 1) % MAX_CHUNKS))
}

impl Word {
    const BITS: u16 = 5;
    const MASK: u16 = 31;

    pub fn content(self) -> u8 {
        (self.0 & Self::MASK) as u8
    }

    pub fn in_flight(self) -> bool {
        self.0 > Self::MASK
    }

    pub fn full(self) -> bool {
        self.0 >> (2 * Self::BITS) != 0
    }

    /// Whether this value is on its way.
    pub fn awaits(self, value: u8) -> bool {
        let value = u16::from(value);
        self.0 >> Self::BITS & Self::MASK == value || self.0 >> (2 * Self::BITS) == value
    }

    pub fn stored(value: u8) -> Self {
        Self(u16::from(value))
    }

    /// One more store in flight; there must be room.
    pub fn sent(self, value: u8) -> Self {
        assert!(!self.full());
        let at = if self.in_flight() { 2 * Self::BITS } else { Self::BITS };
        Self(self.0 | u16::from(value) << at)
    }

    /// The oldest store lands.
    pub fn landed(self) -> Self {
        Self(self.0 >> Self::BITS)
    }

    pub fn map(self, content: impl Fn(u8) -> u8, flight: impl Fn(u8) -> u8) -> Self {
        let field = |k: u16| (self.0 >> (k * Self::BITS) & Self::MASK) as u8;
        let moved = |k| if field(k) == 0 { 0 } else { u16::from(flight(field(k))) << (k * Self::BITS) };
        Self(u16::from(content(field(0))) | moved(1) | moved(2))
    }
}

/// What the block that does a channel knows of it. All zero between launches.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Channel {
    /// The next tile of each worker of each role. The words by which they tell what is complete follow from it.
    pub next: [[u8; MAX_WORKERS]; 3],
    /// Chunks that a lane of the poller has seen, by phase, peer and lane.
    pub seen: [[[u8; MAX_POLLERS]; MAX_PEERS]; 2],
    /// Lanes of the poller that gave up, a bit each.
    pub gone: u8,
    /// Chunks that the signaller has announced, by phase.
    pub raised: [u8; 2],
    pub quit: Quit,
    /// `Mutant::NoWarpBarrier`: the next tile of each worker's lanes but the first, for that role.
    pub others: [u8; MAX_WORKERS],
    /// `Mutant::LoadsAhead`: what the first word held that a worker loaded before it waited, plus one.
    pub ahead: [u8; MAX_WORKERS],
}

/// What has been said of the poller giving up.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Quit {
    #[default]
    No,
    Said,
    /// `Mutant::QuitReadFirst`: and the signaller has raised its last flags.
    Obeyed,
    /// `Mutant::QuitSaidLast`: everything is said to be here, but not yet why.
    Unsaid,
}

/// A rank.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Rank {
    /// Launches that have ended, counted from the slowest rank's.
    pub launch: u8,
    /// Blocks of the launch that runs; 0 when none does.
    pub grid: u8,
    /// The header's copies of the base, by block.
    pub base: [u8; MAX_CHANNELS],
    /// Something wrong has gone into this launch's result.
    pub bad: bool,
    /// The poller gave up in an earlier launch.
    pub failed: bool,
    pub channels: [Channel; MAX_CHANNELS],
}

#[derive(Clone, Copy)]
pub struct State {
    pub words: [Word; MAX_WORDS],
    pub flags: [Word; MAX_SLOTS],
    pub ranks: [Rank; MAX_RANKS],
    /// Chosen call of each launch in sight, plus one; 0 when not chosen yet.
    pub calls: [u8; MAX_LAUNCHES],
    /// By how much launches have been renamed: for printing only, not part of the identity.
    pub renamed: u32,
}

impl State {
    pub const EMPTY: Self = Self {
        words: [Word(0); MAX_WORDS],
        flags: [Word(0); MAX_SLOTS],
        ranks: [Rank {
            launch: 0,
            grid: 0,
            base: [0; MAX_CHANNELS],
            bad: false,
            failed: false,
            channels: [Channel {
                next: [[0; MAX_WORKERS]; 3],
                seen: [[[0; MAX_POLLERS]; MAX_PEERS]; 2],
                gone: 0,
                raised: [0; 2],
                quit: Quit::No,
                others: [0; MAX_WORKERS],
                ahead: [0; MAX_WORKERS],
            }; MAX_CHANNELS],
        }; MAX_RANKS],
        calls: [0; MAX_LAUNCHES],
        renamed: 0,
    };

    /// Renames launches so that launch 1 becomes launch 0, and positions by whole turns of the ring.
    pub fn age(&mut self, ranks: usize, ring: u8) {
        self.renamed += 1;
        let older = |value: u8| match tagged(value) {
            None => value,
            Some((0, _)) => 0,
            Some((launch, chunk)) => tag(launch - 1, chunk),
        };
        let older_in_flight = |value: u8| if older(value) == 0 { OLD } else { older(value) };
        for word in self.words.iter_mut().filter(|word| word.0 != 0) {
            *word = word.map(older, older_in_flight);
        }
        let least = self.ranks[..ranks].iter().flat_map(|rank| rank.base).min().unwrap_or(0);
        let turns = least / ring * ring;
        if turns > 0 {
            for flag in self.flags.iter_mut().filter(|flag| flag.0 != 0) {
                *flag = flag.map(|value| value.saturating_sub(turns), |value| value - turns);
            }
        }
        for rank in &mut self.ranks[..ranks] {
            rank.launch -= 1;
            for base in &mut rank.base {
                *base -= turns;
            }
        }
        self.calls.rotate_left(1);
        self.calls[MAX_LAUNCHES - 1] = 0;
    }

    pub fn fingerprint(&self, ranks: usize, channels: usize) -> u128 {
        let mut mix = Mixer::default();
        for (salt, memory) in [(0, self.words.as_slice()), (1 << 32, self.flags.as_slice())] {
            for (index, four) in memory.chunks(4).enumerate() {
                let four = four.iter().fold(0, |all, word| all << 16 | u64::from(word.0));
                if four != 0 {
                    mix.add(four);
                    mix.add(salt + index as u64);
                }
            }
        }
        for rank in &self.ranks[..ranks] {
            let [b0, b1] = rank.base;
            mix.add(u64::from_le_bytes([
                rank.launch,
                rank.grid,
                b0,
                b1,
                u8::from(rank.bad),
                u8::from(rank.failed),
                0,
                0,
            ]));
            for channel in &rank.channels[..channels] {
                let [[s0, s1], [r0, r1], [c0, c1]] = channel.next;
                let [[[a, b], [c, d]], [[e, f], [g, h]]] = channel.seen;
                let ([up, down], [l0, l1], [o0, o1]) = (channel.raised, channel.ahead, channel.others);
                mix.add(u64::from_le_bytes([s0, s1, r0, r1, c0, c1, channel.gone, channel.quit as u8]));
                mix.add(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                mix.add(u64::from_le_bytes([up, down, l0, l1, o0, o1, 0, 0]));
            }
        }
        mix.add(self.calls.iter().fold(0, |all, &call| all << 8 | u64::from(call)));
        mix.finish()
    }
}
