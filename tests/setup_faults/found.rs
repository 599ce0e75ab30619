//! What the sweep found, each as a test of its own.

use crate::common::Report;
use crate::world::World;

fn run(world: World, rules: &str, patience_ms: u32) -> Report {
    let program = "random calls=3 seed=4 max=3000; destroy; release; sleep ms=1300";
    let job = world.job(program).env("TWOSHOT_SETUP_TIMEOUT_MS", patience_ms);
    let report = job.env("TWOSHOT_SIM_FAULTS", rules).run();
    report.expect_success().expect_nothing_live();
    report
}

#[test]
fn a_rank_that_cannot_retain_its_context_still_tells_its_peers() {
    for call in ["cuDevicePrimaryCtxRetain", "cuDeviceGet"] {
        let rule = format!("rank=1,call={call},nth=0,code=101");
        run(World::OneHost, &rule, 8000).expect_off("probe (rank 1, code 101)");
    }
}

#[test]
fn a_rank_without_host_memory_or_a_stream_of_its_own_still_votes() {
    run(World::OneHost, "rank=1,call=cuMemHostAlloc,nth=0,code=2", 8000).expect_off("map (rank 1, code 2)");
    run(World::OneHost, "rank=1,call=cuStreamCreate,nth=0,code=2", 8000).expect_off("prepare (rank 1, code 2)");
}

#[test]
fn everything_a_ready_communicator_needs_is_made_before_the_last_vote() {
    run(World::Fabric, "rank=2,call=cuEventCreate,nth=1,code=999", 8000).expect_off("known-answer (rank 2, code 999)");
}

#[test]
fn a_context_query_that_fails_costs_nothing() {
    for nth in [1, 5, 20, 40] {
        run(World::OneHost, &format!("rank=0,call=cuCtxGetCurrent,nth={nth},code=999"), 8000).expect_on();
    }
}

#[test]
fn a_known_answer_step_that_comes_back_late_starts_no_kernel_any_more() {
    // It would store through a multicast object that its peers have left; the simulator ends such a process.
    run(World::OneHost, "rank=1,call=cuMemcpyHtoDAsync_v2,nth=5,delay=1000", 600).expect_off("(rank ");
}

#[test]
fn a_context_that_is_refused_once_where_memory_is_freed_is_asked_for_again() {
    // A step that was left behind frees on a thread without a context: some of these are its.
    std::thread::scope(|scope| {
        for nth in 1..=20 {
            let push = format!("rank=1,call=cuCtxPushCurrent_v2,nth={nth},code=999");
            let rules = format!("rank=1,call=cuMemcpyHtoDAsync_v2,nth=5,delay=1000;{push}");
            scope.spawn(move || run(World::OneHost, &rules, 600));
        }
    });
}
