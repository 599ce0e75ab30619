//! Where every byte of the shared memory lies: the one computation that the gate, the allocator, the host
//! and (by the assertions in `driver::kernel`) the kernels use.
//!
//! A rank's **window** is `[header][stage 0][stage 1][stage 2]` and, where large payloads are taken, `[ring]`. Inside a stage the unit is the **line**, 16
//! bytes. One-shot uses `ranks` slots of `slot` lines; two-shot a scatter region of `ranks` shards and, behind
//! it, a broadcast region of `ranks` shards; where the switch adds, the first region holds the rank's own input, and
//! behind both lie the arrivals of the own shard's chunks. The ring is [`Ring`]'s.
#![forbid(unsafe_code)]

/// Bytes of one line, the granule of every store, poll and re-arm.
pub const LINE: u64 = 16;
/// Payload in a line where any bits may be a value, so that the line has to say more than they do.
pub const HALF: u64 = 8;
/// Lines between two slots or shards are a multiple of this: 128 bytes, one NVLink and L2 line.
pub const LINES_ALIGN: u64 = 8;
/// Stages that rotate with the epoch. Two would be correct (docs/protocol-model.md); the third is slack.
pub const STAGES: u64 = 3;
/// Bytes in front of stage 0 that only the owner touches (`TwoshotState`).
pub const HEADER: u64 = 8192;
/// Bytes at the end of the header that no kernel of ours touches.
pub const SPARE: u64 = 64;
/// Most blocks of one launch: the number of epoch replicas in the header.
pub const MAX_BLOCKS: u32 = 256;
/// Most threads of one block the kernels are compiled for.
pub const MAX_THREADS: u32 = 512;
/// Lines of a shard whose arrival is announced together where the switch adds (`kernels/switch.cuh`).
pub const CHUNK_LINES: u64 = 128;
/// Ranks that announce a chunk in one line.
pub const LINE_FLAGS: u64 = 4;
/// Bytes of a flag of the ring (`kernels/ring.cuh`).
pub const FLAG: u64 = 8;
/// Most ranks that a ring is for.
pub const RING_RANKS: u64 = 16;
/// Most channels of a ring: its memory grows with them.
pub const MAX_CHANNELS: u32 = 64;
/// Most lines of a payload that goes through a ring; their indices have 32 bits.
const RING_LINES: u64 = 1 << 31;

/// The algorithms.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Algorithm {
    /// Every rank pushes its data to every peer and reduces everything itself: one hop, `ranks` times the data.
    OneShot,
    /// Every rank reduces one shard and pushes the result to all: two hops, twice the data.
    TwoShot,
    /// Two-shot whose shards are added up by the NVLink switch on their way to their owners.
    Switch,
    /// One-shot between two ranks, else two-shot, for payloads that are bandwidth alone: through the ring, any size in one
    /// launch.
    Bulk,
}

impl Algorithm {
    /// All, in the order of the kernel table.
    pub const ALL: [Self; 4] = [Self::OneShot, Self::TwoShot, Self::Switch, Self::Bulk];
    /// Those between which the cross-over table decides.
    pub const TABLED: [Self; 3] = [Self::OneShot, Self::TwoShot, Self::Bulk];

    /// The word that stands for it in kernel names and log lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneShot => "oneshot",
            Self::TwoShot => "twoshot",
            Self::Switch => "switch",
            Self::Bulk => "bulk",
        }
    }
}

/// How much of a line is payload (`kernels/wire.cuh`).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Packing {
    /// All of it.
    Full,
    /// [`HALF`] of it.
    Half,
}

impl Packing {
    /// Bytes of the lines that carry so many bytes of payload: what limits and [`Shape`] are about.
    pub fn carried(self, bytes: u64) -> Option<u64> {
        match self {
            Self::Full => Some(bytes),
            Self::Half => bytes.div_ceil(HALF).checked_mul(LINE),
        }
    }

    /// The largest payload that is carried in so many bytes.
    pub fn payload(self, carried: u64) -> u64 {
        match self {
            Self::Full => carried,
            Self::Half => carried / LINE * HALF,
        }
    }
}

