//! The life of communicators: made in every way, ended in every way, many at once.
mod common;
#[path = "common/script.rs"]
mod script;

use common::{Door, Job};
use script::{field, lines_of, ms, one_process, routed, stock_runs};
use twoshot_sim::Topology;

#[test]
fn a_communicator_and_those_split_and_shrunk_from_it_are_each_set_up_and_released() {
    let program = "facts; allreduce count=100; split div=2; facts; allreduce count=200; use comm=0; \
        split color=0 reverse; facts; allreduce count=300; use comm=0; split color=0 none=3; allreduce count=400; \
        use comm=0; shrink exclude=0,3; allreduce count=500; use comm=0; allreduce count=600; \
        destroy; destroy; destroy; destroy; destroy";
    let report = Job::new(Topology::one_host(4), program).run();
    report.expect_success().expect_on().expect_nothing_live();
    // Rank 1 is a member of all five.
    assert_eq!(report.counters(1), (6, 0), "{}", report.outcomes[1]);
}

#[test]
fn finalize_before_destroy_and_destroy_alone_release_alike() {
    for end in ["destroy", "finalize; destroy", "barrier; abort; init; allreduce count=10; destroy"] {
        let program = format!("init; allreduce count=100 reps=3; {end}");
        let report = Job::new(Topology::one_host(2), &program).run();
        report.expect_success().expect_on().expect_nothing_live();
    }
}

#[test]
fn communicators_made_again_and_again_start_anew_though_addresses_come_back() {
    let program = "repeat n=12; init; allreduce count=1000; allreduce count=33 dtype=bf16; destroy; end; \
        init; allreduce count=5; meminfo; repeat n=6; split color=0; allreduce count=70; destroy; end; \
        allreduce count=9; meminfo expect=same; destroy";
    let report = Job::new(Topology::one_host(2), program).env("TWOSHOT_MAX_BYTES", "64K").run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (32, 0), "{}", report.outcomes[rank]);
    }
}

#[test]
fn communicators_made_through_scalable_initialisation_and_grown_are_routed() {
    let program = "init scalable=1; allreduce count=100 path=routed; destroy; \
        init ranks=2 on=0,1; allreduce count=50 on=0,1 path=routed; grow ranks=3; allreduce count=300 path=routed; \
        allreduce count=40 dtype=i8 op=max path=routed; use comm=0 on=0,1; allreduce count=60 on=0,1 path=routed; \
        destroy; destroy on=0,1";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_success().expect_on().expect_nothing_live();
}

#[test]
fn the_limit_of_blocks_in_a_communicators_configuration_is_kept() {
    for (ctas, said) in
        [("max_ctas=2", "blocks 2,"), ("min_ctas=1 max_ctas=1", "blocks 1,"), ("min_ctas=4", "blocks 4,")]
    {
        let program = format!(
            "init {ctas}; allreduce count=20000 path=routed; split color=0; \
            allreduce count=20000 path=routed; destroy; destroy"
        );
        let report = Job::new(Topology::one_host(2).gpus("sms=4"), &program).door(Door::Preload).run();
        report.expect_success().expect_on().expect_nothing_live();
        for (rank, outcome) in report.outcomes.iter().enumerate() {
            let lines = report.lines(rank);
            let on: Vec<_> = lines.iter().filter(|line| line.contains(": ON,")).collect();
            // A child without a configuration has its parent's.
            assert!(on.len() == 2 && on.iter().all(|line| line.contains(said)), "{ctas}: {outcome}");
        }
    }
}

#[test]
fn a_suspended_communicator_refuses_calls_as_stock_does_and_a_resumed_one_is_routed_again() {
    let program = "init; allreduce count=100 path=routed; suspend; expect_error; allreduce count=100; \
        resume; allreduce count=100 reps=2 path=routed; destroy";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_on().expect_nothing_live();
}

#[test]
fn a_call_with_a_configuration_of_its_own_is_stocks_and_may_be_the_first() {
    let program = "init; allreduce count=100 config=1; allreduce count=100 path=routed; \
        group_start; allreduce count=20 config=1; allreduce count=30; group_end; split color=0; \
        group_start; allreduce count=40; allreduce count=50 config=1; allreduce count=60; group_end; destroy; destroy";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert_eq!((routed(outcome), stock_runs(outcome)), (4, 3), "{outcome}");
    }
    // Counted like the others.
    for rank in 0..3 {
        assert_eq!(report.counters(rank), (4, 3), "{}", report.outcomes[rank]);
    }
}

