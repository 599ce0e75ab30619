//! Streams: issue order of one communicator over several, several communicators at once, limits of co-residency.
mod common;

use common::Job;
use twoshot_sim::Topology;

#[test]
fn one_communicator_on_several_streams_keeps_the_order_of_issue() {
    let program = "allreduce count=10; hold; random calls=60 streams=4 max=3000 seed=21 delays=1; flush; destroy";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..3 {
        assert_eq!(report.counters(rank), (61, 0), "{}", report.outcomes[rank]);
    }
}

#[test]
fn several_communicators_on_several_streams_at_once_do_not_starve_each_other() {
    let program = "init; split color=0; use comm=0; split div=2; use comm=0; split mod=2; \
        random calls=12 comms=4 max=100 seed=1; \
        hold; random calls=60 comms=4 streams=3 max=3000 seed=22 delays=1; flush; repeat n=4; destroy; end";
    let report = Job::new(Topology::one_host(4), program).env("TWOSHOT_MAX_BYTES", "64K").run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..4 {
        assert_eq!(report.counters(rank).1, 0, "{}", report.outcomes[rank]);
    }
}

/// Ten communicators of the same ranks, each with a call under way on a stream of its own, issued in another order on each
/// rank. A device holds twelve blocks: what one communicator may take alone, it may not take beside nine others, or the
/// ranks would wait for blocks that each other's calls hold.
#[test]
fn the_launches_of_many_communicators_fit_the_device_in_whatever_order_ranks_issue_them() {
    let mut program = "init; ".to_owned();
    for _ in 0..9 {
        program.push_str("use comm=0; split color=0; ");
    }
    for comm in 0..10 {
        program.push_str(&format!("use comm={comm}; allreduce count=100; "));
    }
    program.push_str("barrier; hold; ");
    for turn in 0..10 {
        for rank in 0..2 {
            let comm = if rank == 0 { turn } else { 9 - turn };
            program.push_str(&format!(
                "use comm={comm} on={rank}; stream i={comm} on={rank}; \
                 allreduce count=60000 call={} on={rank}; ",
                100 + comm
            ));
        }
    }
    program.push_str("flush; ");
    program.push_str(&"destroy; ".repeat(10));
    let report = Job::new(Topology::one_host(2).gpus("sms=6"), &program)
        .env("TWOSHOT_SIM_DEVICE_BLOCKS", 12)
        .env("TWOSHOT_TIMEOUT_MS", 15_000)
        .run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert_eq!(report.counters(rank).1, 0, "{}", report.outcomes[rank]);
    }
}

#[test]
fn blocks_that_run_one_after_the_other_shuffled_and_delayed_give_the_same_results() {
    for (max_blocks, seed) in [("1", "1"), ("2", "2"), ("3", "3")] {
        let program = "random calls=25 max=40000 seed=23 dtypes=f32,bf16; destroy";
        let report = Job::new(Topology::one_host(4), program)
            .env("TWOSHOT_SIM_MAX_BLOCKS", max_blocks)
            .env("TWOSHOT_SIM_SHUFFLE", 1)
            .env("TWOSHOT_SIM_SEED", seed)
            .env("TWOSHOT_SIM_DELAY_US", 300)
            .env("TWOSHOT_ONESHOT_MAX_BYTES", "16K")
            .run();
        report.expect_success().expect_on().expect_nothing_live();
    }
}

#[test]
fn ranks_with_different_room_for_blocks_agree_on_the_smallest() {
    let topology = Topology::one_host(3).gpu(0, 1, "sms=2");
    let report =
        Job::new(topology, "random calls=15 max=60000 seed=24; destroy").rank_env(2, "TWOSHOT_MAX_BLOCKS", 3).run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..3 {
        assert!(report.lines(rank).iter().any(|line| line.contains("blocks 2,")), "{}", report.outcomes[rank]);
    }
}

/// Kernels that push through a multicast address may need more of a multiprocessor: of those, fewer blocks fit.
#[test]
fn what_fits_the_device_together_is_computed_from_the_kernels_in_force() {
    let mut program = "init; ".to_owned();
    for _ in 0..3 {
        program.push_str("use comm=0; split color=0; ");
    }
    for comm in 0..4 {
        program.push_str(&format!("use comm={comm}; allreduce count=100; "));
    }
    program.push_str("barrier; hold; ");
    for turn in 0..4 {
        for rank in 0..2 {
            let comm = if rank == 0 { turn } else { 3 - turn };
            program.push_str(&format!(
                "use comm={comm} on={rank}; stream i={comm} on={rank}; allreduce count=60000 call={} on={rank}; ",
                100 + comm
            ));
        }
    }
    program.push_str("flush; ");
    program.push_str(&"destroy; ".repeat(4));
    let report = Job::new(Topology::one_host(2).gpus("sms=10"), &program)
        .env("TWOSHOT_SIM_UNICAST_OCCUPANCY", 4)
        .env("TWOSHOT_SIM_MULTICAST_OCCUPANCY", 1)
        .env("TWOSHOT_SIM_DEVICE_BLOCKS", 10)
        .env("TWOSHOT_TIMEOUT_MS", 15_000)
        .run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert!(report.lines(rank).iter().any(|line| line.contains("multicast")), "{}", report.outcomes[rank]);
        assert_eq!(report.counters(rank).1, 0, "{}", report.outcomes[rank]);
    }
}
