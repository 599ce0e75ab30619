//! Counting calls by route and size: two relaxed additions to one cache line per call, nothing a benchmark can see.
//!
//! The counters lie in memory that `twoshot stats` reads while the program runs; [`crate::stats`] says how.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use crate::decline::Decline;
use crate::driver::published;
use crate::layout::Algorithm;
use crate::route::Reason;
use crate::stats::{
    BUCKETS, CELL, HEAD, MAGIC, NAME, ROWS, SLOT, SLOT_HEAD, SLOTS, Snapshot, Standing, TABLE, VERSION, WORDS, bucket,
    head, row_of, row_of_stock, slot,
};

/// The words of one communicator: of the page, or its own where the page has no slot left.
#[derive(Clone)]
enum Words {
    Shown(usize, &'static [AtomicU64]),
    Own(Arc<[AtomicU64]>),
}

impl Words {
    fn get(&self) -> &[AtomicU64] {
        match self {
            Self::Shown(_, words) => words,
            Self::Own(words) => words,
        }
    }
}

/// The memory of all counters of the process, made for its first communicator.
struct Book {
    page: &'static [AtomicU64],
    /// Slots nobody uses.
    free: Vec<usize>,
    /// Words outside the page.
    own: Vec<Arc<[AtomicU64]>>,
}

static BOOK: LazyLock<Mutex<Book>> = LazyLock::new(|| {
    // Where it cannot be shown it is still counted.
    let page = published(NAME, WORDS).unwrap_or_else(|_| Box::leak(zeroed(WORDS)));
    page[head::VERSION].store(VERSION, Ordering::Relaxed);
    page[head::PID].store(u64::from(std::process::id()), Ordering::Relaxed);
    page[head::WORDS].store(WORDS as u64, Ordering::Relaxed);
    page[head::MAGIC].store(MAGIC, Ordering::Release);
    Mutex::new(Book { page, free: (1..SLOTS).rev().collect(), own: Vec::new() })
});

fn zeroed(words: usize) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

impl Book {
    fn slot(&self, index: usize) -> &'static [AtomicU64] {
        &self.page[HEAD + index * SLOT..][..SLOT]
    }

    fn take(&mut self) -> Words {
        match self.free.pop() {
            Some(index) => Words::Shown(index, self.slot(index)),
            None => {
                let words: Arc<[AtomicU64]> = zeroed(SLOT).into();
                self.own.push(Arc::clone(&words));
                Words::Own(words)
            }
        }
    }

    /// What an ended communicator counted goes to the first slot, so that sums never shrink.
    fn give_back(&mut self, words: &Words) {
        let ended = self.slot(0);
        for (sum, own) in ended[SLOT_HEAD..].iter().zip(&words.get()[SLOT_HEAD..]) {
            let n = own.swap(0, Ordering::Relaxed);
            if n > 0 {
                sum.fetch_add(n, Ordering::Relaxed);
            }
        }
        ended[slot::ENDED].fetch_add(1, Ordering::Relaxed);
        for word in &words.get()[..SLOT_HEAD] {
            word.store(0, Ordering::Relaxed);
        }
        match words {
            Words::Shown(index, _) => self.free.push(*index),
            Words::Own(words) => self.own.retain(|own| !Arc::ptr_eq(own, words)),
        }
    }
}

/// Calls and bytes of one communicator by route, reason and size.
pub struct Counters {
    words: Words,
}

impl Counters {
    /// All zero. Makes the process's memory of counters at the first one.
    pub fn new() -> Self {
        let words = BOOK.lock().take();
        words.get()[slot::STANDING].store(Standing::New as u64, Ordering::Relaxed);
        Self { words }
    }

    fn add(&self, row: usize, bytes: u64) {
        let cell = self.cell(row, bytes);
        cell[0].fetch_add(1, Ordering::Relaxed);
        cell[1].fetch_add(bytes, Ordering::Relaxed);
    }

    fn cell(&self, row: usize, bytes: u64) -> &[AtomicU64] {
        &self.words.get()[SLOT_HEAD + (row * BUCKETS + bucket(bytes)) * CELL..][..CELL]
    }

