//! Set-up under faults: whatever fails on whatever rank, all ranks come to the same verdict, results are right,
//! nothing is left behind, and one line says why.
mod common;

#[path = "setup_faults/cell.rs"]
mod cell;
#[path = "setup_faults/found.rs"]
mod found;
#[path = "setup_faults/leaks.rs"]
mod leaks;
#[path = "setup_faults/once.rs"]
mod once;
#[path = "setup_faults/sweep.rs"]
mod sweep;
#[path = "setup_faults/world.rs"]
mod world;

use world::World;

/// Runs a sample of a world's cells, or all of them where `TWOSHOT_SWEEP=full`;
/// `TWOSHOT_SWEEP_SEED` takes another sample than CI's.
fn sweep(world: World) {
    let cells = sweep::all(world, &world.census());
    let wanted = std::env::var("TWOSHOT_SWEEP").unwrap_or_default();
    if wanted == "full" {
        return sweep::run(world, &cells);
    }
    let chosen = std::env::var("TWOSHOT_SWEEP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: usize = chosen.unwrap_or(1);
    eprintln!("{world:?}: a sample of {} cells, seed {seed}", cells.len());
    // Every call of every rank with every effect: minutes a world, where CI's sample takes half a minute.
    let chosen = if wanted == "ranks" { sweep::every_rank(&cells, seed) } else { sweep::sample(&cells, world, seed) };
    sweep::run(world, &chosen);
}

#[test]
fn any_failing_call_of_any_rank_of_one_host_leads_all_ranks_to_one_verdict() {
    sweep(World::OneHost);
}

#[test]
fn any_failing_call_of_any_rank_of_two_hosts_leads_all_ranks_to_one_verdict() {
    sweep(World::Fabric);
}
