//! Processes: fork, preload into strangers, and every way to exit.
mod common;
#[path = "common/script.rs"]
mod script;

use std::process::Command;

use common::{Door, Job};
use script::{field, lines_of, routed};
use twoshot_sim::{Topology, twoshot_library};

#[test]
fn a_child_forked_after_use_is_left_to_stock_and_the_parent_goes_on() {
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let program = "allreduce count=100 reps=2; fork; allreduce count=100; destroy";
        let report = Job::new(Topology::one_host(2), program).door(door).run();
        report.expect_success().expect_on();
        for outcome in &report.outcomes {
            let child = lines_of(outcome, "child");
            assert_eq!(child.len(), 1, "{outcome}");
            assert_eq!(field(child[0], "routed"), 2.0, "the child routed a call: {outcome}");
            assert_eq!(routed(outcome), 3, "{outcome}");
        }
    }
}

#[test]
fn preloaded_into_a_program_without_cuda_it_opens_nothing_and_starts_nothing() {
    let script = "(cat /proc/self/status | grep Threads; ls /proc/self/fd | wc -l; cat /proc/self/maps) & wait";
    let run = |preload: bool| {
        let mut command = Command::new("sh");
        command.args(["-c", script]).env_remove("LD_PRELOAD");
        if preload {
            command.env("LD_PRELOAD", twoshot_library());
        }
        let output = command.output().expect("a shell");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (with, without) = (run(true), run(false));
    assert!(with.contains("libtwoshot.so") && !without.contains("libtwoshot.so"));
    for library in ["libcuda", "libnvidia-ml", "libnccl", "/dev/nvidia"] {
        assert!(!with.contains(library), "{library} is open:\n{with}");
    }
    let head = |text: &str| text.lines().take(2).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(head(&with), head(&without), "threads or descriptors");
    assert!(with.starts_with("Threads:\t1\n"), "{with}");
}

#[test]
fn every_way_to_exit_without_destroy_is_clean_and_calls_no_driver_afterwards() {
    // Behind a replay all wait for all: stock NCCL calls a peer that is gone an error, even to who needs nothing of it.
    let ends = [
        "leave",
        "quit code=0",
        "exit code=0",
        "capture counts=50; replay; barrier; leave",
        "capture counts=50; replay; barrier; quit",
        "destroy; leave",
        "abort; quit",
    ];
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        for end in ends {
            let program = format!("allreduce count=100 reps=2; barrier; {end}");
            let report = Job::new(Topology::one_host(2), &program).door(door).run();
            report.expect_success();
            for outcome in &report.outcomes {
                let stats = report.session.stats(outcome.pid).expect("stats");
                assert_eq!(stats.total("calls_after_exit"), 0, "{door:?}, {end}: {outcome}");
                assert!(!outcome.stderr.contains("panicked"), "{outcome}");
            }
        }
    }
}

#[test]
fn exit_while_a_kernel_spins_ends_the_process() {
    // The rank that exits has a call in flight that can never end; its peer aborts.
    let program = "allreduce count=100; hold; allreduce count=100 on=0; sleep ms=100; quit on=0; abort on=1; leave";
    let report = Job::new(Topology::one_host(2), program).env("TWOSHOT_TIMEOUT_MS", 0).run();
    report.expect_success();
}
