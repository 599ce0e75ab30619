//! One multicast object serves all communicators of a device set: each binds its windows to a part of its own, and
//! nothing that happens to one of them is noticed by the others.
mod common;
#[path = "common/script.rs"]
mod script;
#[path = "worlds/world.rs"]
mod world;

use common::{Job, Report};
use script::one_process;
use twoshot_sim::Topology;
use world::{calls_beginning, expect_nothing_left, hosts};

/// Calls of one communicator: one- and two-shot, every type.
const CALLS: &str =
    "allreduce dtype=f32 counts=3,300,1000 mixed; allreduce dtype=bf16 counts=900 mixed; allreduce dtype=f16 count=40";

fn job(topology: Topology, program: &str) -> Job {
    Job::new(topology, program).env("TWOSHOT_ONESHOT_MAX_BYTES", 1024).env("TWOSHOT_MAX_BYTES", 8192)
}

/// A communicator of all ranks and `more` others over the same ranks.
fn communicators(more: u32) -> String {
    format!("init; {CALLS}; repeat n={more}; use comm=0; split color=0; {CALLS}; end; ")
}

/// Verdicts of one rank over this wire.
fn wires(report: &Report, rank: usize, wire: &str) -> usize {
    let on = report.lines(rank).into_iter().filter(|line| line.contains(": ON,"));
    on.filter(|line| line.contains(&format!(", {wire},"))).count()
}

/// So many communicators of every rank over multicast and over unicast, right results, nothing left behind.
#[track_caller]
fn expect_wires(report: &Report, multicast: usize, unicast: usize) {
    report.expect_success();
    for (rank, outcome) in report.outcomes.iter().enumerate() {
        let seen = (wires(report, rank, "multicast"), wires(report, rank, "unicast"));
        assert_eq!(seen, (multicast, unicast), "{outcome}");
        assert_eq!(report.counters(rank).1, 0, "calls left to stock: {outcome}");
    }
    expect_nothing_left(report);
}

/// How often the ranks together created an object and bound memory.
#[track_caller]
fn expect_objects(report: &Report, objects: u64, binds: u64) {
    let of = |call| calls_beginning(report, call);
    assert_eq!(of("cuMulticastCreate"), objects, "objects");
    assert_eq!((of("cuMulticastBindMem"), of("cuMulticastUnbind")), (binds, binds), "binds and unbinds");
}

#[test]
fn twenty_communicators_of_the_same_ranks_use_one_object_with_calls_interleaved() {
    for topology in [hosts(&[3]), hosts(&[2, 1])] {
        let program = communicators(19)
            + "random calls=80 comms=20 max=2000 seed=31; \
               hold; random calls=40 comms=20 streams=3 max=2000 seed=32 delays=1; flush; repeat n=20; destroy; end";
        // There is room for no second one.
        let report = job(topology.multicast_slots(1), &program).run();
        expect_wires(&report, 20, 0);
        expect_objects(&report, 1, 20 * 3);
        assert_eq!(calls_beginning(&report, "cuMulticastAddDevice"), 3);
    }
}

#[test]
fn communicators_end_in_any_order_while_the_others_go_on_and_their_parts_are_given_to_new_ones() {
    let program = communicators(5)
        + &format!(
            "use comm=1; destroy; random calls=10 comms=5 max=2000 seed=33; use comm=3; abort; use comm=0; \
             random calls=10 comms=4 max=2000 seed=34; repeat n=4; use comm=0; split color=0; {CALLS}; end; \
             random calls=20 comms=8 max=2000 seed=35; use comm=0; destroy; use comm=2; destroy; \
             random calls=10 comms=6 max=2000 seed=36; repeat n=6; use comm=0; destroy; end"
        );
    let report = job(hosts(&[3]).multicast_slots(1), &program).run();
    expect_wires(&report, 10, 0);
    expect_objects(&report, 1, 10 * 3);
}

#[test]
fn an_object_ends_with_its_last_communicator_and_the_next_one_makes_another() {
    let program = format!("repeat n=3; init; {CALLS}; split color=0; {CALLS}; destroy; destroy; end");
    let report = job(hosts(&[3]).multicast_slots(1), &program).run();
    expect_wires(&report, 6, 0);
    expect_objects(&report, 3, 6 * 3);
}