    /// What one call of a row took on the device.
    pub fn timed(&self, row: usize, bytes: u64, nanoseconds: u64) {
        let cell = self.cell(row, bytes);
        cell[2].fetch_add(1, Ordering::Relaxed);
        cell[3].fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// One call of our kernel.
    pub fn routed(&self, algorithm: Algorithm, bytes: u64) {
        self.add(row_of(algorithm), bytes);
    }

    /// One call left to stock.
    pub fn stock(&self, reason: Reason, bytes: u64) {
        self.add(row_of_stock(reason), bytes);
    }

    /// Whose they are, once it is known.
    pub fn identify(&self, device: i32, rank: u32, ranks: u32) {
        let words = self.words.get();
        words[slot::DEVICE].store(u64::try_from(device).unwrap_or(0), Ordering::Relaxed);
        words[slot::RANK].store(u64::from(rank), Ordering::Relaxed);
        words[slot::RANKS].store(u64::from(ranks), Ordering::Relaxed);
    }

    /// What came of its set-up.
    pub fn stands(&self, standing: Standing, decline: Option<Decline>) {
        let words = self.words.get();
        words[slot::DECLINE].store(decline.map_or(0, |decline| decline as u64), Ordering::Relaxed);
        words[slot::STANDING].store(standing as u64, Ordering::Relaxed);
    }

    fn row(&self, row: usize) -> (u64, u64) {
        sums(&self.words.get()[SLOT_HEAD..][row * BUCKETS * CELL..][..BUCKETS * CELL])
    }

    /// Calls routed and calls left to stock.
    pub fn totals(&self) -> (u64, u64) {
        totals(self.words.get())
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        BOOK.lock().give_back(&self.words);
    }
}

/// Calls and bytes of some cells.
fn sums(cells: &[AtomicU64]) -> (u64, u64) {
    let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
    cells.chunks_exact(CELL).fold((0, 0), |sum, cell| (sum.0 + load(&cell[0]), sum.1 + load(&cell[1])))
}

/// Calls routed and calls left to stock of one slot.
fn totals(slot: &[AtomicU64]) -> (u64, u64) {
    const ROUTED: usize = Algorithm::ALL.len() * BUCKETS * CELL;
    const _: () = assert!(ROUTED < TABLE && ROWS > Algorithm::ALL.len());
    let (routed, stock) = slot[SLOT_HEAD..].split_at(ROUTED);
    (sums(routed).0, sums(stock).0)
}

/// Calls routed and calls left to stock of all communicators that there are and were.
pub fn process() -> (u64, u64) {
    let book = BOOK.lock();
    let shown = (0..SLOTS).map(|index| totals(book.slot(index)));
    let own = book.own.iter().map(|words| totals(words));
    shown.chain(own).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// What a reader would see now.
pub fn snapshot() -> Result<Snapshot, String> {
    let words: Vec<_> = BOOK.lock().page.iter().map(|word| word.load(Ordering::Relaxed)).collect();
    Snapshot::of(&words)
}

impl std::fmt::Display for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut bytes = 0;
        for algorithm in Algorithm::ALL {
            let (calls, more) = self.row(row_of(algorithm));
            bytes += more;
            // Not everybody has the switch's sums, or a ring.
            if matches!(algorithm, Algorithm::OneShot | Algorithm::TwoShot) || calls > 0 {
                write!(f, "{} {calls}, ", algorithm.name())?;
            }
        }
        write!(f, "stock {}", self.totals().1)?;
        for reason in Reason::ALL {
            let (calls, _) = self.row(row_of_stock(reason));
            if calls > 0 {
                write!(f, " {}={calls}", reason.name())?;
            }
        }
        write!(f, "; {} routed", crate::stats::bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_counted_once_under_its_route() {
        let counters = Counters::new();
        counters.routed(Algorithm::TwoShot, 3 << 20);
        for reason in Reason::ALL {
            counters.stock(reason, 5);
        }
        assert_eq!(counters.totals(), (1, Reason::ALL.len() as u64));
        let text = counters.to_string();
        assert!(text.starts_with("oneshot 0, twoshot 1, stock 7 empty=1 type=1"), "{text}");
        assert!(text.ends_with("; 3 MiB routed"), "{text}");
        counters.routed(Algorithm::Switch, 5 << 20);
        assert_eq!(counters.totals(), (2, Reason::ALL.len() as u64));
        let text = counters.to_string();
        assert!(
            text.starts_with("oneshot 0, twoshot 1, switch 1, stock 7") && text.ends_with("8 MiB routed"),
            "{text}"
        );
    }

    /// The only test here that reads sums of the whole process: its communicators have ranks of their own.
    #[test]
    fn communicators_beyond_the_page_count_too_and_what_ended_stays_in_the_sum() {
        const MANY: u32 = 200;
        let all: Vec<_> = (0..MANY).map(|_| Counters::new()).collect();
        for (rank, counters) in (0..).zip(&all) {
            counters.identify(0, rank, MANY);
            counters.stands(Standing::Off, Some(Decline::NoNvlink));
            counters.routed(Algorithm::OneShot, u64::from(rank));
        }
        assert!(process().0 >= u64::from(MANY));
        let seen = snapshot().expect("its own layout");
        let ours: Vec<_> = seen.communicators.iter().filter(|one| one.ranks == Some(u64::from(MANY))).collect();
        assert!(ours.len() > 50 && ours.len() < SLOTS, "{}", ours.len());
        for one in ours {
            assert_eq!(
                (one.standing, one.reason, one.ways[0].bytes),
                (Standing::Off, Some("no-nvlink"), one.rank.unwrap())
            );
        }
        drop(all);
        assert!(process().0 >= u64::from(MANY), "sums never shrink");
        let seen = snapshot().expect("its own layout");
        assert!(seen.ended >= u64::from(MANY));
        assert!(seen.communicators.iter().all(|one| one.ranks != Some(u64::from(MANY))));
    }
}
