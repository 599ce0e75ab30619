//! Communicators that do not block their caller: their set-up and first call go on behind `ncclInProgress`.
mod common;
#[path = "common/script.rs"]
mod script;

use common::{Door, Job};
use script::{field, lines_of, ms, one_process, routed, summary};
use twoshot_sim::Topology;

fn job(gpus: u32, program: &str) -> Job {
    Job::new(Topology::one_host(gpus), program).door(Door::Preload)
}

#[test]
fn the_first_call_returns_at_once_while_its_peers_are_late_and_all_calls_are_routed() {
    let program = "init blocking=0; barrier; sleep ms=1500 on=1; raw count=100 expect=7 on=0; \
        async_error expect=7 each=100 on=0; async_error expect=0 within=20000 on=0; raw count=100 on=1,2; \
        async_error expect=0 within=20000; sync; allreduce count=300 reps=3 path=routed; destroy; release";
    let report = job(3, program).run();
    report.expect_success().expect_on().expect_nothing_live();
    assert!(ms(&report.outcomes[0], "raw") < 1000.0, "{}", report.outcomes[0]);
    assert_eq!(routed(&report.outcomes[0]), 4, "{}", report.outcomes[0]);
}

#[test]
fn through_every_door_with_random_calls_groups_graphs_and_children_everything_is_right() {
    let program = "init blocking=0; allreduce count=9 op=premulsum; random calls=25 seed=4 max=9000 streams=3 \
        dtypes=f32,bf16,i8 ops=sum,max,premulsum; split color=0; group_start; allreduce count=70; \
        collective name=broadcast count=5; allreduce count=80 op=premulsum; group_end; random calls=10 seed=5 max=3000 \
        comms=2 streams=2; use comm=1; allreduce count=400000 path=stock; capture counts=10,400,3; replay n=3; \
        drop_graphs; sleep ms=60; destroy; destroy; release";
    for door in [Door::Preload, Door::Path, Door::Plugin] {
        let job = Job::new(Topology::one_host(3), program).door(door);
        let report = job.env("TWOSHOT_MAX_BYTES", "64K").env("SIM_NCCL_INPROGRESS_MS", 20).run();
        report.expect_success().expect_on().expect_nothing_live();
        for outcome in &report.outcomes {
            assert!(routed(outcome) > 30, "{outcome}");
        }
    }
}

#[test]
fn routed_and_stock_operations_keep_their_order_though_stock_starts_its_own_late() {
    // Every operation works on what the one before it left, on another stream, and nothing but the communicator's order
    // is between them.
    let program = "init blocking=0; allreduce count=10; chain n=41 streams=3 seed=1; chain n=40 streams=2 count=3000 seed=2; \
        chain n=21 streams=3 seed=5 captured=1; chain n=31 streams=3 seed=3 grouped=1; destroy; release";
    let shuffled = job(3, program).env("TWOSHOT_SIM_SHUFFLE", 1).env("TWOSHOT_SIM_SEED", 3);
    let report = shuffled.env("TWOSHOT_SIM_DELAY_US", 300).run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert!(routed(outcome) > 60, "{outcome}");
    }
}

#[test]
fn groups_of_both_kinds_keep_one_order_on_all_ranks_though_nobody_saw_the_communicator_being_made() {
    // NCCL opens the plugin on a thread of its own while it makes the communicator. Rank 1's kernels are launched late.
    let group = "group_start; collective name=allgather count=249; allreduce count=3; allreduce count=2; group_end; ";
    let program = format!("init blocking=0; {}destroy; release", group.repeat(3));
    let slow: Vec<_> = (20..50).map(|n| format!("rank=1,call=cuLaunchKernelEx,nth={n},delay=10")).collect();
    let job = job(2, &program).door(Door::Plugin).env("TWOSHOT_SIM_FAULTS", slow.join(";"));
    let job = job.env("TWOSHOT_TIMEOUT_MS", 5000);
    let report = job.run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert_eq!(routed(outcome), 6, "{outcome}");
    }
}

#[test]
fn groups_of_both_kinds_keep_one_order_though_some_ranks_block_and_others_do_not() {
    let group = "group_start; collective name=allgather count=249; allreduce count=3; allreduce count=2; group_end; ";
    let rest = format!("{}destroy; release", group.repeat(3));
    let job = job(3, &format!("init blocking=0; {rest}")).rank_program(1, &format!("init; {rest}"));
    let report = job.env("TWOSHOT_TIMEOUT_MS", 5000).run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert_eq!(routed(outcome), 6, "{outcome}");
    }
}

