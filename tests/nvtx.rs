//! Ranges for profilers: there where a profiler asks for them, and only there.
mod common;

use std::path::PathBuf;
use std::process::Command;

use common::Job;
use twoshot_sim::Topology;

/// A small profiler, compiled for this test.
struct Profiler(PathBuf);

impl Profiler {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("twoshot-nvtx-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let library = folder.join("libprofiler.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nvtx/profiler.c");
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let mut command = Command::new(compiler);
        command.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]).arg(&library).arg(source);
        assert!(command.status().expect("a C compiler").success());
        Self(folder)
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn job() -> Job {
    // One-shot, two-shot, stock.
    let program = "allreduce count=100 reps=2; allreduce count=10000; allreduce count=100000; destroy";
    Job::new(Topology::one_host(2), program)
        .env("TWOSHOT_MAX_BYTES", "64K")
        .env("TWOSHOT_ONESHOT_MAX_BYTES", "16K")
        .env("TWOSHOT_MAX_BLOCKS", 1)
}

#[test]
fn a_profiler_sees_the_set_up_and_every_routed_call_as_a_range_that_ends() {
    let profiler = Profiler::new();
    let report = job().env("NVTX_INJECTION64_PATH", profiler.0.join("libprofiler.so").display()).run();
    report.expect_success().expect_on();
    for outcome in &report.outcomes {
        let said: Vec<_> = outcome.stderr.lines().collect();
        assert_eq!(said[0], "injected", "{outcome}");
        let expected =
            ["set-up of a communicator", "AllReduce, one-shot", "AllReduce, one-shot", "AllReduce, two-shot"];
        let expected: Vec<_> =
            expected.iter().flat_map(|name| [format!("push twoshot: {name}"), "pop".to_owned()]).collect();
        assert_eq!(said[1..], expected, "{outcome}");
    }
}

#[test]
fn a_profiler_that_cannot_be_opened_changes_nothing() {
    let report = job().env("NVTX_INJECTION64_PATH", "/nowhere/libprofiler.so").run();
    report.expect_success().expect_on();
    assert_eq!(report.counters(0), (3, 1));
}