#[track_caller]
fn one_of_five_binds_fails(rank: u32, fault: &str, deadline_ms: u32) {
    let program =
        communicators(4) + "random calls=40 comms=5 max=2000 seed=37; repeat n=5; destroy; end; sleep ms=2000";
    let report = job(hosts(&[3]), &program)
        .env("TWOSHOT_SIM_FAULTS", format!("rank={rank},call=cuMulticastBindMem,nth=3,{fault}"))
        .env("TWOSHOT_SETUP_TIMEOUT_MS", deadline_ms)
        .run();
    expect_wires(&report, 4, 1);
    assert_eq!(calls_beginning(&report, "cuMulticastCreate"), 1, "rank {rank}, {fault}");
}

#[test]
fn a_failed_bind_of_one_communicator_leaves_the_others_their_parts() {
    for rank in 0..3 {
        one_of_five_binds_fails(rank, "code=2", 20000);
    }
}

#[test]
fn a_bind_of_one_communicator_that_is_left_behind_leaves_the_others_their_parts() {
    for fault in ["delay=6000,code=999", "delay=6000"] {
        one_of_five_binds_fails(1, fault, 5000);
    }
}

#[test]
fn a_part_whose_memory_the_driver_does_not_let_go_is_not_given_to_another_communicator() {
    let program = communicators(2)
        + &format!(
            "use comm=1; destroy; use comm=0; split color=0; {CALLS}; random calls=20 comms=3 max=2000 seed=38; \
             repeat n=3; destroy; end"
        );
    let rule = "rank=1,call=cuMulticastUnbind,nth=1,code=999";
    let report = job(hosts(&[3]).multicast_slots(1), &program).env("TWOSHOT_SIM_FAULTS", rule).run();
    expect_wires(&report, 4, 0);
}

#[test]
fn other_ranks_or_another_order_of_them_are_another_device_set_with_an_object_of_its_own() {
    // Two communicators each of {0,1,2,3}, {3,2,1,0}, and {0,1} with {2,3}.
    let program = format!(
        "init; {CALLS}; use comm=0; split color=0; {CALLS}; repeat n=2; use comm=0; split color=0 reverse=1; {CALLS}; \
         end; repeat n=2; use comm=0; split div=2; {CALLS}; end; random calls=40 comms=6 max=2000 seed=39; \
         repeat n=6; destroy; end"
    );
    let report = job(hosts(&[4]), &program).run();
    expect_wires(&report, 6, 0);
    expect_objects(&report, 4, 6 * 4);
}

#[test]
fn a_communicator_that_finds_all_parts_taken_opens_a_second_object() {
    let program = communicators(33) + "random calls=60 comms=34 max=2000 seed=40; repeat n=34; destroy; end";
    let report = job(hosts(&[2]), &program).run();
    expect_wires(&report, 34, 0);
    expect_objects(&report, 2, 34 * 2);
}

#[test]
fn a_second_object_that_finds_no_slot_leaves_the_rest_to_unicast() {
    let program = communicators(33) + "random calls=60 comms=34 max=2000 seed=41; repeat n=34; destroy; end";
    let report = job(hosts(&[2]).multicast_slots(1), &program).run();
    expect_wires(&report, 32, 2);
}

#[test]
fn parts_are_bound_and_unbound_while_kernels_run_on_another_part() {
    // A queue of slow calls of the first communicator, behind which nobody waits before the second one has come, and
    // another before it has gone.
    let queue = "hold; stream i=1; use comm=0; allreduce count=1500 reps=60; allreduce count=30 dtype=bf16 reps=60; stream i=0;";
    let program = format!(
        "init; {CALLS}; {queue} split color=0; {CALLS}; random calls=20 comms=2 streams=2 max=2000 seed=44; flush; \
         {queue} use comm=1; destroy; {CALLS}; flush; destroy"
    );
    let slow = [("TWOSHOT_SIM_SHUFFLE", "1"), ("TWOSHOT_SIM_SEED", "5"), ("TWOSHOT_SIM_DELAY_US", "500")];
    let job =
        slow.iter().fold(job(hosts(&[3]).multicast_slots(1), &program), |job, (name, value)| job.env(name, value));
    let report = job.run();
    expect_wires(&report, 2, 0);
    expect_objects(&report, 1, 2 * 3);
}