/// The ring that payloads of [`Algorithm::Bulk`] go through: for each phase, peer and channel so many slots of a chunk, and
/// a flag for each, all flags in front.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ring {
    /// Most blocks that can work on one payload: each does a channel.
    pub channels: u32,
    /// Chunks of a channel that it holds, as a power of two.
    pub ring_log2: u16,
    /// Lines of a chunk, as a power of two.
    pub chunk_log2: u16,
    phases_and_peers: u64,
}

impl Ring {
    /// The ring of so many ranks; none where there are too many. Chunks of 8 KiB; the more peers share the links, the
    /// fewer chunks of each are under way.
    pub fn of(ranks: u64, channels: u32) -> Option<Self> {
        let (phases, ring_log2) = match ranks {
            2 => (1, 5),
            3 | 4 => (2, 4),
            5..=RING_RANKS => (2, 3),
            _ => return None,
        };
        let channels = channels.clamp(1, MAX_CHANNELS);
        Some(Self { channels, ring_log2, chunk_log2: 9, phases_and_peers: phases * (ranks - 1) })
    }

    /// Its bytes, a multiple of 128.
    pub fn bytes(&self) -> u64 {
        let slots = (self.phases_and_peers * u64::from(self.channels)) << self.ring_log2;
        (slots * FLAG).next_multiple_of(LINE * LINES_ALIGN) + slots * (LINE << self.chunk_log2)
    }
}

/// Sizes of one communicator's windows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    ranks: u64,
    stage_bytes: u64,
    ring: Option<Ring>,
}

/// How one payload lies in a stage. Its bytes are those carried ([`Packing::carried`]).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shape {
    /// Lines of the payload, the last one padded.
    pub lines: u64,
    /// Lines from one slot (one-shot) or shard (all others) to the next.
    pub stride: u64,
    /// Lines of the stage the call may touch; everything polled and re-armed lies below. None where it goes through the ring.
    pub used: u64,
    /// Lines that the threads of one rank share out among themselves; chunks that its blocks do where it goes through the
    /// ring.
    pub work: u64,
}

impl Shape {
    /// The shape of `bytes` for `ranks`, or `None` when the numbers do not fit 64 bits.
    pub fn of(algorithm: Algorithm, ranks: u64, bytes: u64) -> Option<Self> {
        if ranks == 0 {
            return None;
        }
        let lines = bytes.div_ceil(LINE);
        if algorithm == Algorithm::Bulk {
            let shard = lines.div_ceil(ranks).checked_next_multiple_of(LINES_ALIGN)?.min(lines);
            let part = if ranks == 2 { lines } else { shard };
            let work = part.div_ceil(1 << Ring::of(ranks, 1)?.chunk_log2);
            return Some(Self { lines, stride: part, used: 0, work });
        }
        let (stride, regions, work) = match algorithm {
            Algorithm::OneShot => (lines.checked_next_multiple_of(LINES_ALIGN)?, 1, lines),
            Algorithm::TwoShot | Algorithm::Switch => {
                let stride = lines.div_ceil(ranks).checked_next_multiple_of(LINES_ALIGN)?;
                (stride, 2, stride.min(lines))
            }
            Algorithm::Bulk => return None,
        };
        let arrivals = match algorithm {
            Algorithm::Switch => stride.div_ceil(CHUNK_LINES).checked_mul(ranks.div_ceil(LINE_FLAGS))?,
            _ => 0,
        };
        let regions = stride.checked_mul(ranks)?.checked_mul(regions)?;
        let used = regions.checked_add(arrivals)?.checked_next_multiple_of(LINES_ALIGN)?;
        Some(Self { lines, stride, used, work })
    }
}

impl Layout {
    /// Stages just large enough for one-shot up to `oneshot_bytes` and two-shot up to `twoshot_bytes`.
    pub fn for_payloads(ranks: u32, oneshot_bytes: u64, twoshot_bytes: u64) -> Option<Self> {
        let ranks = u64::from(ranks);
        let one = Shape::of(Algorithm::OneShot, ranks, oneshot_bytes)?.used;
        let two = Shape::of(Algorithm::TwoShot, ranks, twoshot_bytes)?.used;
        let stage_bytes = one.max(two).max(LINES_ALIGN).checked_mul(LINE)?;
        let layout = Self { ranks, stage_bytes, ring: None };
        layout.stage_bytes.checked_mul(STAGES)?.checked_add(HEADER)?;
        Some(layout)
    }

