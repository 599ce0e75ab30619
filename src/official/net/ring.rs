//! Frames between two processes of a host, through memory that both map: a queue in each direction, one writer and one
//! reader each. A frame costs no system call; what the other side stores is checked before it is believed.
#![forbid(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::wire::FRAME;
use crate::driver::SharedWords;
use crate::error::{Error, Result};

/// Frames that a queue holds.
pub const FRAMES: u64 = 512;
const WORDS: usize = FRAME / 8;
/// Words that are written by one side and looked at by the other lie this far apart.
const APART: usize = 16;
const QUEUE: usize = 2 * APART + FRAMES as usize * WORDS;
const ALL: usize = 2 * QUEUE;

/// One end.
pub struct Ring {
    shared: SharedWords,
    /// First words of the queues that this end writes to and reads from.
    to: usize,
    from: usize,
    written: u64,
    /// As far as the other side is known to have read.
    taken: u64,
    read: u64,
}

impl Ring {
    /// The first end, and the descriptor by which the second one is opened.
    pub fn create() -> Result<(Self, OwnedFd)> {
        let created = SharedWords::create("twoshot-frames", ALL);
        let (shared, fd) = created.map_err(super::super::bootstrap::system("memory for frames"))?;
        Ok((Self { shared, to: 0, from: QUEUE, written: 0, taken: 0, read: 0 }, fd))
    }

    /// The second end.
    pub fn open(fd: BorrowedFd<'_>) -> Result<Self> {
        let shared = SharedWords::open(fd, ALL).map_err(super::super::bootstrap::system("memory for frames"))?;
        Ok(Self { shared, to: QUEUE, from: 0, written: 0, taken: 0, read: 0 })
    }

    /// Writes a frame; whether there was room.
    pub fn push(&mut self, frame: &[u8; FRAME]) -> Result<bool> {
        let words = self.shared.words();
        if self.written - self.taken == FRAMES {
            let taken = words[self.to + APART].load(Acquire);
            if self.written.checked_sub(taken).is_none_or(|open| open > FRAMES) {
                return Err(Error::Protocol("a queue that was read beyond its end"));
            }
            self.taken = taken;
            if self.written - taken == FRAMES {
                return Ok(false);
            }
        }
        let at = self.to + 2 * APART + (self.written % FRAMES) as usize * WORDS;
        for (word, bytes) in words[at..at + WORDS].iter().zip(frame.as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*bytes), Relaxed);
        }
        self.written += 1;
        words[self.to].store(self.written, Release);
        Ok(true)
    }

    /// The next frame.
    pub fn pop(&mut self) -> Result<Option<[u8; FRAME]>> {
        let words = self.shared.words();
        match words[self.from].load(Acquire).checked_sub(self.read) {
            Some(0) => return Ok(None),
            Some(open) if open <= FRAMES => {}
            _ => return Err(Error::Protocol("a queue that was written beyond its end")),
        }
        let at = self.from + 2 * APART + (self.read % FRAMES) as usize * WORDS;
        let mut frame = [0; FRAME];
        for (bytes, word) in frame.as_chunks_mut::<8>().0.iter_mut().zip(&words[at..at + WORDS]) {
            *bytes = word.load(Relaxed).to_le_bytes();
        }
        self.read += 1;
        words[self.from + APART].store(self.read, Release);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn ends() -> (Ring, Ring) {
        let (near, fd) = Ring::create().expect("memory");
        let far = Ring::open(fd.as_fd()).expect("opens");
        (near, far)
    }

    fn frame(n: u64) -> [u8; FRAME] {
        std::array::from_fn(|i| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (i % 57)) as u8)
    }

    #[test]
    fn two_threads_pass_frames_both_ways_whole_and_in_order() {
        const MANY: u64 = 20_000;
        let work = |mut ring: Ring, seed: u64, other: u64| {
            let (mut sent, mut got) = (0, 0);
            while sent < MANY || got < MANY {
                if sent < MANY && ring.push(&frame(seed + sent)).expect("a sound queue") {
                    sent += 1;
                }
                if let Some(bytes) = ring.pop().expect("a sound queue") {
                    assert_eq!(bytes, frame(other + got));
                    got += 1;
                }
                if got == MANY || sent == MANY {
                    std::thread::yield_now();
                }
            }
        };
        let (near, far) = ends();
        std::thread::scope(|scope| {
            scope.spawn(|| work(near, 1, 1 << 40));
            scope.spawn(|| work(far, 1 << 40, 1));
        });
    }

    #[test]
    fn a_full_queue_says_so_and_a_queue_that_makes_no_sense_is_refused() {
        let (mut near, mut far) = ends();
        for n in 0..FRAMES {
            assert!(near.push(&frame(n)).expect("room"));
        }
        assert!(!near.push(&frame(9)).expect("full"));
        assert_eq!(far.pop().expect("a frame"), Some(frame(0)));
        assert!(near.push(&frame(FRAMES)).expect("room again"));
        // As a broken or hostile process could leave it.
        near.shared.words()[near.to].store(FRAMES * 9, Release);
        assert!(far.pop().is_err());
        far.shared.words()[far.from + APART].store(u64::MAX, Release);
        assert!(near.push(&frame(1)).is_err());
    }
}
