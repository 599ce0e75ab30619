//! The blobs that ranks exchange during set-up: fixed size, magic, version, checksum. Everything that arrives is
//! distrusted.
#![forbid(unsafe_code)]

use crate::decline::Decline;
use crate::driver::{FabricFacts, MOST_OBJECTS};

/// Bytes of one blob.
pub const BLOB: usize = 320;
/// One blob.
pub type Blob = [u8; BLOB];

/// More than any driver's granularity.
const MOST_GRANULARITY: u64 = 1 << 40;
const MAGIC: u32 = 0x544f_5753;
/// Raised whenever the meaning of a blob or the kernels' protocol changes.
const PROTOCOL: u32 = 6;

/// The facts of a rank, exchanged first.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Facts {
    /// Ranks of the communicator as this rank sees it.
    pub ranks: u32,
    /// This rank.
    pub rank: u32,
    /// Why this rank declines, if it does, and a code that explains it.
    pub declined: Option<(Decline, i32)>,
    /// Digest of the settings that must agree.
    pub config: u64,
    /// Digest of the library's version.
    pub build: u64,
    /// The tuning file: 0 none, 1 one that cannot be used, else its digest.
    pub tuning: u64,
    /// Minor release of stock NCCL.
    pub nccl: u32,
    /// Deadline of one of its steps, in milliseconds.
    pub deadline_ms: u32,
    /// Digest of the calls that lead to twoshot; 0 where all do.
    pub bound: u64,
    /// Identity of the host.
    pub host: [u8; 16],
    /// Identity of the process, random.
    pub process: [u8; 16],
    /// GPU UUID.
    pub gpu: [u8; 16],
    /// PCI bus id.
    pub bus_id: [u8; 16],
    /// Compute capability, `major * 10 + minor`.
    pub arch: u32,
    /// Most blocks this rank can keep resident, or is allowed to use.
    pub blocks: u32,
    /// Virtual memory management.
    pub vmm: bool,
    /// Descriptors can be exported.
    pub fd_handles: bool,
    /// Fabric handles can be exported, says the device.
    pub fabric_handles: bool,
    /// Multicast is possible and wanted.
    pub multicast: bool,
    /// The switch may make sums.
    pub switch_reduce: bool,
    /// Host-spanning communicators may use the fabric.
    pub mnnvl: bool,
    /// Several ranks may share this GPU.
    pub shared_gpu: bool,
    /// Its user, or the communicator's configuration, chose the blocks.
    pub chosen_blocks: bool,
    /// It has seen all operations that were made for this communicator.
    pub operations: bool,
    /// The fabric.
    pub fabric: FabricFacts,
}

/// A multicast object that a rank knows, and which of its parts it holds free.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Offer {
    /// Random identity of the object; 0 is none.
    pub id: u64,
    /// A bit for each free part.
    pub free: u32,
}

/// The outcome of a later step, with what the next one needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Step {
    /// Which step; all ranks must be in the same one.
    pub number: u8,
    /// This rank.
    pub rank: u32,
    /// Why this rank declines, if it does.
    pub declined: Option<(Decline, i32)>,
    /// Name of the descriptor socket, random.
    pub socket: [u8; 16],
    /// What a peer must say to be given a descriptor, random.
    pub token: [u8; 16],
    /// A fabric handle, or zeros.
    pub fabric: [u8; 64],
    /// Granularity that this rank needs, in bytes.
    pub granularity: u64,
    /// Blocks this rank can keep resident at once.
    pub blocks: u32,
    /// Bytes that this rank's window may take.
    pub memory: u64,
    /// The step succeeded in an optional part (multicast); in the last one: this rank's communicator does not block.
    pub optional: bool,
    /// Multicast objects.
    pub offers: [Offer; MOST_OBJECTS],
}

impl Step {
    /// An outcome without attachments.
    pub fn new(number: u8, rank: u32) -> Self {
        Self {
            number,
            rank,
            declined: None,
            socket: [0; 16],
            token: [0; 16],
            fabric: [0; 64],
            granularity: 0,
            blocks: 0,
            memory: 0,
            optional: false,
            offers: [Offer::default(); MOST_OBJECTS],
        }
    }
}

struct Writer {
    blob: Blob,
    at: usize,
}

