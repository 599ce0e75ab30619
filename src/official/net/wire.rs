//! What the two ends of a connection tell each other while data moves: frames of one size over TCP, without ever
//! blocking.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use crate::error::{Error, Result};

/// Bytes of a frame.
const FRAME: usize = 40;
/// No slot: a message without bytes.
pub const NO_SLOT: u32 = u32::MAX;

/// One message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Frame {
    /// The receiver waits for a message: which of its receives, which buffer of it, the tag and the room there is.
    Post {
        /// Number of the receive.
        seq: u32,
        /// Buffer of a grouped receive.
        index: u32,
        /// The tag.
        tag: i32,
        /// Bytes of the buffer.
        size: u64,
    },
    /// A piece of a message lies in a slot of the window.
    Data {
        /// Number of the receive.
        seq: u32,
        /// Its buffer.
        index: u32,
        /// The slot, or [`NO_SLOT`].
        slot: u32,
        /// Where the piece belongs in the message.
        offset: u64,
        /// Bytes of the piece.
        bytes: u32,
        /// Bytes of the message.
        total: u64,
    },
    /// The receiver has taken what lay in a slot.
    Credit {
        /// The slot.
        slot: u32,
    },
}

impl Frame {
    fn encode(&self) -> [u8; FRAME] {
        let (kind, small, large) = match *self {
            Self::Post { seq, index, tag, size } => (1u32, [seq, index, tag as u32, 0], [size, 0]),
            Self::Data { seq, index, slot, offset, bytes, total } => (2, [seq, index, slot, bytes], [offset, total]),
            Self::Credit { slot } => (3, [slot, 0, 0, 0], [0, 0]),
        };
        let mut out = [0; FRAME];
        out[..4].copy_from_slice(&kind.to_le_bytes());
        for (i, n) in small.iter().enumerate() {
            out[4 + 4 * i..8 + 4 * i].copy_from_slice(&n.to_le_bytes());
        }
        for (i, n) in large.iter().enumerate() {
            out[24 + 8 * i..32 + 8 * i].copy_from_slice(&n.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8; FRAME]) -> Option<Self> {
        let small = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let large = |i: usize| u64::from(small(i)) | u64::from(small(i + 4)) << 32;
        match small(0) {
            1 => Some(Self::Post { seq: small(4), index: small(8), tag: small(12) as i32, size: large(24) }),
            2 => Some(Self::Data {
                seq: small(4),
                index: small(8),
                slot: small(12),
                bytes: small(16),
                offset: large(24),
                total: large(32),
            }),
            3 => Some(Self::Credit { slot: small(4) }),
            _ => None,
        }
    }
}

/// The connection, after it was set up.
pub struct Pipe {
    socket: TcpStream,
    output: VecDeque<u8>,
    input: [u8; FRAME * 64],
    read: usize,
    taken: usize,
}

impl Pipe {
    /// From now on nothing blocks.
    pub fn new(socket: TcpStream) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, output: VecDeque::with_capacity(FRAME * 1024), input: [0; FRAME * 64], read: 0, taken: 0 })
    }

    /// Queues a frame.
    pub fn put(&mut self, frame: &Frame) {
        self.output.extend(frame.encode());
    }

    /// Hands queued bytes to the system; whether none is left.
    pub fn flush(&mut self) -> Result<bool> {
        while !self.output.is_empty() {
            match self.socket.write(self.output.as_slices().0) {
                Ok(0) => return Err(gone()),
                Ok(n) => drop(self.output.drain(..n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(gone()),
            }
        }
        Ok(true)
    }

    /// The next frame, if a whole one has come.
    pub fn get(&mut self) -> Result<Option<Frame>> {
        if self.read - self.taken < FRAME {
            self.input.copy_within(self.taken..self.read, 0);
            (self.read, self.taken) = (self.read - self.taken, 0);
            match self.socket.read(&mut self.input[self.read..]) {
                Ok(0) => return Err(gone()),
                Ok(n) => self.read += n,
                Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
                Err(_) => return Err(gone()),
            }
        }
        let Some(bytes) = self.input[self.taken..self.read].first_chunk::<FRAME>() else { return Ok(None) };
        let frame = Frame::decode(bytes).ok_or(Error::Protocol("a frame that is none"))?;
        self.taken += FRAME;
        Ok(Some(frame))
    }

    /// Whether the peer has closed its end and said nothing more before.
    pub fn ended(&mut self) -> bool {
        loop {
            match self.get() {
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }

    /// Tells the peer that this end is done.
    pub fn shut(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }
}

fn gone() -> Error {
    Error::Peer { rank: u32::MAX, step: "the other end of a connection is gone" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;

    fn frame() -> impl Strategy<Value = Frame> {
        prop_oneof![
            (any::<u32>(), any::<u32>(), any::<i32>(), any::<u64>()).prop_map(|(seq, index, tag, size)| Frame::Post {
                seq,
                index,
                tag,
                size
            }),
            (any::<[u32; 4]>(), any::<u64>(), any::<u64>()).prop_map(|([seq, index, slot, bytes], offset, total)| {
                Frame::Data { seq, index, slot, offset, bytes, total }
            }),
            any::<u32>().prop_map(|slot| Frame::Credit { slot }),
        ]
    }

    fn pipes() -> (Pipe, Pipe) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a socket");
        let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("connected");
        let (far, _) = listener.accept().expect("accepted");
        (Pipe::new(near).expect("a pipe"), Pipe::new(far).expect("a pipe"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn frames_arrive_whole_and_in_order_and_then_the_end(frames in prop::collection::vec(frame(), 0..300)) {
            let (mut near, mut far) = pipes();
            frames.iter().for_each(|frame| near.put(frame));
            let mut got = Vec::new();
            while got.len() < frames.len() {
                near.flush().expect("the peer is there");
                got.extend(far.get().expect("a frame"));
            }
            prop_assert_eq!(&got, &frames);
            prop_assert!(near.flush().expect("all gone"));
            prop_assert!(!far.ended());
            near.shut();
            while !far.ended() {}
            prop_assert!(far.get().is_err());
        }
    }

    #[test]
    fn bytes_that_are_no_frame_are_refused() {
        let (near, mut far) = pipes();
        (&near.socket).write_all(&[9; FRAME]).expect("sent");
        let error = loop {
            match far.get() {
                Ok(None) => {}
                Ok(Some(frame)) => panic!("{frame:?}"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Protocol(_)), "{error}");
    }
}
