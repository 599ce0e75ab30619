//! The cross-over table: up to which payload each algorithm is taken, and with how many blocks.
//!
//! Measured rows come from `benchmarks/` and name their source; every other world gets a row from the cost model,
//! marked as unmeasured, and the log line of a communicator says which it is. A tuning file replaces both.
#![forbid(unsafe_code)]

mod modelled;

/// What the table is asked: facts every rank of a communicator shares after the vote.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct World {
    /// Ranks of the communicator.
    pub ranks: u32,
    /// Compute capability, `major * 10 + minor`, the lowest of all ranks.
    pub arch: u32,
    /// Whether the windows are bound to a multicast object.
    pub multicast: bool,
    /// Hosts among the ranks.
    pub hosts: u32,
    /// Minor release of stock NCCL ([`crate::tuning::band`]), 0 where the ranks have different ones.
    pub nccl: u32,
}

/// One row: the payload limits in bytes and the block budget.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Row {
    /// Largest payload of one-shot.
    pub oneshot_bytes: u64,
    /// Largest payload of two-shot.
    pub twoshot_bytes: u64,
    /// Largest payload of what goes through the ring, above two-shot's; 0 for none. Above both the call is stock NCCL's.
    pub bulk_bytes: u64,
    /// Most blocks a launch takes.
    pub blocks: u32,
    /// The same for what goes through the ring.
    pub bulk_blocks: u32,
    /// Where the limits come from.
    pub source: Source,
}

/// Where a row comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Source {
    /// Measured with this library.
    Measured,
    /// Measured with the prototype of these kernels, with more blocks than are taken here.
    Prototype,
    /// Computed by [`crate::model`], which was fitted to the prototype's times.
    Model,
    /// The user's tuning file.
    File,
}

impl Source {
    /// The words in log lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Prototype => "prototype",
            Self::Model => "model, unmeasured world",
            Self::File => "tuning file",
        }
    }
}

/// A multiprocessor holds at least one block of 512 threads of these kernels, so four launches of this size are
/// resident at once on 132 multiprocessors. More blocks are faster (`TWOSHOT_MAX_BLOCKS`), but a program that overlaps
/// its AllReduce with computation misses the multiprocessors; stock NCCL takes 24.
const BLOCKS: u32 = 32;
/// The same for payloads up to [`crate::route::SMALL`], where a launch and the next one have the device to themselves.
pub const SMALL_BLOCKS: u32 = 64;

/// Blocks of what goes through the ring: as many as stock NCCL has channels on two H100, and faster than any other number
/// up to 32.
pub const BULK_BLOCKS: u32 = 24;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The row of a world. Total: every number of ranks gets an answer.
///
/// Two H100, unicast: `benchmarks/` and docs/performance.md. Four: the prototype's curves cross between 128 and 256 KiB;
/// the ring was not measured there.
pub fn row(world: World) -> Row {
    let hopper_unicast = world.arch / 10 == 9 && !world.multicast;
    let (oneshot_bytes, twoshot_bytes, bulk_bytes, source) = match world.ranks {
        2 if hopper_unicast => (MIB, 4 * MIB, 128 * MIB, Source::Measured),
        4 if hopper_unicast => (128 * KIB, 4 * MIB, 0, Source::Prototype),
        _ => return modelled::row(world),
    };
    Row { oneshot_bytes, twoshot_bytes, bulk_bytes, blocks: BLOCKS, bulk_blocks: BULK_BLOCKS, source }
}

/// The payloads from which and to which the model sees the switch's sums win, over two-shot and over stock NCCL; nothing
/// where it never does.
pub fn switch_limits(world: World) -> Option<(u64, u64)> {
    modelled::switch_limits(world)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_answers_for_every_world_and_oneshot_never_exceeds_twoshot() {
        for ranks in 0..=1024 {
            for arch in [80, 90, 100, 103, 120] {
                for multicast in [false, true] {
                    let row = row(World { ranks, arch, multicast, hosts: 1, nccl: 228 });
                    assert!(row.oneshot_bytes <= row.twoshot_bytes, "{ranks} {row:?}");
                    assert!(row.oneshot_bytes >= 8 * KIB && row.blocks >= 1);
                    assert!(row.bulk_bytes == 0 || (row.bulk_bytes > row.twoshot_bytes && !multicast && ranks <= 16));
                }
            }
        }
    }
}
