//! Set-up under faults: whatever fails on whatever rank, all ranks come to the same verdict, results are right,
//! nothing is left behind, and one line says why.
mod common;

#[path = "setup_faults/beside.rs"]
mod beside;
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

/// Every call of every rank with a third of the codes, blocked and late, each at one of the call's uses; `TWOSHOT_SWEEP_SEED`
/// takes others than CI's, and `TWOSHOT_SWEEP=full` takes them all.
fn sweep(world: World) {
    let cells = sweep::all(world, &world.census());
    if std::env::var("TWOSHOT_SWEEP").is_ok_and(|wanted| wanted == "full") {
        return sweep::run(world, &cells);
    }
    let seed = std::env::var("TWOSHOT_SWEEP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    eprintln!("{world:?}: some of {} cells, seed {seed}", cells.len());
    sweep::run(world, &sweep::every_rank(&cells, seed));
}

#[test]
fn any_failing_call_of_any_rank_of_one_host_leads_all_ranks_to_one_verdict() {
    sweep(World::OneHost);
}

#[test]
fn any_failing_call_of_any_rank_of_two_hosts_leads_all_ranks_to_one_verdict() {
    sweep(World::Fabric);
}
