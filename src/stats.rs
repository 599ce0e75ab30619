//! What the counters of a process mean: the words they lie in, the values they make, and how those are shown.
//!
//! The words are read by another process, perhaps of another version of twoshot, perhaps from a file that only has the
//! right name: everything is checked, nothing is trusted.
#![forbid(unsafe_code)]

use std::fmt::Write;

use serde::Serialize;

use crate::decline::Decline;
use crate::layout::Algorithm;
use crate::route::Reason;

/// The name of the memory that holds the words.
pub const NAME: &str = "twoshot-stats";
/// First word: says what this is, and in which byte order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"2shotst\x01");
/// Second word. Any change of the layout, of a row or of a bucket is a new one.
pub const VERSION: u64 = 4;

/// Rows of a table: the algorithms, then the reasons for stock NCCL.
pub const ROWS: usize = Algorithm::ALL.len() + Reason::ALL.len();
/// Columns of a table: bucket `b` holds payloads above `2^(b-1)` and up to `2^b` bytes, the first and the last one
/// everything beyond.
pub const BUCKETS: usize = 36;
/// Words of a cell: calls, bytes, calls that were timed, and their nanoseconds.
pub const CELL: usize = 4;
/// Words of a table.
pub const TABLE: usize = ROWS * BUCKETS * CELL;
/// Words in front of each table.
pub const SLOT_HEAD: usize = 8;
/// Words of one communicator.
pub const SLOT: usize = SLOT_HEAD + TABLE;
/// Communicators that can be shown at once, and in front of them the sum of those that have ended.
pub const SLOTS: usize = 65;
/// Words in front of the slots.
pub const HEAD: usize = 8;
/// All words.
pub const WORDS: usize = HEAD + SLOTS * SLOT;

/// Words of the head.
pub mod head {
    /// [`super::MAGIC`].
    pub const MAGIC: usize = 0;
    /// [`super::VERSION`].
    pub const VERSION: usize = 1;
    /// The process's number, as it knows itself.
    pub const PID: usize = 2;
    /// [`super::WORDS`].
    pub const WORDS: usize = 3;
}

/// Words of a slot's head.
pub mod slot {
    /// A [`super::Standing`], or 0 for a slot that is free.
    pub const STANDING: usize = 0;
    /// CUDA ordinal.
    pub const DEVICE: usize = 1;
    /// Rank.
    pub const RANK: usize = 2;
    /// Ranks; 0 while they are not known.
    pub const RANKS: usize = 3;
    /// Number of the decline, or 0.
    pub const DECLINE: usize = 4;
    /// In the first slot: how many communicators have ended.
    pub const ENDED: usize = 5;
}

/// Where a communicator stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u64)]
pub enum Standing {
    /// Not set up yet.
    New = 1,
    /// Routed.
    On = 2,
    /// Left to stock NCCL.
    Off = 3,
    /// Its ranks lost each other.
    Lost = 4,
}

impl Standing {
    fn of(word: u64) -> Option<Self> {
        [Self::New, Self::On, Self::Off, Self::Lost].into_iter().find(|standing| *standing as u64 == word)
    }

    fn name(self) -> &'static str {
        match self {
            Self::New => "not set up yet",
            Self::On => "ON",
            Self::Off => "OFF",
            Self::Lost => "lost",
        }
    }
}

/// Index of the row of a routed call.
pub fn row_of(algorithm: Algorithm) -> usize {
    algorithm as usize
}

/// Index of the row of a call left to stock NCCL.
pub fn row_of_stock(reason: Reason) -> usize {
    Algorithm::ALL.len() + reason as usize
}

/// The bucket of a payload.
pub fn bucket(bytes: u64) -> usize {
    let bits = 64 - bytes.saturating_sub(1).leading_zeros() as usize;
    bits.min(BUCKETS - 1)
}

/// Calls of one size.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Size {
    /// Largest payload of the bucket, in bytes; nothing for the last one, which has no limit.
    pub up_to: Option<u64>,
    /// Calls.
    pub calls: u64,
    /// Bytes of payload.
    pub bytes: u64,
    /// Calls that were timed (`TWOSHOT_SAMPLE`).
    #[serde(skip_serializing_if = "is_zero")]
    pub timed: u64,
    /// Device time of those, in nanoseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub timed_ns: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Size {
    /// Mean device time of a call in microseconds, where some were timed.
    pub fn mean_us(&self) -> Option<f64> {
        (self.timed > 0).then(|| self.timed_ns as f64 / self.timed as f64 / 1000.0)
    }
}

/// Calls that went one way.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Way {
    /// `oneshot`, `twoshot` or `stock`.
    pub route: &'static str,
    /// Why, for stock NCCL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Calls of all sizes.
    pub calls: u64,
    /// Bytes of payload of all sizes.
    pub bytes: u64,
    /// By size, where there were any.
    pub sizes: Vec<Size>,
}

