//! Limits, grids and layout of a communicator: pure functions of what its ranks agreed on.
#![forbid(unsafe_code)]

use crate::config::Config;
use crate::domain::{Domain, Tuned};
use crate::layout::{Algorithm, Layout};
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
}

impl Wanted {
    fn of(domain: &Domain, config: &Config) -> Self {
        let ranks = domain.facts.len() as u32;
        let Domain { arch, multicast, hosts, nccl, .. } = *domain;
        let world = World { ranks, arch, multicast, hosts, nccl };
        let row = match (domain.tuned, &config.tuning) {
            (Tuned::Agreed, Some(Ok(tuning))) => tuning.row(world).unwrap_or_else(|| row(world)),
            _ => row(world),
        };
        let (oneshot, twoshot) = payloads(config, row);
        let switch = if multicast && domain.switch_reduce { in_switch(config, world, twoshot) } else { (NEVER, 0) };
        Self { world, row, oneshot, twoshot, switch }
    }

    /// The largest payload of a launch.
    fn piece(&self) -> u64 {
        self.twoshot.max(self.switch.1).min(PIECE)
    }
}

/// The limits. A window takes at most `memory` bytes before they are rounded.
pub fn limits(domain: &Domain, config: &Config, resident: u32, memory: u64) -> Option<Limits> {
    let wanted = Wanted::of(domain, config);
    let ranks = wanted.world.ranks;
    let window = |oneshot, piece| layout(ranks, oneshot, piece, wanted.switch.0 != NEVER);
    let (oneshot_bytes, piece_bytes) = within(&window, memory, wanted.oneshot, wanted.piece())?;
    let layout = window(oneshot_bytes, piece_bytes)?;
    // Address ranges beyond this are a typing error in a limit, not a workspace.
    if layout.window_bytes().checked_mul(u64::from(ranks))? > 1 << 42 {
        return None;
    }
    Some(settled(domain, config, resident, wanted, layout, (oneshot_bytes, piece_bytes)))
}

/// The limits where the windows are there already.
pub fn limits_in(domain: &Domain, config: &Config, resident: u32, layout: Layout) -> Limits {
    let wanted = Wanted::of(domain, config);
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
    let (switch_bytes, Wanted { world, row, .. }) = (wanted.switch.0, wanted);
    let most = domain.blocks.min(resident).max(1);
    let blocks = if domain.chosen_blocks { most } else { row.blocks.min(most) };
    let tuned = domain.chosen_blocks || row.source == Source::File;
    let small_blocks = if tuned { blocks } else { blocks.max(SMALL_BLOCKS.min(most)) };
    let (ranks, min_bytes) = (world.ranks, config.min_bytes);
    let scaled_bytes = if domain.operations { scaled(config, row).min(twoshot_bytes.max(oneshot_bytes)) } else { 0 };
    let agreement = Agreement {
        ranks,
        layout,
        min_bytes,
        oneshot_bytes,
        twoshot_bytes,
        switch_bytes,
        switch_max_bytes,
        piece_bytes,
        scaled_bytes,
        blocks,
        small_blocks,
    };
    Limits { agreement, world, row }
}

/// The largest payloads of one-shot and of two-shot: the user's word, else the table's.
fn payloads(config: &Config, row: Row) -> (u64, u64) {
    let twoshot = config.max_bytes.unwrap_or(row.twoshot_bytes);
    let oneshot = config.oneshot_max_bytes.unwrap_or(row.oneshot_bytes).min(twoshot);
    match config.algorithm {
        None => (oneshot, twoshot),
        // One-shot alone still has to keep `ranks` copies of a payload: its memory, not two-shot's, is the limit.
        Some(Algorithm::OneShot) => {
            let alone = config.oneshot_max_bytes.or(config.max_bytes).unwrap_or(row.oneshot_bytes);
            (alone, alone)
        }
        Some(Algorithm::TwoShot | Algorithm::Switch) => (0, twoshot),
    }
}

/// The largest payload of a pre-multiplied sum: the user's word on payloads, else half of where the sum alone meets stock
/// NCCL, which multiplies on the way. The pass before the sum is a launch of about 2 us and moves twice the payload
/// through the device's memory, 2 us + 2 B / 2.5 TB/s; what a sum gains shrinks towards the crossing. On two H100 (docs/
/// performance.md) it gains 15 us at 4 MiB, 11 at 8 and 3 at 16, where the pass takes 5, 9 and 15.
fn scaled(config: &Config, row: Row) -> u64 {
    config.max_bytes.unwrap_or(row.twoshot_bytes / 2)
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
