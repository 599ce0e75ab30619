//! The way of frames between the two ends of a connection, which never blocks: TCP, and on one host a [`Ring`] with TCP
//! beside it, by which an end learns that the other one is gone.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use super::ring::Ring;
use super::wire::{FRAME, Frame};
use crate::error::{Error, Result};

/// Frames that are read at once.
const AT_ONCE: usize = 64;
/// How often a [`Ring`]'s end looks whether the other one is there: every so many questions that found nothing.
const LOOK: u32 = 64;
/// How often frames that can wait are held back, and how many.
const HELD: u32 = 4;
const HELD_FRAMES: usize = 8;

/// One end.
pub struct Pipe {
    socket: TcpStream,
    ring: Option<Ring>,
    /// What found no room in the ring.
    queue: VecDeque<Frame>,
    /// What the system has not taken yet: `output[sent..]`.
    output: Vec<u8>,
    sent: usize,
    held: u32,
    input: Box<[u8; FRAME * AT_ONCE]>,
    read: usize,
    taken: usize,
    idle: u32,
}

impl Pipe {
    /// From now on nothing blocks.
    pub fn new(socket: TcpStream, ring: Option<Ring>) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        let frames = if ring.is_some() { 0 } else { 1024 };
        let (queue, output) = (VecDeque::with_capacity(1024 - frames), Vec::with_capacity(FRAME * frames));
        let input = Box::new([0; FRAME * AT_ONCE]);
        Ok(Self { socket, ring, queue, output, sent: 0, held: 0, input, read: 0, taken: 0, idle: 0 })
    }

    /// Queues a frame.
    pub fn put(&mut self, frame: &Frame) -> Result<()> {
        match &mut self.ring {
            Some(ring) => {
                if !self.queue.is_empty() || !ring.push(&frame.encode())? {
                    self.queue.push_back(*frame);
                }
            }
            None => self.output.extend_from_slice(&frame.encode()),
        }
        Ok(())
    }

    /// Hands queued frames on; whether none is left.
    pub fn flush(&mut self) -> Result<bool> {
        self.held = 0;
        if let Some(ring) = &mut self.ring {
            while let Some(frame) = self.queue.front() {
                if !ring.push(&frame.encode())? {
                    return Ok(false);
                }
                self.queue.pop_front();
            }
            return Ok(true);
        }
        while self.sent < self.output.len() {
            match self.socket.write(&self.output[self.sent..]) {
                Ok(0) => return Err(gone()),
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(gone()),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(true)
    }

    /// Hands queued frames on that the other end can do without for a moment: a few at once, for one system call.
    pub fn flush_lazily(&mut self) -> Result<()> {
        if self.output.is_empty() && self.queue.is_empty() {
            return Ok(());
        }
        self.held += 1;
        if self.ring.is_some() || self.held > HELD || self.output.len() - self.sent >= HELD_FRAMES * FRAME {
            self.flush()?;
        }
        Ok(())
    }

    /// Takes in what has come, for [`Self::get`]. An error: nothing more will come behind that.
    pub fn fill(&mut self) -> Result<()> {
        if self.ring.is_some() {
            self.idle += 1;
            return if self.idle < LOOK { Ok(()) } else { self.look() };
        }
        self.input.copy_within(self.taken..self.read, 0);
        (self.read, self.taken) = (self.read - self.taken, 0);
        while self.read < self.input.len() {
            let room = self.input.len() - self.read;
            match self.socket.read(&mut self.input[self.read..]) {
                Ok(0) => return Err(gone()),
                Ok(n) => {
                    self.read += n;
                    // Less than there was room for: that was all.
                    if n < room {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(gone()),
            }
        }
        Ok(())
    }

    /// Whether the other end of a ring is still there.
    fn look(&mut self) -> Result<()> {
        self.idle = 0;
        match self.socket.read(&mut [0]) {
            Ok(0) => Err(gone()),
            Ok(_) => Err(Error::Protocol("bytes where none were expected")),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => Ok(()),
            Err(_) => Err(gone()),
        }
    }

    /// The next frame of those that [`Self::fill`] took in.
    pub fn get(&mut self) -> Result<Option<Frame>> {
        let frame = match &mut self.ring {
            Some(ring) => match ring.pop()? {
                Some(bytes) => {
                    self.idle = 0;
                    Frame::decode(&bytes)
                }
                None => return Ok(None),
            },
            None => {
                let Some(bytes) = self.input[self.taken..self.read].first_chunk::<FRAME>() else { return Ok(None) };
                self.taken += FRAME;
                Frame::decode(bytes)
            }
        };
        frame.map(Some).ok_or(Error::Protocol("a frame that is none"))
    }

    /// Whether the other end is closed; what it said before is dropped.
    pub fn ended(&mut self) -> bool {
        loop {
            let filled = if self.ring.is_some() { self.look() } else { self.fill() };
            let more = self.read == self.input.len();
            self.taken = self.read;
            match filled {
                Err(Error::Peer { .. }) => return true,
                Ok(()) if more => {}
                Ok(()) | Err(_) => return false,
            }
        }
    }

    /// Tells the peer that this end is done.
    pub fn shut(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn gone() -> Error {
    Error::Peer { rank: u32::MAX, step: "the other end of a connection is gone" }
}

#[cfg(test)]
mod tests {
    use super::super::wire::tests::frame;
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;

    fn pipes(ring: bool) -> (Pipe, Pipe) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a socket");
        let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("connected");
        let (far, _) = listener.accept().expect("accepted");
        let (first, second) = if ring {
            let (first, fd) = Ring::create().expect("memory");
            (Some(first), Some(Ring::open(fd.as_fd()).expect("opens")))
        } else {
            (None, None)
        };
        (Pipe::new(near, first).expect("a pipe"), Pipe::new(far, second).expect("a pipe"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn frames_arrive_whole_and_in_order_and_then_the_end(frames in prop::collection::vec(frame(), 0..1300), ring: bool, lazy: bool) {
            let (mut near, mut far) = pipes(ring);
            frames.iter().for_each(|frame| near.put(frame).expect("queued"));
            let mut got = Vec::new();
            while got.len() < frames.len() {
                if lazy { near.flush_lazily() } else { near.flush().map(drop) }.expect("the peer is there");
                far.fill().expect("the peer is there");
                while let Some(frame) = far.get().expect("a frame") {
                    got.push(frame);
                }
            }
            prop_assert!(got == frames, "{} frames", got.len());
            prop_assert!(near.flush().expect("all gone"));
            prop_assert!(!far.ended());
            near.shut();
            while !far.ended() {}
        }

        #[test]
        fn what_was_said_before_the_end_is_heard(frames in prop::collection::vec(frame(), 1..200), ring: bool) {
            let (mut near, mut far) = pipes(ring);
            frames.iter().for_each(|frame| near.put(frame).expect("queued"));
            prop_assert!(near.flush().expect("the peer is there"));
            drop(near);
            let mut got = Vec::new();
            loop {
                let ended = far.fill().is_err();
                while let Some(frame) = far.get().expect("a frame") {
                    got.push(frame);
                }
                if ended {
                    break;
                }
            }
            prop_assert!(got == frames, "{} frames", got.len());
        }
    }

    #[test]
    fn bytes_that_are_no_frame_are_refused() {
        for ring in [false, true] {
            let (mut near, mut far) = pipes(ring);
            match &mut near.ring {
                Some(ring) => assert!(ring.push(&[9; FRAME]).expect("room")),
                None => near.socket.write_all(&[9; FRAME]).expect("sent"),
            }
            let error = loop {
                far.fill().expect("the peer is there");
                match far.get() {
                    Ok(None) => {}
                    Ok(Some(frame)) => panic!("{frame:?}"),
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, Error::Protocol(_)), "{error}");
        }
    }

    #[test]
    fn a_stranger_that_talks_beside_the_ring_is_noticed() {
        let (near, mut far) = pipes(true);
        (&near.socket).write_all(&[1]).expect("sent");
        let mut errors = (0..100_000).map(|_| far.fill()).filter_map(Result::err);
        assert!(matches!(errors.next(), Some(Error::Protocol(_))));
    }
}
