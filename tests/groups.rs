//! Groups: nothing is launched before the outermost end, what is routed is routed in a group too, and a communicator
//! whose first collective is in a group is set up at its end.
mod common;
#[path = "common/script.rs"]
mod script;

use common::{Door, Job, Report};
use script::{one_process, routed, stock_runs};
use twoshot_sim::Topology;

fn expect_counts(report: &Report, routed: u64, stock: u64) {
    report.expect_success().expect_nothing_live();
    for rank in 0..report.outcomes.len() {
        assert_eq!(report.counters(rank), (routed, stock), "{}", report.outcomes[rank]);
    }
}

#[test]
fn calls_in_a_group_are_routed_and_right_beside_stock_calls() {
    let program = "init; allreduce count=10; group_start; allreduce count=100; allreduce count=200; group_end; \
        group_start; group_start; allreduce count=50; group_end; collective name=broadcast count=70; \
        allreduce count=60 dtype=bf16; group_end; allreduce count=11; \
        group_start; collective name=allgather count=33; allreduce count=40; collective name=sendrecv count=12; \
        allreduce count=90 dtype=f16; group_end; allreduce count=11; destroy";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_on();
    expect_counts(&report, 9, 0);
}

#[test]
fn no_kernel_of_ours_starts_before_the_outermost_group_ends() {
    let launches = |program: &str| {
        let report =
            Job::new(Topology::one_host(2), &format!("init; collective name=allgather count=4; {program}")).run();
        let launches = |pid| report.session.stats(pid).expect("stats of a rank").calls("cuLaunchKernelEx");
        [0, 1].map(|rank| launches(report.outcomes[rank].pid))
    };
    let of_set_up = launches("barrier; leave");
    let open = "group_start; group_start; allreduce count=100; group_end; allreduce count=50;";
    assert_eq!(launches(&format!("{open} barrier; leave")), of_set_up);
    assert_eq!(launches(&format!("{open} group_end; barrier; leave")), of_set_up.map(|launches| launches + 2));
}

#[test]
fn a_first_call_inside_a_group_sets_the_communicator_up_and_is_routed() {
    for door in [Door::Plugin, Door::Preload] {
        let program = "group_start; allreduce count=100; allreduce count=7 op=premulsum maker=stock; group_end; \
            allreduce count=100 reps=2; destroy";
        let report = Job::new(Topology::one_host(2), program).door(door).run();
        report.expect_on();
        expect_counts(&report, 3, 1);
    }
}

#[test]
fn a_first_call_is_in_a_group_on_one_rank_and_outside_on_the_other() {
    let program = "init; group_start on=1; allreduce count=100 call=1 on=1; group_end on=1; allreduce count=100 call=1 on=0; \
        group_start on=0; allreduce count=300 call=2 on=0; group_end on=0; allreduce count=300 call=2 on=1; \
        allreduce count=9 dtype=bf16 call=3; destroy";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_on();
    expect_counts(&report, 3, 0);
}

#[test]
fn communicators_that_are_new_in_one_group_are_set_up_whatever_their_order() {
    // Both communicators are new; rank 0 names them in the other order, each on a stream of its own: on one stream
    // stock NCCL would deadlock, too.
    let one = "use comm=1; stream i=1; allreduce count=100 call=1";
    let other = "use comm=2; stream i=2; allreduce count=200 call=2";
    let on = |part: &str, ranks| part.split("; ").map(|each| format!("{each} on={ranks}; ")).collect::<String>();
    let first = [on(one, "0"), on(other, "0"), on(other, "1,2"), on(one, "1,2")].concat();
    let program = format!(
        "init; split color=0; split color=0; group_start; {first}group_end; use comm=1; allreduce count=77 call=3; \
         use comm=2; allreduce count=78 call=4; destroy; destroy; destroy"
    );
    let report = Job::new(Topology::one_host(3), &program).run();
    report.expect_on();
    expect_counts(&report, 4, 0);
}

#[test]
fn a_send_before_the_first_collective_of_a_group_changes_nothing() {
    let program = "init; group_start; collective name=sendrecv count=20; allreduce count=100; group_end; \
        allreduce count=50; group_start; collective name=sendrecv count=20; allreduce count=100; group_end; destroy";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_success().expect_on();
    expect_counts(&report, 3, 0);
}