#[test]
fn ranks_that_release_at_different_times_agree_on_a_new_object() {
    // Rank 1 still holds the old one when rank 0, which made it, does not any more.
    let program =
        format!("init; {CALLS}; destroy on=0; init; {CALLS}; use comm=0; destroy on=1; barrier; {CALLS}; destroy");
    let report = job(hosts(&[3]).multicast_slots(2), &program.replace("on=1", "on=1,2")).run();
    expect_wires(&report, 2, 0);
    expect_objects(&report, 2, 2 * 3);
}

#[test]
fn a_graph_keeps_the_part_of_its_communicator_until_it_goes() {
    let program = format!(
        "init; {CALLS}; split color=0; {CALLS}; capture counts=100,1500; replay; destroy; replay n=2; \
         use comm=0; split color=0; {CALLS}; replay n=2; random calls=10 comms=2 max=2000 seed=42; replay; \
         drop_graphs; sleep ms=100; use comm=0; split color=0; {CALLS}; repeat n=3; destroy; end"
    );
    let report = job(hosts(&[2]).multicast_slots(1), &program).run();
    expect_wires(&report, 4, 0);
    expect_objects(&report, 1, 4 * 2);
}

#[test]
fn ranks_that_are_threads_of_one_process_hold_a_handle_each() {
    let program = communicators(4) + "random calls=30 comms=5 max=2000 seed=43; repeat n=5; destroy; end; release";
    let limits = [("TWOSHOT_MAX_BYTES", "8192")];
    let (session, outcome) = one_process(3, "--threads", &program, &limits);
    outcome.expect_success();
    let stats = session.stats(outcome.pid).expect("stats of the process");
    stats.assert_nothing_live();
    assert_eq!((stats.calls("cuMulticastCreate"), stats.calls("cuMulticastAddDevice")), (1, 3), "{outcome}");
    assert_eq!(stats.calls("cuMulticastBindMem"), 15, "{outcome}");
}

#[test]
fn the_hundred_and_twenty_ninth_object_is_refused_and_its_communicator_uses_unicast() {
    // Eight ways to pair 32 ranks, and one more pair: 129 device sets, for which the switch has room for 128.
    let program = format!(
        "init; barrier; {} barrier; repeat n=9; destroy; end",
        (1..=8)
            .map(|with| format!("use comm=0; split xor={with}; allreduce dtype=bf16 counts=40,900 mixed; "))
            .collect::<String>()
    );
    let report = job(hosts(&[34]).gpus("mem=1G"), &program).run();
    report.expect_success().expect_on();
    expect_nothing_left(&report);
    let objects = report.session.sum_of_stats().unwrap().total("multicast_objects");
    assert_eq!(objects, 128);
    let all = |wire| (0..34).map(|rank| wires(&report, rank, wire)).sum::<usize>();
    let off: Vec<&str> = report
        .outcomes
        .iter()
        .flat_map(|outcome| outcome.stdout.lines())
        .filter(|line| line.contains(": OFF"))
        .collect();
    assert_eq!((all("multicast"), all("unicast")), (2 * 128, 2), "{off:?}");
}

#[test]
fn a_device_takes_part_in_eight_objects_and_leaves_the_other_slots_of_the_switch_alone() {
    let pairs: String = (1..=9)
        .map(|with| format!("use comm=0; split xor={with}; allreduce dtype=bf16 counts=40,900 mixed; "))
        .collect();
    // A second communicator of a set that has an object still gets a part of it.
    let program = format!("init; {pairs} use comm=0; split xor=1; {CALLS}; repeat n=11; destroy; end");
    let report = job(hosts(&[16]).gpus("mem=1G"), &program).run();
    expect_wires(&report, 9, 1);
    assert_eq!(calls_beginning(&report, "cuMulticastCreate"), 8 * 8);
}
