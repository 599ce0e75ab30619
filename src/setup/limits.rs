//! Limits, grids and layout of a communicator: pure functions of what its ranks agreed on.
#![forbid(unsafe_code)]

use crate::config::Config;
use crate::domain::{Domain, Tuned};
use crate::layout::{Algorithm, Layout, RING_RANKS};
use crate::route::{Agreement, NEVER};
use crate::table::{Row, SMALL_BLOCKS, Source, World, row, switch_limits};

/// Most bytes that one launch of two-shot reduces; a larger payload is reduced by several, which costs little more than
/// one (docs/performance.md) and keeps windows small.
const PIECE: u64 = 4 << 20;

/// What holds for the calls of a communicator.
pub struct Limits {
    /// For the router.
    pub agreement: Agreement,
    /// What the table was asked.
    pub world: World,
    /// What it said.
    pub row: Row,
}

/// Payloads that launches are wanted for, in bytes carried.
struct Wanted {
    world: World,
    row: Row,
    oneshot: u64,
    twoshot: u64,
    /// The smallest and the largest one whose sum the switch makes.
    switch: (u64, u64),
    /// The largest one that goes through a ring, 0 for none; and the ring's channels.
    bulk: (u64, u32),
}

impl Wanted {
    fn of(domain: &Domain, config: &Config, resident: u32) -> Self {
        let ranks = domain.facts.len() as u32;
        let Domain { arch, multicast, hosts, nccl, .. } = *domain;
        let world = World { ranks, arch, multicast, hosts, nccl };
        let row = match (domain.tuned, &config.tuning) {
            (Tuned::Agreed, Some(Ok(tuning))) => tuning.row(world).unwrap_or_else(|| row(world)),
            _ => row(world),
        };
        let (oneshot, twoshot, bulk) = payloads(config, row);
        // Over multicast stock NCCL adds in the switch: nobody has compared.
        let bulk = if multicast || ranks as u64 > RING_RANKS { 0 } else { bulk };
        let most = domain.blocks.min(resident).max(1);
        let channels = if domain.chosen_blocks { most } else { row.bulk_blocks.min(most) };
        let switch = if multicast && domain.switch_reduce { in_switch(config, world, twoshot) } else { (NEVER, 0) };
        Self { world, row, oneshot, twoshot, switch, bulk: (bulk, channels) }
    }

    /// The largest payload of a launch.
    fn piece(&self) -> u64 {
        self.twoshot.max(self.switch.1).min(PIECE)
    }
}

/// The limits. A window takes at most `memory` bytes before they are rounded.
pub fn limits(domain: &Domain, config: &Config, resident: u32, memory: u64) -> Option<Limits> {
    let wanted = Wanted::of(domain, config, resident);
    let ranks = wanted.world.ranks;
    let window = |oneshot, piece| layout(ranks, oneshot, piece, wanted.switch.0 != NEVER);
    // Where memory is short the ring goes first: what it takes is stock NCCL's at little loss.
    let whole = |layout: Layout| layout.with_ring(wanted.bulk.1).filter(|_| wanted.bulk.0 > 0);
    let with_ring = whole(window(wanted.oneshot, wanted.piece())?).filter(|layout| layout.window_bytes() <= memory);
    let (layout, oneshot_bytes, piece_bytes) = match with_ring {
        Some(layout) => (layout, wanted.oneshot, wanted.piece()),
        None => {
            let (oneshot, piece) = within(&window, memory, wanted.oneshot, wanted.piece())?;
            (window(oneshot, piece)?, oneshot, piece)
        }
    };
    // Address ranges beyond this are a typing error in a limit, not a workspace.
    if layout.window_bytes().checked_mul(u64::from(ranks))? > 1 << 42 {
        return None;
    }
    Some(settled(domain, config, resident, wanted, layout, (oneshot_bytes, piece_bytes)))
}

/// The limits where the windows are there already.
pub fn limits_in(domain: &Domain, config: &Config, resident: u32, layout: Layout) -> Limits {
    let wanted = Wanted::of(domain, config, resident);
    let oneshot_bytes = wanted.oneshot.min(layout.largest(Algorithm::OneShot));
    let piece_bytes = wanted.piece().min(layout.largest(Algorithm::TwoShot));
    settled(domain, config, resident, wanted, layout, (oneshot_bytes, piece_bytes))
}

fn settled(
    domain: &Domain,
    config: &Config,
    resident: u32,
    wanted: Wanted,
    layout: Layout,
    (oneshot_bytes, piece_bytes): (u64, u64),
) -> Limits {
    // Where memory is short, what would take many launches is stock NCCL's.
    let short = if piece_bytes < wanted.piece() { piece_bytes } else { u64::MAX };
    let (twoshot_bytes, switch_max_bytes) = (wanted.twoshot.min(short), wanted.switch.1.min(short));
    let bulk_bytes = layout.ring().map_or(0, |_| wanted.bulk.0);
    let (switch_bytes, Wanted { world, row, .. }) = (wanted.switch.0, wanted);
    let most = domain.blocks.min(resident).max(1);
    let blocks = if domain.chosen_blocks { most } else { row.blocks.min(most) };
    let tuned = domain.chosen_blocks || row.source == Source::File;
    let small_blocks = if tuned { blocks } else { blocks.max(SMALL_BLOCKS.min(most)) };
    let (ranks, min_bytes) = (world.ranks, config.min_bytes);
    let largest = twoshot_bytes.max(oneshot_bytes).max(bulk_bytes);
    let scaled_bytes = if domain.operations { scaled(config, row).min(largest) } else { 0 };
    let agreement = Agreement {
        ranks,
        layout,
        min_bytes,
        oneshot_bytes,
        twoshot_bytes,
        switch_bytes,
        switch_max_bytes,
        piece_bytes,
        bulk_bytes,
        scaled_bytes,
        blocks,
        small_blocks,
    };
    Limits { agreement, world, row }
}