#[test]
fn a_child_is_known_when_its_parent_is_no_longer_in_progress() {
    let program = "init blocking=0; allreduce count=9; split color=0 max_ctas=2; allreduce count=300 reps=2 path=routed; \
        shrink exclude=2; allreduce count=40 on=0,1 path=routed; destroy on=0,1; use comm=1; destroy; \
        use comm=0; destroy; release";
    let report = job(3, program).env("SIM_NCCL_INPROGRESS_MS", 20).run();
    report.expect_success().expect_on().expect_nothing_live();
}

#[test]
fn one_thread_with_all_ranks_groups_them_and_is_told_to_come_back() {
    for program in ["allreduce count=100 reps=3", "random calls=20 seed=8 max=4000 dtypes=f32,i32 ops=sum,premulsum"] {
        let library = twoshot_sim::twoshot_library().display().to_string();
        let program =
            format!("init blocking=0; {program}; init blocking=0; {program}; destroy; use comm=0; destroy; release");
        let (session, outcome) = one_process(3, "--gpus", &program, &[("LD_PRELOAD", &library)]);
        outcome.expect_success();
        assert!(routed(&outcome) > 0, "{outcome}");
        let stats = session.stats(outcome.pid).expect("stats");
        stats.assert_nothing_live_but(&[]);
    }
}

#[test]
fn ranks_that_block_and_ranks_that_do_not_meet_in_one_set_up() {
    let rest = "allreduce count=100; allreduce count=5 op=premulsum; random calls=10 seed=3 max=2000; destroy; release";
    let blocks = format!("init; {rest}");
    let report = job(3, &format!("init blocking=0; {rest}")).rank_program(1, &blocks).run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..3 {
        assert_eq!(report.counters(rank), (12, 0), "{}", report.outcomes[rank]);
    }
}

#[test]
fn what_is_asked_while_a_call_is_in_progress_is_refused_and_changes_nothing() {
    // Rank 1 is late, so that rank 0 is in progress for long.
    let program = "init blocking=0; barrier; sleep ms=1000 on=1; raw count=100 expect=7 on=0; raw count=100 expect=4 on=0; \
        raw name=allgather count=10 expect=4 on=0; group_start on=0; raw count=10 expect=4 on=0; \
        expect_error code=4 on=0; group_end on=0; expect_error code=4; finalize on=0; expect_error code=4; destroy keep=1 on=0; \
        raw count=100 on=1; async_error expect=0 within=20000; sync; allreduce count=200 path=routed; destroy; release";
    let report = job(2, program).run();
    report.expect_success().expect_on().expect_nothing_live();
}

#[test]
fn whatever_fails_in_a_set_up_the_verdict_is_common_and_the_first_call_is_made() {
    for (rule, reason) in [
        ("rank=1,call=cuMemCreate,nth=1,code=2", "allocate (rank 1"),
        ("rank=0,call=cuLaunchKernelEx,nth=3,code=701", "known-answer (rank 0"),
        ("rank=1,call=cuMemImportFromShareableHandle,nth=1,code=999", "import (rank 1"),
        ("rank=0,call=cuMemMap,nth=2,block", "deadline (rank 0"),
    ] {
        let program = "init blocking=0; allreduce count=100 reps=3; random calls=6 seed=2 max=900 ops=sum,premulsum; destroy; \
                       release";
        let report = job(2, program).env("TWOSHOT_SIM_FAULTS", rule).env("TWOSHOT_SETUP_TIMEOUT_MS", 2000).run();
        report.expect_success().expect_off(reason);
        if !rule.ends_with("block") {
            report.expect_nothing_live();
        }
        assert_eq!(report.counters(0).0, 0, "{}", report.outcomes[0]);
    }
}

#[test]
fn an_abort_or_a_revoke_at_any_moment_of_a_set_up_returns_and_the_process_goes_on() {
    // Rank 1 never comes, or comes when it is too late.
    for (moment, how) in
        [(0, "abort"), (3, "abort"), (25, "abort"), (60, "abort"), (120, "abort"), (5, "revoke"), (40, "revoke")]
    {
        let end = if how == "revoke" { "abort" } else { "forget" };
        let program = format!(
            "init blocking=0; barrier; abort_in ms={moment} how={how} on=0,2; raw count=100 on=0,2; join; {end} on=0,2; \
             barrier; abort on=1; drop; init; allreduce count=50; destroy; release"
        );
        let report = job(3, &program).run();
        for outcome in &report.outcomes {
            assert!(summary(outcome).contains("\"ok\":true"), "{moment} {how}: {outcome}");
            for line in lines_of(outcome, "aborted") {
                assert!(field(line, "ms") < 4000.0, "{moment} {how}: {line}");
            }
            assert_eq!(routed(outcome), 1, "{moment} {how}: {outcome}");
        }
        report.expect_nothing_live();
    }
}
