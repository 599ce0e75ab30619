//! Which cells are run, and running several at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::cell::{Cell, EFFECTS, Effect};
use crate::world::{Uses, World};

/// Jobs that run at the same time. Most of a job is waiting.
const JOBS: usize = 10;

/// Calls whose failure leaves a rank without a driver: it cannot even tell its peers, and stock NCCL, which needs them
/// as much, cannot run there either.
const STOCK_NEEDS: [&str; 1] = ["cuInit"];

/// Calls that belong to the AllReduce path as well: behind set-up their failure is an error of that call, not of
/// set-up.
const ROUTED: [&str; 7] = [
    "cuCtxGetCurrent",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuLaunchKernelEx",
    "cuStreamGetCaptureInfo_v3",
];

/// A launch that blocks beyond its step and then succeeds after all: its kernel stores through a multicast object that
/// the other ranks have left, because they could not wait for it. Nothing on the host can call such a kernel back.
fn launches_late(call: &str, effect: Effect) -> bool {
    call == "cuLaunchKernelEx" && effect == Effect::Late
}

/// Which uses of a call are failed: the first, a middle and the last one of set-up, those of the end, and all.
fn uses_of(call: &str, uses: Uses) -> BTreeSet<u64> {
    let mut chosen = BTreeSet::new();
    let polled = call == "cuStreamQuery";
    // How often a wait polls is different in every run.
    let last = if polled { uses.setup / 4 } else { uses.setup };
    if last > 0 {
        chosen.extend([1, last.div_ceil(2), last]);
    }
    if uses.total > uses.setup && !polled && !ROUTED.contains(&call) {
        chosen.extend([uses.setup + 1, uses.total]);
    }
    if !STOCK_NEEDS.contains(&call) && !ROUTED.contains(&call) {
        chosen.insert(0);
    }
    chosen
}

/// Every cell of a world.
pub fn all(world: World, census: &[BTreeMap<String, Uses>]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (rank, calls) in census.iter().enumerate() {
        for (call, uses) in calls {
            for nth in uses_of(call, *uses) {
                // A call that blocks at every use keeps a step that was left behind for longer than the job.
                let effects = EFFECTS.iter().filter(|effect| nth > 0 || !effect.blocks());
                let effects = effects.filter(|effect| !launches_late(call, **effect));
                cells.extend(effects.map(|effect| Cell { world, rank, call: call.clone(), nth, effect: *effect }));
            }
        }
    }
    cells
}

/// A part in which every call of every rank blocks, is late, and fails with every third code, once each; its neighbours have
/// the other codes. `seed` turns the wheel of the codes and of which use is failed.
pub fn every_rank(cells: &[Cell], seed: usize) -> Vec<Cell> {
    let mut by_place: BTreeMap<(&str, usize), Vec<&Cell>> = BTreeMap::new();
    for cell in cells {
        by_place.entry((&cell.call, cell.rank)).or_default().push(cell);
    }
    let mut chosen = Vec::new();
    for (turn, own) in by_place.values().enumerate() {
        let uses: Vec<u64> = own.iter().map(|cell| cell.nth).collect::<BTreeSet<_>>().into_iter().collect();
        let met = |at: usize, effect: &Effect| effect.blocks() || (at + turn + seed).is_multiple_of(3);
        for (at, effect) in EFFECTS.iter().enumerate().filter(|(at, effect)| met(*at, effect)) {
            let nth = uses[(at + turn + seed) % uses.len()];
            let found = own.iter().find(|cell| (cell.nth, cell.effect) == (nth, *effect));
            // Not every use meets every effect.
            let found = found.or_else(|| own.iter().find(|cell| cell.effect == *effect));
            chosen.extend(found.map(|cell| (*cell).clone()));
        }
    }
    chosen
}

/// Runs cells, several at once, and panics with everything that went wrong.
pub fn run(world: World, cells: &[Cell]) {
    let (next, on) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wrong = Mutex::new(Vec::new());
    let begun = Instant::now();
    let slowest = Mutex::new((Duration::ZERO, String::new()));
    std::thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = Instant::now();
                    match cell.run() {
                        Ok(true) => drop(on.fetch_add(1, Ordering::Relaxed)),
                        Ok(false) => {}
                        Err(message) => wrong.lock().expect("no panic under this lock").push(message),
                    }
                    let mut slowest = slowest.lock().expect("no panic under this lock");
                    if begun.elapsed() > slowest.0 {
                        *slowest = (begun.elapsed(), cell.to_string());
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("no thread panicked");
    let slowest = slowest.into_inner().expect("no thread panicked");
    let blocked = cells.iter().filter(|cell| cell.effect.blocks()).count();
    eprintln!(
        "{world:?}: {} cells ({blocked} block) in {:?}, {} stayed on, {} wrong; slowest {:?}: {}",
        cells.len(),
        begun.elapsed(),
        on.into_inner(),
        wrong.len(),
        slowest.0,
        slowest.1
    );
    let first: String = wrong.iter().take(5).map(|message| format!("{message}\n\n")).collect();
    let names: String = wrong.iter().map(|m| m.lines().take(2).collect::<Vec<_>>().join(" -> ") + "\n").collect();
    assert!(wrong.is_empty(), "{} cells are wrong:\n{names}\n{first}", wrong.len());
}
