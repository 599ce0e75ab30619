//! Rounds of a communicator's life: afterwards everything is where it was.

use std::time::Duration;

use crate::common::Report;
use crate::world::{World, own_calls};

/// After these, everything that is made once is there.
const WARM: &str = "repeat n=3; init; allreduce count=1000; destroy; end";

/// Rounds after which a leak of one of anything is seen.
const ROUNDS: u32 = 50;

fn flat(world: World, round: &str, after: &str) -> Report {
    let program = format!(
        "{WARM}; barrier; process; meminfo; repeat n={ROUNDS}; {round}; end; barrier; \
         process expect=same slack=8; {after}; release"
    );
    let report = world.job(&program).timeout(Duration::from_secs(150)).run();
    report.expect_success();
    report
}

#[test]
fn after_rounds_of_create_reduce_destroy_everything_is_where_it_was() {
    for world in World::ALL {
        let round = "init; random calls=2 seed=5 max=4000; destroy";
        flat(world, round, "meminfo expect=same").expect_nothing_live();
    }
}

#[test]
fn after_rounds_that_abort_in_mid_flight_everything_is_where_it_was() {
    // Ranks 0 and 2 are in the kernel and wait for rank 1, which never comes.
    let round = "init; allreduce count=500; barrier; abort_in ms=15 on=0,2; expect_error; \
                 allreduce count=900 on=0,2; forget on=0,2; barrier; abort on=1; barrier";
    flat(World::OneHost, round, "meminfo expect=same").expect_nothing_live();
}

#[test]
fn after_rounds_that_are_declined_everything_is_where_it_was() {
    for (call, nth) in [("cuMemCreate", 0), ("cuMemImportFromShareableHandle", 0), ("cuMemsetD32Async", 0)] {
        let program = "repeat n=3; init; allreduce count=500; destroy; end; barrier; process; meminfo; \
                       repeat n=20; init; allreduce count=500; destroy; end; barrier; \
                       process expect=same slack=8; meminfo expect=same; release";
        let rule = format!("rank=1,call={call},nth={nth},code=2");
        let report = World::OneHost.job(program).env("TWOSHOT_SIM_FAULTS", rule).run();
        report.expect_success().expect_nothing_live();
        assert!(own_calls(&report, 1)[call] >= 23, "{call} was not reached in every round");
    }
}
