//! Whether the answers are right: random payloads, new ones for every call; poisoned outputs; guards around every
//! buffer; eager and captured; in place and out of place; aligned and not.
#![forbid(unsafe_code)]

use crate::cuda::Graph;
use crate::element::Reduction;
use crate::payload::{Kind, Payload, checked_ranges};
use crate::protocol::RankRow;
use crate::rank::{GUARD, GUARD_BYTE, Path, Place, Rank};

/// What outputs hold before a call: a NaN of every type, and not twoshot's sentinel.
const POISON: u8 = 0xff;
/// Largest payload that is compared whole, in elements.
const WHOLE: u64 = 8 << 20;

/// Payloads above are verified by one eager and one captured call only, in bytes.
const LARGE: u64 = 64 << 20;

/// One verified call.
struct Check {
    path: Path,
    place: Place,
    payload: Payload,
    exact: bool,
}

/// Verifies both paths at one size.
pub fn row(rank: &mut Rank, what: Reduction, count: u64) -> Result<RankRow, String> {
    let mut row = RankRow {
        dtype: what.dtype,
        op: what.op,
        bytes: 0,
        count,
        routed_calls: 0,
        stock_calls: 0,
        compared: 0,
        wrong_routed: 0,
        wrong_stock: 0,
        note: None,
        stock: Default::default(),
        routed: Default::default(),
    };
    let large = count * what.size() as u64 > LARGE;
    let checks = if large { rank.task.plan.checks.min(1) } else { rank.task.plan.checks };
    for path in [Path::Stock, Path::Routed] {
        // Whether the calls of this size are routed, so that the answers can be held to the bit.
        let mut ours = false;
        for number in 0..checks {
            rank.step(&describe("verifying an eager call", path, what, count));
            ours = eager(rank, &mut row, path, number, ours)?;
        }
        for number in 0..checks.div_ceil(2) {
            rank.step(&describe("verifying a captured call", path, what, count));
            captured(rank, &mut row, path, number, ours)?;
        }
    }
    Ok(row)
}

fn describe(step: &str, path: Path, what: Reduction, count: u64) -> String {
    let path = if path == Path::Stock { "stock" } else { "routed" };
    format!("{step}, {path} {} {}", what.name(), crate::sizes::format(count * what.size() as u64))
}