#[test]
fn calls_with_a_configuration_of_their_own_are_counted_by_reason() {
    let program = "allreduce count=100; allreduce count=100 config=1 reps=2; group_start; allreduce count=50 config=1; \
                   group_end; capture count=10 config=1; replay n=2; drop_graphs; allreduce count=0 config=1; destroy";
    let record = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("configured-{}", std::process::id()));
    let file = |rank: usize| record.with_extension(rank.to_string());
    let mut job = Job::new(Topology::one_host(2), program);
    for rank in 0..2 {
        job = job.rank_env(rank, "TWOSHOT_STATS", file(rank).display());
    }
    let report = job.run();
    report.expect_success().expect_on();
    for rank in 0..2 {
        let text = std::fs::read_to_string(file(rank)).expect("what the process counted");
        let _ = std::fs::remove_file(file(rank));
        let record: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let ways = record["ended_ways"].as_array().unwrap_or_else(|| panic!("{text}"));
        let calls = |reason: &str| {
            let way = ways.iter().find(|way| way["reason"] == reason).unwrap_or_else(|| panic!("no {reason}: {text}"));
            way["sizes"].as_array().expect("sizes").iter().map(|size| size["calls"].as_u64().unwrap_or(0)).sum::<u64>()
        };
        assert_eq!((calls("configured"), calls("empty")), (4, 1), "{text}");
    }
}

#[test]
fn later_communicators_get_smaller_windows_until_the_budget_of_memory_is_used_up() {
    // Windows of 26 MiB, eight of them whole; the device has room for all that the budget allows.
    let program = "init; repeat n=70; use comm=0; split color=0; allreduce count=200; end; \
        random calls=80 comms=71 max=300000 seed=3 dtypes=f32; repeat n=71; destroy; end; \
        init; allreduce count=1000000 path=routed; destroy";
    let topology = Topology::one_host(2).gpus("mem=4G");
    let report = Job::new(topology, program).rank_env(1, "TWOSHOT_MEMORY", "448M").run();
    report.expect_success().expect_nothing_live();
    for rank in 0..2 {
        let lines = report.lines(rank);
        let sizes: Vec<u64> =
            lines.iter().filter_map(|line| line.split_once(", memory ")?.1.split(' ').next()?.parse().ok()).collect();
        let (last, first) = sizes.split_last().expect("communicators that are on");
        assert!(first.iter().sum::<u64>() <= 450 << 20 && first.len() >= 50, "{sizes:?}");
        assert!(first.is_sorted_by(|a, b| a >= b) && first[0] > 8 * first[first.len() - 1], "{sizes:?}");
        assert_eq!(*last, first[0], "what was given back is there again");
        let off = lines.iter().filter(|line| line.contains("OFF, stock NCCL: memory (rank ")).count();
        assert_eq!(first.len() + off, 71, "{sizes:?}");
    }
}

#[test]
fn fifty_communicators_live_side_by_side() {
    let program = "init; repeat n=50; use comm=0; split color=0; allreduce count=200; end; \
        random calls=60 comms=51 max=300 seed=3; repeat n=51; destroy; end";
    let job = Job::new(Topology::one_host(2), program).env("TWOSHOT_MAX_BYTES", "16K");
    let report = job.run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (110, 0), "{}", report.outcomes[rank]);
    }
}

#[test]
fn where_memory_ends_further_communicators_stay_with_stock_and_nothing_leaks() {
    let program = "init; repeat n=16; use comm=0; split color=0; allreduce count=200; end; repeat n=17; destroy; end";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_nothing_live();
    for rank in 0..2 {
        let lines = report.lines(rank);
        let count = |word: &str| lines.iter().filter(|line| line.contains(word)).count();
        assert!(count(": ON,") >= 2 && count(": OFF,") >= 2, "{}", report.outcomes[rank]);
        let (routed, stock) = report.counters(rank);
        assert_eq!(routed + stock, 16, "{}", report.outcomes[rank]);
    }
}

#[test]
fn overlapping_communicators_and_twins_used_in_random_order_do_not_mix_up() {
    // {0,1,2,3} twice, {0,1} and {2,3}, {0,2} and {1,3}, {0,1,2}, {1,2}.
    let program = "init; split color=0; use comm=0; split div=2; use comm=0; split mod=2; use comm=0; \
        split color=0 none=3; use comm=0; shrink exclude=0,3; random calls=150 comms=6 seed=11 max=2000 delays=1; \
        repeat n=6; destroy; end";
    let report = Job::new(Topology::one_host(4), program).env("TWOSHOT_MAX_BYTES", "64K").run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..4 {
        assert_eq!(report.counters(rank).1, 0, "{}", report.outcomes[rank]);
    }
}

