//! The rows of worlds that nobody has measured, from [`crate::model`]; a test computes them again.
#![forbid(unsafe_code)]

use super::{BLOCKS, BULK_BLOCKS, KIB, Row, Source, World};

/// The largest number of ranks a line is for, and its limits for one-shot and two-shot in KiB.
type Line = (u32, u64, u64);

const HOPPER: &[Line] = &[(2, 512, 4096), (3, 256, 4096), (6, 64, 4096), (13, 32, 4096), (72, 16, 4096)];
const HOPPER_MULTICAST: &[Line] =
    &[(2, 512, 4096), (3, 256, 4096), (4, 128, 2048), (8, 64, 2048), (24, 32, 2048), (44, 16, 2048), (72, 16, 1024)];
const BLACKWELL: &[Line] =
    &[(2, 512, 2048), (3, 256, 2048), (4, 128, 2048), (7, 64, 2048), (9, 32, 2048), (19, 32, 4096), (72, 16, 4096)];
const BLACKWELL_MULTICAST: &[Line] =
    &[(3, 512, 2048), (4, 256, 4096), (6, 128, 2048), (13, 64, 2048), (56, 32, 2048), (72, 32, 1024)];

/// As [`Line`], for the switch's sums: from which payload and to which; zeros never.
const HOPPER_SWITCH: &[Line] = &[(4, 0, 0), (5, 2048, 4096), (23, 1024, 4096), (46, 512, 4096), (72, 512, 2048)];
const BLACKWELL_SWITCH: &[Line] = &[(5, 0, 0), (10, 2048, 4096), (30, 1024, 4096), (72, 1024, 2048)];

/// See [`super::switch_limits`].
pub(super) fn switch_limits(world: World) -> Option<(u64, u64)> {
    let lines = if world.arch >= 100 { BLACKWELL_SWITCH } else { HOPPER_SWITCH };
    let (_, from, to) = lines.iter().find(|line| world.ranks <= line.0).or(lines.last()).copied()?;
    (world.multicast && to > 0).then_some((from * KIB, to * KIB))
}

/// The row of any world. Beyond 72 ranks, the largest domain there is, that of 72 holds.
pub(super) fn row(world: World) -> Row {
    let lines = match (world.arch >= 100, world.multicast) {
        (false, false) => HOPPER,
        (false, true) => HOPPER_MULTICAST,
        (true, false) => BLACKWELL,
        (true, true) => BLACKWELL_MULTICAST,
    };
    let line = lines.iter().find(|line| world.ranks <= line.0).or(lines.last());
    let (_, oneshot, twoshot) = line.copied().unwrap_or((0, 0, 0));
    Row {
        oneshot_bytes: oneshot * KIB,
        twoshot_bytes: twoshot * KIB,
        bulk_bytes: 0,
        blocks: BLOCKS,
        bulk_blocks: BULK_BLOCKS,
        source: Source::Model,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{B200, H100, PARAMETERS, limits, switch_limits as modelled};

    #[test]
    fn the_switch_is_taken_where_the_model_says_for_every_number_of_ranks() {
        for (gpu, arch) in [(H100, 90), (B200, 100), (B200, 103)] {
            let said: Vec<_> = (2..=72).map(|ranks| (ranks, modelled(&PARAMETERS, gpu, ranks, BLOCKS))).collect();
            for (ranks, limits) in &said {
                let world = World { ranks: *ranks, arch, multicast: true, hosts: 1, nccl: 228 };
                assert_eq!(switch_limits(world).unwrap_or((0, 0)), *limits, "{ranks} x {arch}: {said:?}");
                assert_eq!(switch_limits(World { multicast: false, ..world }), None);
                // No size between two-shot and the switch is stock NCCL's, and none is taken from two-shot for less.
                assert!(
                    limits.0 <= row(world).twoshot_bytes && (limits.1 == 0 || limits.1 >= row(world).twoshot_bytes)
                );
            }
        }
    }

    #[test]
    fn the_rows_are_what_the_model_says_for_every_number_of_ranks() {
        for (gpu, arch) in [(H100, 90), (B200, 100), (B200, 103)] {
            for multicast in [false, true] {
                for ranks in 2..=72 {
                    let row = row(World { ranks, arch, multicast, hosts: 1, nccl: 228 });
                    let said = limits(&PARAMETERS, gpu, ranks, multicast, BLOCKS);
                    assert_eq!((row.oneshot_bytes, row.twoshot_bytes), said, "{ranks} x {arch}, multicast {multicast}");
                    assert_eq!(row.source, Source::Model);
                }
            }
        }
    }
}