/// NCCL asks for the same collectives on all ranks, and for nothing of the kind where it is about send and receive.
#[test]
fn ranks_that_send_receive_or_do_neither_around_an_allreduce_of_a_group_come_to_one_route() {
    let sum = |call: u32| format!("allreduce count=100 call={call}");
    let (send, receive) =
        ("collective name=send count=70000 root=1 call=7", "collective name=recv count=70000 root=0 call=7");
    for first in [true, false] {
        let group = |call: u32, other: &str| match (other, first) {
            ("", _) => format!("group_start; {}; group_end", sum(call)),
            (other, true) => format!("group_start; {other}; {}; group_end", sum(call)),
            (other, false) => format!("group_start; {}; {other}; group_end", sum(call)),
        };
        let program =
            |other: &str| format!("init; {}; {}; {}; destroy; release", group(11, other), sum(12), group(13, other));
        let report = Job::new(Topology::one_host(3), &program(""))
            .rank_program(0, &program(send))
            .rank_program(1, &program(receive))
            .run();
        report.expect_success().expect_on().expect_nothing_live();
        expect_counts(&report, 3, 0);
    }
}

#[test]
fn a_communicator_of_sends_and_receives_alone_is_never_set_up() {
    let program =
        "init; repeat n=3; group_start; collective name=sendrecv count=20; group_end; end; barrier; destroy; release";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_success().expect_nothing_live();
    for rank in 0..3 {
        assert!(!report.lines(rank).iter().any(|line| line.contains("/3: O")), "{:?}", report.lines(rank));
    }
}

#[test]
fn a_put_before_the_first_collective_of_a_group_changes_nothing() {
    let program = "init; group_start; collective name=put count=20; allreduce count=100; group_end; \
        allreduce count=50; group_start; collective name=put count=20; allreduce count=100; group_end; destroy";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_success().expect_on();
    expect_counts(&report, 3, 0);
}

#[test]
fn a_put_behind_the_first_collective_of_a_group_waits_with_it() {
    let program = "init; group_start; allreduce count=100; collective name=put count=20; group_end; \
        collective name=put count=300; allreduce count=50; destroy";
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let report = Job::new(Topology::one_host(3), program).door(door).run();
        report.expect_on();
        expect_counts(&report, 2, 0);
    }
}

#[test]
fn one_thread_with_all_gpus_is_routed_from_its_first_group() {
    for (program, calls) in [
        ("allreduce count=100 reps=3; collective name=allgather count=20; destroy", 3),
        ("init_all; random calls=6 max=4000 seed=2; destroy", 6),
        ("init; collective name=allgather count=20; allreduce count=500 dtype=bf16 reps=2; destroy", 2),
    ] {
        let (session, outcome) = one_process(3, "--gpus", program, &[]);
        outcome.expect_success();
        assert_eq!(routed(&outcome), 3 * calls, "{outcome}");
        session.stats(outcome.pid).expect("stats").assert_nothing_live();
    }
}

#[test]
fn a_group_whose_set_up_is_declined_is_run_by_stock() {
    for rank in 0..3 {
        let rule = format!("rank={rank},call=cuMemCreate,nth=1,code=2");
        let program =
            "group_start; allreduce count=100; allreduce count=40; group_end; allreduce count=9; destroy; release";
        let report = Job::new(Topology::one_host(3), program)
            .env("TWOSHOT_SIM_CALLER", "libtwoshot.so")
            .env("TWOSHOT_SIM_FAULTS", rule)
            .run();
        report.expect_success().expect_nothing_live();
        assert!(report.lines(0).iter().any(|line| line.contains("OFF")), "{}", report.outcomes[0]);
        assert_eq!(report.counters(0), (0, 3));
        assert_eq!(stock_runs(&report.outcomes[0]), 3);
    }
}

#[test]
fn a_captured_group_is_routed_and_replayed() {
    let program = "init; allreduce count=10; capture counts=100,3000,7 grouped=1; replay n=5; allreduce count=12; \
        capture counts=40,900 dtype=bf16 grouped=1 mode=relaxed; replay n=2; replay graph=0; drop_graphs; sleep ms=60; destroy";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_on();
    expect_counts(&report, 7, 0);
}

/// Stock NCCL connects its peers at the first collective, which takes more stack than a thread has by itself.
#[test]
fn threads_on_which_stock_nccl_runs_have_the_stack_that_it_needs() {
    // Two communicators set up at the end of a group; then a routed call in a group on another stream than stock's.
    let program = "init; split color=0; group_start; allreduce count=100; use comm=0; stream i=1; allreduce count=200; \
        group_end; collective name=allgather count=30; stream i=2; group_start; allreduce count=300; group_end; \
        destroy; destroy";
    let report = Job::new(Topology::one_host(2), program).env("SIM_NCCL_STACK", 4 << 20).run();
    report.expect_on();
    expect_counts(&report, 3, 0);
}