/// The largest payloads of one-shot, of two-shot, and of what goes through a ring: the user's word, else the table's. A
/// user's limit holds for all together: what is above two-shot's in the table goes through the ring, if it has one.
pub fn payloads(config: &Config, row: Row) -> (u64, u64, u64) {
    let most = config.max_bytes.unwrap_or(row.twoshot_bytes.max(row.bulk_bytes));
    let twoshot = config.max_bytes.unwrap_or(row.twoshot_bytes);
    let oneshot = config.oneshot_max_bytes.unwrap_or(row.oneshot_bytes);
    match config.algorithm {
        None if row.bulk_bytes > 0 && most > row.twoshot_bytes => (oneshot.min(most), row.twoshot_bytes, most),
        None => (oneshot.min(twoshot), twoshot, 0),
        Some(Algorithm::Bulk) => (0, 0, most),
        // One-shot alone still has to keep `ranks` copies of a payload: its memory, not two-shot's, is the limit.
        Some(Algorithm::OneShot) => {
            let alone = config.oneshot_max_bytes.or(config.max_bytes).unwrap_or(row.oneshot_bytes);
            (alone, alone, 0)
        }
        Some(Algorithm::TwoShot | Algorithm::Switch) => (0, twoshot, 0),
    }
}

/// The largest payload of a pre-multiplied sum: the user's word on payloads, else half of where the sum alone meets stock
/// NCCL, which multiplies on the way. The pass before the sum is a launch of about 2 us and moves twice the payload
/// through the device's memory, 2 us + 2 B / 2.5 TB/s; what a sum gains shrinks towards the crossing. On two H100 (docs/
/// performance.md) it gains 15 us at 4 MiB and 12 at 8, where the pass takes 5 and 9; through the ring it gains more above,
/// but there nobody has measured the two together.
fn scaled(config: &Config, row: Row) -> u64 {
    let alone = if row.bulk_bytes > 0 { row.twoshot_bytes } else { row.twoshot_bytes / 2 };
    config.max_bytes.unwrap_or(alone)
}

/// The smallest and the largest payload whose sum the switch makes, where the ranks agreed that it may: by the model, as
/// far as two-shot goes at least, without a gap between the two.
fn in_switch(config: &Config, world: World, twoshot_bytes: u64) -> (u64, u64) {
    let modelled = switch_limits(world);
    let most = config.max_bytes.unwrap_or(modelled.map_or(0, |(_, most)| most).max(twoshot_bytes));
    match (config.algorithm, modelled) {
        (None, Some((from, _))) if from <= twoshot_bytes => (from, most),
        (Some(Algorithm::Switch), _) => (0, most),
        _ => (NEVER, 0),
    }
}

fn layout(ranks: u32, oneshot: u64, piece: u64, switch: bool) -> Option<Layout> {
    let layout = Layout::for_payloads(ranks, oneshot, piece)?;
    if switch { layout.with_switch(piece) } else { Some(layout) }
}

/// Halves the payloads of a launch until a window for them fits the memory.
fn within(
    layout: &dyn Fn(u64, u64) -> Option<Layout>,
    memory: u64,
    mut oneshot: u64,
    mut piece: u64,
) -> Option<(u64, u64)> {
    let fits = |oneshot, piece| Some(layout(oneshot, piece)?.window_bytes() <= memory);
    while !fits(oneshot, piece)? && oneshot.max(piece) > 0 {
        if oneshot == 0 || fits(oneshot, 0)? {
            piece /= 2;
        } else {
            oneshot /= 2;
        }
    }
    Some((oneshot, piece))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_halved_until_it_fits_and_never_refused_for_its_size() {
        for switch in [false, true] {
            let window = |oneshot, piece| layout(4, oneshot, piece, switch);
            let whole = window(128 << 10, 4 << 20).unwrap().window_bytes();
            assert_eq!(within(&window, whole, 128 << 10, 4 << 20), Some((128 << 10, 4 << 20)));
            assert_eq!(within(&window, whole - 1, 128 << 10, 4 << 20), Some((128 << 10, 2 << 20)));
            for memory in [0, 1, 4096, 1 << 20, 7 << 20] {
                let (oneshot, piece) = within(&window, memory, 128 << 10, 4 << 20).unwrap();
                let bytes = window(oneshot, piece).unwrap().window_bytes();
                assert!(bytes <= memory || oneshot.max(piece) == 0, "{memory}: {oneshot}, {piece}");
            }
        }
    }
}
