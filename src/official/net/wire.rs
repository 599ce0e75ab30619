//! What the two ends of a connection tell each other while data moves: frames of one size. Pure.
#![forbid(unsafe_code)]

/// Bytes of a frame.
pub const FRAME: usize = 96;
/// No slot.
pub const NO_SLOT: u32 = u32::MAX;
/// No memory: the window's.
pub const NO_MEMORY: u32 = 0;

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
        /// The memory that the buffer lies in, or [`NO_MEMORY`].
        memory: u32,
        /// Where in it.
        at: u64,
    },
    /// A piece of a message lies in a slot of the window.
    Data {
        /// Number of the receive.
        seq: u32,
        /// Its buffer.
        index: u32,
        /// The slot, or [`NO_SLOT`] for a message without bytes.
        slot: u32,
        /// Where the piece belongs in the message.
        offset: u64,
        /// Bytes of the piece.
        bytes: u32,
        /// Bytes of the message.
        total: u64,
    },
    /// All of a message lies in its buffer.
    Direct {
        /// Number of the receive.
        seq: u32,
        /// Its buffer.
        index: u32,
        /// Bytes of the message.
        total: u64,
    },
    /// The receiver has taken what lay in a slot.
    Credit {
        /// The slot.
        slot: u32,
    },
    /// Memory that the sender may write to: its number, its size, and its name where it goes by name.
    Memory {
        /// Its number, never [`NO_MEMORY`] and never used again.
        id: u32,
        /// Bytes.
        bytes: u64,
        /// Fabric handle.
        name: [u8; 64],
    },
    /// The sender may not write to it any more.
    Forget {
        /// Its number.
        id: u32,
    },
    /// The sender has let go of it.
    Forgotten {
        /// Its number.
        id: u32,
    },
}

impl Frame {
    /// As bytes.
    pub fn encode(&self) -> [u8; FRAME] {
        let (kind, small, large) = match *self {
            Self::Post { seq, index, tag, size, memory, at } => (1u32, [seq, index, tag as u32, memory], [size, at]),
            Self::Data { seq, index, slot, offset, bytes, total } => (2, [seq, index, slot, bytes], [offset, total]),
            Self::Credit { slot } => (3, [slot, 0, 0, 0], [0, 0]),
            Self::Direct { seq, index, total } => (4, [seq, index, 0, 0], [total, 0]),
            Self::Memory { id, bytes, .. } => (5, [id, 0, 0, 0], [bytes, 0]),
            Self::Forget { id } => (6, [id, 0, 0, 0], [0, 0]),
            Self::Forgotten { id } => (7, [id, 0, 0, 0], [0, 0]),
        };
        let mut out = [0; FRAME];
        out[..4].copy_from_slice(&kind.to_le_bytes());
        for (i, n) in small.iter().enumerate() {
            out[4 + 4 * i..8 + 4 * i].copy_from_slice(&n.to_le_bytes());
        }
        if let Self::Memory { name, .. } = self {
            out[32..].copy_from_slice(name);
            out[24..32].copy_from_slice(&large[0].to_le_bytes());
        } else {
            for (i, n) in large.iter().enumerate() {
                out[24 + 8 * i..32 + 8 * i].copy_from_slice(&n.to_le_bytes());
            }
        }
        out
    }

    /// From bytes; `None` where they are none.
    pub fn decode(bytes: &[u8; FRAME]) -> Option<Self> {
        let small = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let large = |i: usize| u64::from(small(i)) | u64::from(small(i + 4)) << 32;
        match small(0) {
            1 => Some(Self::Post {
                seq: small(4),
                index: small(8),
                tag: small(12) as i32,
                memory: small(16),
                size: large(24),
                at: large(32),
            }),
            2 => Some(Self::Data {
                seq: small(4),
                index: small(8),
                slot: small(12),
                bytes: small(16),
                offset: large(24),
                total: large(32),
            }),
            3 => Some(Self::Credit { slot: small(4) }),
            4 => Some(Self::Direct { seq: small(4), index: small(8), total: large(24) }),
            5 => Some(Self::Memory { id: small(4), bytes: large(24), name: bytes[32..].try_into().ok()? }),
            6 => Some(Self::Forget { id: small(4) }),
            7 => Some(Self::Forgotten { id: small(4) }),
            _ => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any frame.
    pub fn frame() -> impl Strategy<Value = Frame> {
        prop_oneof![
            (any::<[u32; 3]>(), any::<i32>(), any::<[u64; 2]>())
                .prop_map(|([seq, index, memory], tag, [size, at])| Frame::Post { seq, index, tag, size, memory, at }),
            (any::<[u32; 4]>(), any::<[u64; 2]>()).prop_map(|([seq, index, slot, bytes], [offset, total])| {
                Frame::Data { seq, index, slot, offset, bytes, total }
            }),
            any::<u32>().prop_map(|slot| Frame::Credit { slot }),
            (any::<[u32; 2]>(), any::<u64>()).prop_map(|([seq, index], total)| Frame::Direct { seq, index, total }),
            (any::<u32>(), any::<u64>(), any::<[u8; 32]>()).prop_map(|(id, bytes, half)| {
                let mut name = [0; 64];
                name[16..48].copy_from_slice(&half);
                Frame::Memory { id, bytes, name }
            }),
            any::<u32>().prop_map(|id| Frame::Forget { id }),
            any::<u32>().prop_map(|id| Frame::Forgotten { id }),
        ]
    }

    proptest! {
        #[test]
        fn a_frame_comes_back_as_it_was_and_no_bytes_make_the_reader_panic(frame in frame(), noise in prop::collection::vec(any::<u8>(), FRAME)) {
            prop_assert_eq!(Frame::decode(&frame.encode()), Some(frame));
            let noise: [u8; FRAME] = noise.try_into().unwrap();
            if let Some(read) = Frame::decode(&noise) {
                prop_assert_eq!(Frame::decode(&read.encode()), Some(read));
            }
        }
    }
}