/// One communicator.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Member {
    /// CUDA ordinal, once known.
    pub device: Option<u64>,
    /// Rank, once known.
    pub rank: Option<u64>,
    /// Ranks, once known.
    pub ranks: Option<u64>,
    /// Where it stands.
    pub standing: Standing,
    /// Why it is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Its calls.
    pub ways: Vec<Way>,
}

/// A process.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Snapshot {
    /// Its number, as it knows itself.
    pub pid: u64,
    /// The communicators that live.
    pub communicators: Vec<Member>,
    /// How many have ended.
    pub ended: u64,
    /// The calls of those.
    pub ended_ways: Vec<Way>,
}

impl Snapshot {
    /// Reads the memory of a process as bytes, which may be anything.
    pub fn of_bytes(bytes: &[u8]) -> Result<Self, String> {
        let (words, rest) = bytes.as_chunks();
        if !rest.is_empty() {
            return Err("the counters have another size than this program knows".to_owned());
        }
        Self::of(&words.iter().map(|word| u64::from_ne_bytes(*word)).collect::<Vec<_>>())
    }

    /// Reads the words of a process.
    pub fn of(words: &[u64]) -> Result<Self, String> {
        let at = |index: usize| words.get(index).copied().unwrap_or(0);
        if at(head::MAGIC) != MAGIC {
            return Err("this is not the memory of twoshot's counters".to_owned());
        }
        if at(head::VERSION) != VERSION {
            let version = at(head::VERSION);
            return Err(format!(
                "the counters have layout {version}, this program reads {VERSION}: use the same version of both"
            ));
        }
        if words.len() != WORDS || at(head::WORDS) != WORDS as u64 {
            let length = words.len();
            return Err(format!("the counters are not {WORDS} words long: use the same version of both ({length})"));
        }
        let mut slots = words[HEAD..].chunks_exact(SLOT);
        let first = slots.next().unwrap_or_default();
        let communicators = slots.filter_map(member).collect::<Result<_, _>>()?;
        let ended = first.get(slot::ENDED).copied().unwrap_or(0);
        Ok(Self { pid: at(head::PID), communicators, ended, ended_ways: ways(&first[SLOT_HEAD..]) })
    }
}

fn member(slot: &[u64]) -> Option<Result<Member, String>> {
    let word = slot[slot::STANDING];
    if word == 0 {
        return None;
    }
    let Some(standing) = Standing::of(word) else {
        return Some(Err(format!("a communicator stands at {word}, which is nothing")));
    };
    let known = slot[slot::RANKS] > 0;
    let field = |index: usize| known.then_some(slot[index]);
    let reason = u8::try_from(slot[slot::DECLINE]).ok().and_then(Decline::from_code).map(Decline::name);
    let (device, rank, ranks) = (field(slot::DEVICE), field(slot::RANK), field(slot::RANKS));
    Some(Ok(Member { device, rank, ranks, standing, reason, ways: ways(&slot[SLOT_HEAD..]) }))
}

/// The ways of a table that some call went.
pub fn ways(table: &[u64]) -> Vec<Way> {
    let algorithms = Algorithm::ALL.iter().map(|algorithm| (algorithm.name(), None));
    let reasons = Reason::ALL.iter().map(|reason| ("stock", Some(reason.name())));
    let rows = algorithms.chain(reasons).zip(table.chunks_exact(BUCKETS * CELL));
    rows.map(|((route, reason), row)| way(route, reason, row)).filter(|way| way.calls > 0).collect()
}

fn way(route: &'static str, reason: Option<&'static str>, row: &[u64]) -> Way {
    let cells = row.chunks_exact(CELL).enumerate();
    let sizes: Vec<_> = cells
        .filter(|(_, cell)| cell[0] > 0)
        .map(|(bucket, cell)| Size {
            up_to: (bucket + 1 < BUCKETS).then(|| 1 << bucket),
            calls: cell[0],
            bytes: cell[1],
            timed: cell[2],
            timed_ns: cell[3],
        })
        .collect();
    // A hostile table must not overflow a sum.
    let sum = |value: fn(&Size) -> u64| sizes.iter().map(value).fold(0, u64::saturating_add);
    Way { route, reason, calls: sum(|size| size.calls), bytes: sum(|size| size.bytes), sizes }
}

/// Bytes with a unit that leaves at most four digits before the point.
pub fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 { format!("{value} {}", units[unit]) } else { format!("{value:.1} {}", units[unit]) }
}