impl Writer {
    fn new(kind: u32) -> Self {
        let mut writer = Self { blob: [0; BLOB], at: 0 };
        writer.u32(MAGIC).u32(PROTOCOL).u32(kind);
        writer
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.blob[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }

    fn u32(&mut self, n: u32) -> &mut Self {
        self.bytes(&n.to_le_bytes())
    }

    fn u64(&mut self, n: u64) -> &mut Self {
        self.bytes(&n.to_le_bytes())
    }

    fn flag(&mut self, flag: bool) -> &mut Self {
        self.bytes(&[u8::from(flag)])
    }

    fn declined(&mut self, declined: Option<(Decline, i32)>) -> &mut Self {
        let (reason, code) = declined.map_or((0, 0), |(reason, code)| (reason as u8, code));
        self.bytes(&[reason]).bytes(&code.to_le_bytes())
    }

    fn done(&mut self) -> Blob {
        let sum = checksum(&self.blob[..BLOB - 8]);
        self.blob[BLOB - 8..].copy_from_slice(&sum.to_le_bytes());
        self.blob
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.take::<1>()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn declined(&mut self) -> Option<Option<(Decline, i32)>> {
        let [reason] = self.take::<1>()?;
        let code = i32::from_le_bytes(self.take()?);
        match reason {
            0 => Some(None),
            reason => Decline::from_code(reason).map(|reason| Some((reason, code))),
        }
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn open(blob: &Blob, kind: u32) -> Option<Reader<'_>> {
    let (body, sum) = blob.split_at(BLOB - 8);
    if checksum(body).to_le_bytes() != *sum {
        return None;
    }
    let mut reader = Reader(body);
    let header = (reader.u32()?, reader.u32()?, reader.u32()?);
    (header == (MAGIC, PROTOCOL, kind)).then_some(reader)
}

const FACTS: u32 = 1;
const STEP: u32 = 2;

impl Facts {
    /// As a blob.
    pub fn encode(&self) -> Blob {
        let mut writer = Writer::new(FACTS);
        writer.u32(self.ranks).u32(self.rank).declined(self.declined).u64(self.config).u64(self.build);
        writer.u64(self.tuning).u32(self.nccl).u32(self.deadline_ms).u64(self.bound);
        writer.bytes(&self.host).bytes(&self.process).bytes(&self.gpu).bytes(&self.bus_id);
        writer.u32(self.arch).u32(self.blocks);
        writer.flag(self.vmm).flag(self.fd_handles).flag(self.fabric_handles).flag(self.multicast);
        writer
            .flag(self.switch_reduce)
            .flag(self.mnnvl)
            .flag(self.shared_gpu)
            .flag(self.chosen_blocks)
            .flag(self.operations);
        writer.flag(self.fabric.completed).bytes(&self.fabric.uuid).u32(self.fabric.clique);
        writer.done()
    }

    /// From a blob, or `None` when it is not one of ours.
    pub fn decode(blob: &Blob) -> Option<Self> {
        let mut r = open(blob, FACTS)?;
        Some(Self {
            ranks: r.u32()?,
            rank: r.u32()?,
            declined: r.declined()?,
            config: r.u64()?,
            build: r.u64()?,
            tuning: r.u64()?,
            nccl: r.u32()?,
            deadline_ms: r.u32()?,
            bound: r.u64()?,
            host: r.take()?,
            process: r.take()?,
            gpu: r.take()?,
            bus_id: r.take()?,
            arch: r.u32()?,
            blocks: r.u32()?,
            vmm: r.flag()?,
            fd_handles: r.flag()?,
            fabric_handles: r.flag()?,
            multicast: r.flag()?,
            switch_reduce: r.flag()?,
            mnnvl: r.flag()?,
            shared_gpu: r.flag()?,
            chosen_blocks: r.flag()?,
            operations: r.flag()?,
            fabric: FabricFacts { completed: r.flag()?, uuid: r.take()?, clique: r.u32()? },
        })
    }
}

impl Step {
    /// As a blob.
    pub fn encode(&self) -> Blob {
        let mut writer = Writer::new(STEP);
        writer.bytes(&[self.number]).u32(self.rank).declined(self.declined);
        writer
            .bytes(&self.socket)
            .bytes(&self.token)
            .bytes(&self.fabric)
            .u64(self.granularity)
            .u32(self.blocks)
            .u64(self.memory)
            .flag(self.optional);
        for offer in &self.offers {
            writer.u64(offer.id).u32(offer.free);
        }
        writer.done()
    }

    /// From a blob, or `None` when it is not one of ours.
    pub fn decode(blob: &Blob) -> Option<Self> {
        let mut r = open(blob, STEP)?;
        let [number] = r.take()?;
        let mut step = Self {
            number,
            rank: r.u32()?,
            declined: r.declined()?,
            socket: r.take()?,
            token: r.take()?,
            fabric: r.take()?,
            granularity: r.u64()?,
            blocks: r.u32()?,
            memory: r.u64()?,
            optional: r.flag()?,
            offers: [Offer::default(); MOST_OBJECTS],
        };
        for offer in &mut step.offers {
            *offer = Offer { id: r.u64()?, free: r.u32()? };
        }
        // Windows are rounded up to it: beyond this it is no granularity but an attack on the sum.
        (step.granularity <= MOST_GRANULARITY).then_some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_blob_comes_back_as_it_was(rank: u32, config: u64, host: [u8; 16], flag: bool, code: i32) {
            let facts = Facts {
                rank, config, bound: !config, host, process: host, deadline_ms: rank, multicast: flag, operations: !flag, switch_reduce: !flag, declined: flag.then_some((Decline::Map, code)), ..Facts::default()
            };
            prop_assert_eq!(Facts::decode(&facts.encode()), Some(facts));
            let mut step = Step { declined: Some((Decline::Import, code)), socket: host, ..Step::new(3, rank) };
            step.offers[MOST_OBJECTS - 1] = Offer { id: config, free: rank };
            prop_assert_eq!(Step::decode(&step.encode()), Some(step));
            prop_assert_eq!(Step::decode(&facts.encode()), None);
        }

        #[test]
        fn a_flipped_bit_anywhere_is_noticed(at in 0..BLOB, bit in 0u32..8) {
            let mut blob = Facts::default().encode();
            blob[at] ^= 1u8 << bit;
            prop_assert_eq!(Facts::decode(&blob), None);
        }

        #[test]
        fn random_bytes_are_never_a_blob(bytes in prop::collection::vec(any::<u8>(), BLOB)) {
            let blob: Blob = bytes.try_into().unwrap();
            prop_assert_eq!(Facts::decode(&blob), None);
            prop_assert_eq!(Step::decode(&blob), None);
        }
    }
}
