//! The order of one communicator's operations across streams, routed ones and stock NCCL's alike: a chain in which each
//! works on what the one before it left, each on another stream, with nothing but the communicator between them.
mod common;
#[path = "common/script.rs"]
mod script;

use std::time::Duration;

use common::Job;
use script::{field, routed, stock_runs, summary};
use twoshot_sim::Topology;

fn chains(program: &str) {
    // The first call sets the communicator up; ranks pick their streams by different lots.
    let program = format!("init; allreduce count=10; {program}; destroy; release");
    let report = Job::new(Topology::one_host(3), &program)
        .env("TWOSHOT_SIM_SHUFFLE", 1)
        .env("TWOSHOT_SIM_SEED", 7)
        .env("TWOSHOT_SIM_DELAY_US", 2000)
        .run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert!(routed(outcome) > 20, "{outcome}");
    }
}

#[test]
fn routed_and_stock_operations_on_different_streams_run_in_issue_order() {
    chains("chain n=41 streams=3 seed=1; chain n=40 streams=2 count=3000 seed=2");
}

#[test]
fn on_the_default_stream_and_the_per_thread_one_too() {
    chains("chain n=41 streams=2 seed=8 special=1; chain n=40 streams=1 seed=9 special=1 grouped=1");
}

#[test]
fn in_groups_of_their_own_too() {
    chains("chain n=41 streams=3 seed=3 grouped=1; chain n=30 streams=4 seed=4 grouped=1");
}

#[test]
fn puts_and_waits_for_their_signals_too() {
    chains("chain n=41 streams=3 seed=11 puts=1; chain n=40 streams=2 count=3000 seed=12 puts=1");
    chains("chain n=41 streams=3 seed=13 puts=1 grouped=1");
}

#[test]
fn in_the_branches_of_a_captured_graph_too() {
    chains("chain n=21 streams=3 seed=5 captured=1; chain n=40 streams=2 seed=6 captured=1; chain n=11 seed=7");
}

#[test]
fn a_program_on_one_stream_makes_no_event_for_its_stock_operations() {
    let program = "init; allreduce count=10; allreduce count=10 op=premulsum maker=stock reps=20; destroy; release";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_on();
    for outcome in &report.outcomes {
        assert_eq!((routed(outcome), stock_runs(outcome)), (1, 20), "{outcome}");
        let stats = report.session.stats(outcome.pid).expect("stats of a rank");
        // One behind the routed call; the simulated stock NCCL makes none.
        assert_eq!(stats.calls("cuEventRecord"), 1, "{outcome}");
        assert_eq!(stats.calls("cuStreamWaitEvent"), 0, "{outcome}");
    }
}

/// The simulated driver dies of a stream that is used after its end, as a real one may.
#[test]
fn a_stream_that_is_destroyed_behind_a_stock_operation_is_not_touched_by_the_next_call() {
    let stock = "stream i=1; collective name=allgather count=10; drop_stream";
    let (sum, gather) = ("allreduce count=20", "collective name=allgather count=30");
    for (next, sums) in [
        (format!("{sum} reps=2"), 2),
        (format!("{gather}; {sum}"), 1),
        (format!("group_start; {sum}; group_end; {sum}"), 2),
        (format!("group_start; {sum}; {gather}; group_end"), 1),
        (format!("group_start; {gather}; {sum}; group_end"), 1),
        (format!("capture counts=20,5000; replay n=2; drop_graphs; {sum}"), 3),
    ] {
        let program = format!("init; {sum}; {stock}; {next}; {stock}; {next}; destroy; release");
        let report = Job::new(Topology::one_host(2), &program).run();
        report.expect_success().expect_on().expect_nothing_live();
        for outcome in &report.outcomes {
            assert_eq!((routed(outcome), stock_runs(outcome)), (1 + 2 * sums, 0), "{outcome}");
        }
    }
}

#[test]
fn stock_nccl_is_asked_for_its_order_once_and_only_where_streams_change() {
    let (stock, routed) = ("collective name=allgather count=10", "allreduce count=20");
    for (program, sends) in [
        (format!("{stock}; {routed}; {stock}; {routed}"), 0),
        (format!("{stock}; stream i=1; {routed}; {stock}; stream i=2; {routed}; {stock}; stream i=0; {routed}"), 1),
        (format!("{routed}; stream i=1; {routed}; {stock}; stream i=2; {routed}"), 0),
        (format!("{stock}; stream i=1; {stock}; stream i=2; group_start; {routed}; {routed}; group_end"), 1),
    ] {
        let report = Job::new(Topology::one_host(2), &format!("init; allreduce count=10; {program}; destroy")).run();
        report.expect_success().expect_on();
        for outcome in &report.outcomes {
            assert_eq!(field(summary(outcome), "nccl_send_runs") as u64, sends, "{program}: {outcome}");
        }
    }
}

/// As a real driver's may, a stream's handle comes again for the next one, and its work goes on without it.
#[test]
fn a_stream_with_the_handle_of_one_that_was_destroyed_with_work_on_it_is_another_stream() {
    let call = |other: &str| format!("stream i=1; {other}; drop_stream");
    let (small, large) = (call("allreduce count=300"), call("allreduce count=9000 dtype=bf16"));
    let gather = call("collective name=allgather count=40");
    let program = format!(
        "init; allreduce count=10; repeat n=12; hold; {small}; {large}; {gather}; {large}; {gather}; {small}; \
         allreduce count=20; flush; end; destroy; release"
    );
    let report = Job::new(Topology::one_host(3), &program)
        .env("TWOSHOT_SIM_REUSE_STREAMS", 1)
        .env("TWOSHOT_SIM_SHUFFLE", 1)
        .env("TWOSHOT_SIM_SEED", 3)
        .env("TWOSHOT_SIM_DELAY_US", 2000)
        .run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert_eq!((routed(outcome), stock_runs(outcome)), (1 + 12 * 5, 0), "{outcome}");
    }
}

/// Three communicators that overlap, three streams, ranks that are late at random, routed and stock calls of all types.
#[test]
fn three_overlapping_communicators_on_three_streams_stay_right_under_random_delays() {
    // `TWOSHOT_SOAK=1`: a hundred thousand operations.
    let rounds = if std::env::var_os("TWOSHOT_SOAK").is_some() { 2000 } else { 8 };
    let program = format!(
        "init; split div=2; use comm=0; split none=3; random calls=6 comms=3 max=100 seed=1; \
         repeat n={rounds}; hold; random calls=50 comms=3 streams=3 max=3000 seed=9 delays=1 \
         ops=sum,max,prod,avg,premulsum dtypes=f32,i64,bf16,e4m3,u8; flush; end; \
         repeat n=3; destroy; end"
    );
    let timeout = if rounds > 100 { 7200 } else { 300 };
    let report = Job::new(Topology::one_host(4), &program)
        .env("TWOSHOT_MAX_BYTES", "16K")
        .args(&["--timeout", &timeout.to_string()])
        .timeout(Duration::from_secs(timeout))
        .run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert!(routed(outcome) > 0 && stock_runs(outcome) > 0, "{outcome}");
    }
}