/// Different for every call of a run, and the same on all ranks.
fn seed(rank: &Rank, row: &RankRow, path: Path, number: u32, captured: bool) -> u64 {
    let call = u64::from(number) << 2 | u64::from(captured) << 1 | u64::from(path == Path::Routed);
    let kind = (row.dtype.nccl() as u64) << 4 | row.op.nccl() as u64;
    let place = row.count.rotate_left(20) ^ kind << 56;
    rank.task.plan.seed ^ place ^ call.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// In place and out of place in turn; our own path also at every alignment, which may differ between ranks.
fn place(rank: &Rank, path: Path, what: Reduction, number: u32) -> Place {
    let element = what.size() as u64;
    let shift = |salt: u64| match path {
        Path::Routed if number % 4 >= 2 => {
            (u64::from(rank.task.rank) + salt + u64::from(number)) % (16 / element) * element
        }
        _ => 0,
    };
    Place { in_place: number % 2 == 1, input_shift: shift(1), output_shift: shift(4) }
}

/// One eager call; says whether it was routed and every bit of its answer is known.
fn eager(rank: &mut Rank, row: &mut RankRow, path: Path, number: u32, ours: bool) -> Result<bool, String> {
    let what = row.what();
    let payload = Payload {
        what,
        // The payload is the same on all ranks because `ours` is: they agreed on it.
        kind: if ours && number % 2 == 1 { Kind::Bits } else { Kind::Numbers },
        seed: seed(rank, row, path, number, false),
    };
    let mut check = Check { path, place: place(rank, path, what, number), payload, exact: false };
    prepare(rank, row.count, &check)?;
    let before = rank.library.counters().unwrap_or_default();
    rank.call(path, what, row.count, check.place)?;
    rank.finish()?;
    let after = rank.library.counters().unwrap_or_default();
    let routed = after.0 > before.0;
    let exact = !rank.in_switch(what, row.count);
    check.exact = routed && exact;
    row.routed_calls += after.0 - before.0;
    row.stock_calls += after.1 - before.1;
    examine(rank, row, &check)?;
    let agreed = rank.agree(u32::from(routed))? == 1;
    if routed && !agreed {
        return Err("a call was routed on this rank and not on all".to_owned());
    }
    Ok(agreed && exact)
}

/// One captured call, replayed three times with different payloads.
fn captured(rank: &mut Rank, row: &mut RankRow, path: Path, number: u32, ours: bool) -> Result<(), String> {
    let what = row.what();
    let place = place(rank, path, what, number + 1);
    let before = rank.library.counters().unwrap_or_default();
    let exact = !rank.in_switch(what, row.count);
    let graph: Graph = rank.graph(path, what, row.count, place, 1)?;
    let after = rank.library.counters().unwrap_or_default();
    let routed = after.0 > before.0;
    if rank.agree(u32::from(routed))? != u32::from(routed) {
        return Err("a captured call was routed on this rank and not on all".to_owned());
    }
    for replay in 0..3 {
        let kind = if routed && ours && replay == 1 { Kind::Bits } else { Kind::Numbers };
        let seed = seed(rank, row, path, number * 3 + replay, true);
        let check = Check { path, place, payload: Payload { what, kind, seed }, exact: routed && exact };
        prepare(rank, row.count, &check)?;
        graph.launch(rank.raw_stream())?;
        rank.finish()?;
        row.routed_calls += u64::from(routed);
        row.stock_calls += u64::from(!routed && path == Path::Routed);
        examine(rank, row, &check)?;
    }
    // No rank takes its graph away while another still replays.
    rank.agree(1).map(|_| ())
}

fn bytes_of(row_count: u64, what: Reduction) -> usize {
    row_count as usize * what.size()
}

/// Writes guards, payload and poison.
fn prepare(rank: &Rank, count: u64, check: &Check) -> Result<(), String> {
    let len = bytes_of(count, check.payload.what);
    let mut image = vec![GUARD_BYTE; len + 2 * GUARD as usize];
    let data = |shift: u64| GUARD as usize + shift as usize..GUARD as usize + shift as usize + len;
    if !check.place.in_place {
        image[data(check.place.output_shift)].fill(POISON);
        rank.output.write(0, &image, &rank.stream)?;
        image.fill(GUARD_BYTE);
    }
    check.payload.fill(rank.task.rank, 0, &mut image[data(check.place.input_shift)]);
    rank.input.write(0, &image, &rank.stream)
}

/// Reads back and counts what is wrong.
fn examine(rank: &Rank, row: &mut RankRow, check: &Check) -> Result<(), String> {
    let (what, place) = (check.payload.what, check.place);
    let len = bytes_of(row.count, what);
    let mut image = vec![0; len + 2 * GUARD as usize];
    let (mut wrong, mut note) = (0, None);
    let mut guards = |image: &[u8], shift: u64, which: &str| {
        let start = GUARD as usize + shift as usize;
        let outside = image[..start].iter().chain(&image[start + len..]);
        let torn = outside.filter(|byte| **byte != GUARD_BYTE).count();
        if torn > 0 {
            wrong += torn as u64;
            note.get_or_insert_with(|| format!("{torn} bytes were written outside the {which}"));
        }
        start
    };
    rank.input.read(0, &mut image, &rank.stream)?;
    let mut start = guards(&image, place.input_shift, "input");
    let mut changed = false;
    if !place.in_place {
        if row.count <= WHOLE {
            let mut sent = vec![0; len];
            check.payload.fill(rank.task.rank, 0, &mut sent);
            changed = image[start..start + len] != sent[..];
        }
        rank.output.read(0, &mut image, &rank.stream)?;
        start = guards(&image, place.output_shift, "output");
    }
    if changed {
        wrong += 1;
        note.get_or_insert_with(|| "an out-of-place call changed its input".to_owned());
    }
    let result = &image[start..start + len];
    for range in checked_ranges(row.count, WHOLE, check.payload.seed) {
        let part = &result[bytes_of(range.start, what)..bytes_of(range.end, what)];
        let (bad, first) = check.payload.wrong(rank.task.ranks, range.start, part, check.exact);
        row.compared += range.end - range.start;
        wrong += bad;
        note = note.or(first);
    }
    let total = if check.path == Path::Stock { &mut row.wrong_stock } else { &mut row.wrong_routed };
    *total += wrong;
    if row.note.is_none() {
        row.note = note;
    }
    Ok(())
}