fn show(text: &mut String, ways: &[Way]) {
    for Way { route, reason, calls, bytes: sum, sizes } in ways {
        let name = format!("{route} {}", reason.unwrap_or_default());
        let sizes: Vec<_> = sizes
            .iter()
            .map(|size| {
                let time = size.mean_us().map_or_else(String::new, |us| format!(" ({us:.1} us)"));
                match size.up_to {
                    Some(most) => format!("{} to {}{time}", size.calls, bytes(most)),
                    None => format!("{} larger{time}", size.calls),
                }
            })
            .collect();
        let _ = writeln!(text, "  {name:<16} {calls:>12} calls {:>12}: {}", bytes(*sum), sizes.join(", "));
    }
    if ways.is_empty() {
        text.push_str("  no AllReduce\n");
    }
}

impl std::fmt::Display for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = String::new();
        for member in &self.communicators {
            let number = |n: Option<u64>| n.map_or_else(|| "?".to_owned(), |n| n.to_string());
            let reason = member.reason.map(|reason| format!(", {reason}")).unwrap_or_default();
            let (device, rank, ranks) = (number(member.device), number(member.rank), number(member.ranks));
            let _ = writeln!(text, "device {device}, rank {rank}/{ranks}: {}{reason}", member.standing.name());
            show(&mut text, &member.ways);
        }
        if self.communicators.is_empty() {
            text.push_str("no communicator\n");
        }
        if self.ended > 0 {
            let _ = writeln!(text, "{} communicator(s) that ended", self.ended);
            show(&mut text, &self.ended_ways);
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn empty() -> Vec<u64> {
        let mut words = vec![0; WORDS];
        words[head::MAGIC] = MAGIC;
        words[head::VERSION] = VERSION;
        words[head::PID] = 7;
        words[head::WORDS] = WORDS as u64;
        words
    }

    #[test]
    fn a_bucket_ends_at_its_power_of_two() {
        for power in 1..BUCKETS - 1 {
            let top = 1u64 << power;
            assert_eq!((bucket(top), bucket(top + 1)), (power, power + 1));
        }
        assert_eq!((bucket(0), bucket(1), bucket(2), bucket(u64::MAX)), (0, 0, 1, BUCKETS - 1));
    }

    #[test]
    fn a_slot_becomes_a_communicator_with_its_calls_by_way_and_size() {
        let mut words = empty();
        let at = HEAD + SLOT;
        words[at + slot::STANDING] = Standing::Off as u64;
        words[at + slot::RANK] = 1;
        words[at + slot::RANKS] = 4;
        words[at + slot::DECLINE] = Decline::NoNvlink as u64;
        let cell = at + SLOT_HEAD + (row_of_stock(Reason::Declined) * BUCKETS + bucket(3000)) * CELL;
        words[cell..][..CELL].copy_from_slice(&[2, 6000, 1, 7500]);
        let snapshot = Snapshot::of(&words).expect("well formed");
        let [member] = &snapshot.communicators[..] else { panic!("{snapshot:?}") };
        assert_eq!((member.rank, member.ranks, member.reason), (Some(1), Some(4), Some("no-nvlink")));
        let sizes = vec![Size { up_to: Some(4096), calls: 2, bytes: 6000, timed: 1, timed_ns: 7500 }];
        assert_eq!(member.ways, [Way { route: "stock", reason: Some("declined"), calls: 2, bytes: 6000, sizes }]);
        let text = snapshot.to_string();
        assert!(text.starts_with("device 0, rank 1/4: OFF, no-nvlink\n  stock declined "), "{text}");
        assert!(text.ends_with("2 calls      5.9 KiB: 2 to 4 KiB (7.5 us)\n"), "{text}");
    }

    #[test]
    fn words_of_another_kind_version_or_length_are_one_line_that_says_so() {
        let said = |words: &[u64]| Snapshot::of(words).expect_err("refused");
        assert!(said(&[]).contains("not the memory"));
        assert!(said(&vec![u64::MAX; WORDS]).contains("not the memory"));
        let mut words = empty();
        words[head::VERSION] = 99;
        assert!(said(&words).contains("layout 99"));
        assert!(said(&empty()[..WORDS - 1]).contains("words long: use the same version"));
        assert!(said(&empty()[..2]).contains("words long: use the same version"));
        let mut words = empty();
        words[HEAD + SLOT + slot::STANDING] = 77;
        assert!(said(&words).contains("stands at 77"));
        for words in [&[][..], &words] {
            assert_eq!(said(words).lines().count(), 1);
        }
    }

    proptest! {
        #[test]
        fn no_words_behind_a_good_head_make_the_reader_panic(
            places in prop::collection::vec((HEAD..WORDS, any::<u64>()), 0..400),
        ) {
            let mut words = empty();
            for (place, word) in places {
                words[place] = word;
            }
            if let Ok(snapshot) = Snapshot::of(&words) {
                prop_assert!(!snapshot.to_string().is_empty());
            }
        }
    }
}