#[test]
fn a_split_that_yields_nothing_leaves_no_trace() {
    // The first communicator is made before the plugin door opens, so it is first seen at its first call.
    let program = "init; split color=0 none=all max_ctas=1; destroy; allreduce count=20000 path=routed; destroy";
    let report = Job::new(Topology::one_host(2).gpus("sms=4"), program).run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert!(report.lines(rank).iter().any(|line| line.contains(": ON,") && line.contains("blocks 4,")));
    }
}

#[test]
fn while_an_initialisation_is_in_progress_no_call_blocks_and_abort_works() {
    let program =
        "init blocking=0 wait=0; async_error expect=7 each=200; sleep ms=200; async_error expect=7 each=200; abort";
    let job = Job::new(Topology::one_host(2), program).door(Door::Preload);
    let report = job.env("SIM_NCCL_INPROGRESS_MS", "forever").run();
    report.expect_success().expect_nothing_live();
    for outcome in &report.outcomes {
        assert!(ms(outcome, "init") < 2000.0 && ms(outcome, "abort") < 1000.0, "{outcome}");
    }
}

#[test]
fn a_revoked_communicator_refuses_further_calls_and_can_be_shrunk() {
    let program = "init; allreduce count=100 reps=2; barrier; revoke; expect_error; allreduce count=100; \
        shrink exclude=2 abort=1 on=0,1; allreduce count=200 reps=3 on=0,1; destroy on=0,1; destroy on=0,1; destroy on=2";
    let report = Job::new(Topology::one_host(3), program).run();
    report.expect_success();
    for rank in 0..2 {
        assert_eq!(routed(&report.outcomes[rank]), 5, "{}", report.outcomes[rank]);
    }
}

#[test]
fn a_finalized_communicator_refuses_further_calls_as_stock_does() {
    let program = "init; allreduce count=100 reps=2; finalize; expect_error; allreduce count=100; destroy";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_on();
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (2, 1), "{}", report.outcomes[rank]);
    }
}

#[test]
fn several_threads_with_a_gpu_each_are_routed() {
    let program = "random calls=12 max=4000 seed=4; split color=0; allreduce count=300; destroy; destroy";
    let (session, outcome) = one_process(3, "--threads", program, &[]);
    outcome.expect_success();
    assert_eq!(routed(&outcome), 39, "{outcome}");
    session.stats(outcome.pid).expect("stats").assert_nothing_live();
    assert_eq!(lines_of(&outcome, "allreduce").len(), 3);
}

#[test]
fn a_destroyed_communicator_is_an_error_of_stock_and_no_crash() {
    // The worker's own handle is gone with destroy; a null one is left to stock as well.
    let program = "init; allreduce count=10; barrier; abort_in ms=1; sleep ms=300; expect_error; allreduce count=10; forget; \
        init; allreduce count=20; destroy";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success();
    for outcome in &report.outcomes {
        assert!(field(lines_of(outcome, "aborted")[0], "ms") < 1000.0, "{outcome}");
        assert_eq!(routed(outcome), 2, "{outcome}");
    }
}

#[test]
fn communicators_after_one_another_share_the_code_that_the_first_one_loaded() {
    let report =
        Job::new(Topology::one_host(2), "repeat n=4; init; allreduce count=100 path=routed; destroy; end").run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        let stats = report.session.stats(outcome.pid).expect("stats of a rank");
        assert_eq!((stats.calls("cuModuleLoadData"), stats.calls("cuModuleUnload")), (1, 0), "{outcome}");
    }
}

/// The simulated driver dies of a module that went with its context.
#[test]
fn a_program_that_resets_its_device_gets_the_code_loaded_anew() {
    let program = "repeat n=3; init; allreduce count=100 path=routed; destroy; barrier; reset_device; end; \
        init; allreduce count=3000 path=routed; destroy; release";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        let stats = report.session.stats(outcome.pid).expect("stats of a rank");
        assert_eq!((stats.calls("cuModuleLoadData"), stats.calls("cuModuleUnload")), (4, 0), "{outcome}");
    }
}