    /// The same stages, or larger ones, for payloads up to `bytes` that the switch adds up.
    pub fn with_switch(self, bytes: u64) -> Option<Self> {
        let needed = Shape::of(Algorithm::Switch, self.ranks, bytes)?.used.checked_mul(LINE)?;
        let layout = Self { stage_bytes: self.stage_bytes.max(needed), ..self };
        layout.stage_bytes.checked_mul(STAGES)?.checked_add(HEADER)?;
        Some(layout)
    }

    /// The same stages, and behind them a ring of so many channels; nothing where there are too many ranks for one.
    pub fn with_ring(self, channels: u32) -> Option<Self> {
        let layout = Self { ring: Some(Ring::of(self.ranks, channels)?), ..self };
        self.window_bytes().checked_add(layout.ring?.bytes()).map(|_| layout)
    }

    /// The ring, if there is one.
    pub fn ring(&self) -> Option<Ring> {
        self.ring
    }

    /// Bytes of one stage; a multiple of 128.
    pub fn stage_bytes(&self) -> u64 {
        self.stage_bytes
    }

    /// Bytes of one window before rounding to the driver's granularity.
    pub fn window_bytes(&self) -> u64 {
        HEADER + STAGES * self.stage_bytes + self.ring.map_or(0, |ring| ring.bytes())
    }

    /// The largest payload, in bytes carried, of one launch.
    pub fn largest(&self, algorithm: Algorithm) -> u64 {
        let lines = self.stage_bytes / LINE;
        let whole = |lines: u64| lines / LINES_ALIGN * LINES_ALIGN;
        let lines = match algorithm {
            Algorithm::OneShot => whole(lines / self.ranks),
            Algorithm::TwoShot => whole(lines / (2 * self.ranks)) * self.ranks,
            Algorithm::Switch => {
                // As two-shot, and in what is left a word for each chunk and rank.
                let (mut fits, mut above) = (0, self.largest(Algorithm::TwoShot) + 1);
                while above - fits > 1 {
                    let middle = fits + (above - fits) / 2;
                    *(if self.fit(algorithm, middle).is_some() { &mut fits } else { &mut above }) = middle;
                }
                return fits;
            }
            Algorithm::Bulk => self.ring.map_or(0, |_| RING_LINES),
        };
        lines * LINE
    }

