//! Calls captured in CUDA graphs: every mode, replays among eager calls, life of graph and communicator.
//!
//! What a graph lets go is collected by the next creation or end of a communicator, hence the short sleeps: the driver
//! tells us on a thread of its own.
mod common;
#[path = "common/script.rs"]
mod script;

use common::{Job, Report};
use script::ms;
use twoshot_sim::{Stats, Topology};

fn job(program: &str) -> Job {
    Job::new(Topology::one_host(2), program).env("TWOSHOT_MAX_BYTES", "256K")
}

fn stats(report: &Report, rank: usize) -> Stats {
    report.session.stats(report.outcomes[rank].pid).expect("stats of a rank")
}

#[test]
fn calls_captured_in_any_mode_are_routed_and_replays_mix_with_eager_calls_of_other_sizes() {
    for mode in ["global", "thread", "relaxed"] {
        let program = format!(
            "allreduce count=10; capture mode={mode} counts=100,5000,7; replay n=3; allreduce count=70; \
             allreduce count=9000 dtype=bf16; replay n=2; random calls=10 max=20000 seed=9; replay n=3; drop_graphs; sleep ms=60; destroy"
        );
        let report = job(&program).run();
        report.expect_success().expect_on().expect_nothing_live();
        for rank in 0..2 {
            assert_eq!(report.counters(rank), (16, 0), "{mode}: {}", report.outcomes[rank]);
        }
    }
}

#[test]
fn the_first_call_ever_inside_a_capture_is_stocks_and_later_ones_are_routed() {
    for mode in ["global", "thread", "relaxed"] {
        let program = format!(
            "capture mode={mode} counts=100; replay n=2; allreduce count=100; capture mode={mode} counts=200; replay n=2; \
             replay graph=0 n=2; drop_graphs; sleep ms=60; destroy"
        );
        let report = job(&program).run();
        report.expect_success().expect_on().expect_nothing_live();
        for rank in 0..2 {
            assert_eq!(report.counters(rank), (2, 1), "{mode}: {}", report.outcomes[rank]);
        }
    }
}

#[test]
fn two_graphs_of_one_communicator_take_turns() {
    let program = "allreduce count=10; capture counts=300,20; capture counts=4000; replay graph=0; replay graph=1 n=2; \
        replay graph=0 n=2; allreduce count=50; replay graph=1; drop_graphs; sleep ms=60; destroy";
    let report = job(program).run();
    report.expect_success().expect_on().expect_nothing_live();
}

#[test]
fn a_capture_over_several_streams_keeps_the_order_of_the_calls() {
    let program = "allreduce count=10; capture streams=3 counts=300,20,4000,1,700,60; replay n=20; allreduce count=50; \
        replay n=5; drop_graphs; sleep ms=60; destroy";
    let job = job(program).env("TWOSHOT_SIM_SHUFFLE", 1).env("TWOSHOT_SIM_SEED", 3).env("TWOSHOT_SIM_DELAY_US", 200);
    let report = job.run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (8, 0), "{}", report.outcomes[rank]);
    }
}

#[test]
fn destroy_and_abort_with_live_graphs_return_at_once_and_memory_comes_back_with_the_graph() {
    for end in ["destroy", "abort"] {
        // The last communicator's creation and end collect what the graphs have let go.
        let program = format!(
            "init; allreduce count=10; capture counts=100,200; replay n=2; capture counts=300; replay n=1; barrier; {end}; drop_graphs; \
             sleep ms=100; init; allreduce count=10; destroy"
        );
        let report = job(&program).run();
        report.expect_success().expect_nothing_live();
        for outcome in &report.outcomes {
            assert!(ms(outcome, end) < 1000.0, "{outcome}");
        }
    }
}

#[test]
fn while_a_graph_lives_its_memory_does_and_replays_after_destroy_are_still_right() {
    let program = "init; allreduce count=10; capture counts=100,200; replay; destroy; replay n=3; drop_graphs; sleep ms=100; \
        init; allreduce count=10; destroy";
    let report = job(program).run();
    report.expect_success().expect_nothing_live();
    // Without the graphs' end nothing of theirs is given back.
    let report = job("allreduce count=10; capture counts=100; replay; destroy; leave").run();
    report.expect_success();
    for rank in 0..2 {
        let stats = stats(&report, rank);
        assert!(stats.live("allocations") >= 1 && stats.live("user_objects") == 1, "{:?}", stats.all_live());
    }
}

#[test]
fn but_for_its_buffers_a_captured_call_has_the_same_arguments_every_time() {
    let program = "allreduce count=500; allreduce count=77; capture counts=500; replay; capture counts=500 offset=3; \
        allreduce count=500; drop_graphs; sleep ms=60; destroy";
    let report = job(program).env("TWOSHOT_SIM_LAUNCHES", 1).run();
    report.expect_success();
    for outcome in &report.outcomes {
        let lines = outcome.stderr.lines().filter(|line| line.starts_with("launch "));
        // The words behind the two addresses; the count is the third, so calls of other counts drop out.
        let same: Vec<_> = lines.map(split).filter(|(_, words)| words[2] == "500").collect();
        assert!(same.len() >= 4, "{outcome}");
        for (kernel, words) in &same {
            let (first_kernel, first) = &same[same.len() - 1];
            assert_eq!(words[2..], first[2..], "{outcome}");
            // The known answer of set-up and other counts use other kernels; these are one and the same.
            assert_eq!(kernel, first_kernel, "{outcome}");
        }
    }
}

fn split(line: &str) -> (String, Vec<String>) {
    let (kernel, words) = line.split_once(" words ").expect("a launch line");
    (kernel.to_owned(), words.split(' ').map(str::to_owned).collect())
}

#[test]
fn after_set_up_a_routed_call_makes_only_the_driver_calls_of_a_launch() {
    let calls = |reps: u32| {
        let program = format!("allreduce count=1000; allreduce count=1000 reps={reps}; destroy");
        let report = job(&program).run();
        report.expect_success().expect_on();
        let stats = stats(&report, 0);
        assert_eq!(stats.total("lazy_loads"), 0, "a kernel was loaded by its first launch");
        stats
    };
    let (few, many) = (calls(20), calls(120));
    let more = |name: &str| many.calls(name) as i64 - few.calls(name) as i64;
    // One launch and one event record a call.
    assert_eq!((more("cuLaunchKernelEx"), more("cuEventRecord")), (100, 100));
    // The worker's own calls are copies, fills and queries of its stream; everything else is ours.
    for prefix in [
        "cuMemCreate",
        "cuMemMap",
        "cuMemAddress",
        "cuMemSetAccess",
        "cuMemExport",
        "cuMemImport",
        "cuMemHost",
        "cuMemAlloc",
        "cuMemFree",
        "cuMemRelease",
        "cuMemUnmap",
        "cuStreamCreate",
        "cuStreamDestroy",
        "cuStreamWait",
        "cuEventCreate",
        "cuEventDestroy",
        "cuEventSync",
        "cuModule",
        "cuFunc",
        "cuMulticast",
        "cuCtxSynchronize",
        "cuCtxPush",
        "cuLaunchHostFunc",
        "cuUserObject",
        "cuGraph",
        "cuDevicePrimary",
        "nvml",
    ] {
        let (few, many) = (few.calls_beginning(prefix), many.calls_beginning(prefix));
        assert_eq!(few, many, "{prefix}* is called by an AllReduce");
    }
}