    /// The shape of a payload if it fits a stage, or if there is a ring for it.
    pub fn fit(&self, algorithm: Algorithm, bytes: u64) -> Option<Shape> {
        let shape = Shape::of(algorithm, self.ranks, bytes)?;
        if algorithm == Algorithm::Bulk {
            return (self.ring.is_some() && shape.lines <= RING_LINES).then_some(shape);
        }
        (shape.used <= self.stage_bytes / LINE).then_some(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STAGED: [Algorithm; 3] = [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Switch];

    #[test]
    fn a_ring_takes_any_payload_lies_behind_the_stages_and_is_for_so_many_ranks() {
        let bare = Layout::for_payloads(2, 1 << 20, 4 << 20).unwrap();
        assert!(bare.fit(Algorithm::Bulk, 1).is_none() && bare.largest(Algorithm::Bulk) == 0);
        for ranks in 2..=16 {
            let bare = Layout::for_payloads(ranks, 1 << 20, 4 << 20).unwrap();
            let with = bare.with_ring(24).unwrap();
            let ring = with.ring().unwrap();
            assert_eq!(with.window_bytes(), bare.window_bytes() + ring.bytes());
            assert_eq!((ring.bytes() % 128, with.stage_bytes()), (0, bare.stage_bytes()));
            assert!(ring.bytes() <= 48 << 20, "{ranks} ranks: {}", ring.bytes());
            let most = with.largest(Algorithm::Bulk);
            assert!(with.fit(Algorithm::Bulk, most).is_some() && with.fit(Algorithm::Bulk, most + 1).is_none());
            // Every chunk of the longest part is some block's work.
            let shape = with.fit(Algorithm::Bulk, 1 << 30).unwrap();
            let part = if ranks == 2 { 1 << 26 } else { (1u64 << 26).div_ceil(ranks.into()).next_multiple_of(8) };
            assert_eq!(shape.work, part.div_ceil(512));
        }
        assert!(Layout::for_payloads(17, 1, 1).unwrap().with_ring(24).is_none());
        assert_eq!(Ring::of(2, 24).unwrap().bytes(), 24 * 32 * (8192 + 8));
        assert_eq!((Ring::of(4, 0).unwrap().channels, Ring::of(4, 256).unwrap().channels), (1, 64));
    }

    proptest! {
        #[test]
        fn every_payload_that_fits_ends_inside_its_stage(
            ranks in 1u32..=128, cap_one in 0u64..1 << 32, cap_two in 0u64..1 << 40, bytes in 0u64..1 << 41,
        ) {
            let Some(layout) = Layout::for_payloads(ranks, cap_one, cap_two) else { return Ok(()) };
            let Some(layout) = layout.with_switch(cap_two / 2) else { return Ok(()) };
            prop_assert_eq!(layout.stage_bytes() % 128, 0);
            for algorithm in STAGED {
                if let Some(shape) = layout.fit(algorithm, bytes) {
                    prop_assert!(shape.used * LINE <= layout.stage_bytes());
                    prop_assert!(shape.stride * u64::from(ranks) <= shape.used);
                    prop_assert!(shape.lines * LINE >= bytes);
                    prop_assert_eq!(shape.stride % LINES_ALIGN, 0);
                }
            }
        }

        #[test]
        fn what_the_stage_was_sized_for_always_fits(ranks in 1u32..=128, one in 0u64..1 << 32, two in 0u64..1 << 40) {
            let Some(layout) = Layout::for_payloads(ranks, one, two) else { return Ok(()) };
            prop_assert!(layout.fit(Algorithm::OneShot, one).is_some());
            prop_assert!(layout.fit(Algorithm::TwoShot, two).is_some());
            for algorithm in STAGED {
                let most = layout.largest(algorithm);
                prop_assert!(layout.fit(algorithm, most).is_some() && layout.fit(algorithm, most + 1).is_none());
            }
            let Some(larger) = layout.with_switch(two) else { return Ok(()) };
            prop_assert!(larger.fit(Algorithm::Switch, two).is_some() && larger.fit(Algorithm::OneShot, one).is_some());
            prop_assert!(larger.stage_bytes() >= layout.stage_bytes());
        }

        #[test]
        fn every_chunk_of_the_longest_shard_has_a_word_for_each_rank(ranks in 1u64..=128, bytes in 1u64..1 << 33) {
            let shape = Shape::of(Algorithm::Switch, ranks, bytes).unwrap();
            let arrivals = shape.used - 2 * ranks * shape.stride;
            prop_assert!(arrivals * LINE_FLAGS >= shape.stride.div_ceil(CHUNK_LINES) * ranks);
            prop_assert!(Shape::of(Algorithm::TwoShot, ranks, bytes).unwrap().stride == shape.stride);
        }

        #[test]
        fn shards_cover_the_payload_exactly_once(ranks in 1u64..=128, bytes in 0u64..1 << 33) {
            let shape = Shape::of(Algorithm::TwoShot, ranks, bytes).unwrap();
            let covered: u64 = (0..ranks)
                .map(|r| shape.lines.min((r + 1) * shape.stride).saturating_sub(r * shape.stride))
                .sum();
            prop_assert_eq!(covered, shape.lines);
        }
    }

    #[test]
    fn a_half_filled_line_carries_eight_bytes() {
        let carried = |bytes| Packing::Half.carried(bytes);
        assert_eq!([0, 1, 8, 9].map(carried), [Some(0), Some(16), Some(16), Some(32)]);
        assert_eq!(carried(u64::MAX), None);
        assert_eq!(Packing::Full.carried(9), Some(9));
        for limit in 0..100 {
            let most = Packing::Half.payload(limit);
            assert!(carried(most) <= Some(limit) && carried(most + 1) > Some(limit));
        }
    }

    #[test]
    fn sizes_beyond_64_bits_are_refused_not_wrapped() {
        assert_eq!(Shape::of(Algorithm::OneShot, 128, u64::MAX), None);
        assert_eq!(Layout::for_payloads(72, u64::MAX / 8, 1), None);
        assert_eq!(Layout::for_payloads(72, 1, 1).unwrap().with_switch(u64::MAX), None);
    }
}
