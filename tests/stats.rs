//! The counters of a running program, read from outside and written to a file.
mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Door, Job, Report};
use serde_json::Value;
use twoshot_sim::Topology;

/// Three calls of one-shot, two of two-shot, one empty, one too large.
const CALLS: &str = "allreduce count=100 reps=3; allreduce count=10000 reps=2; allreduce count=0; \
                     allreduce count=100000";

fn job(program: &str) -> Job {
    Job::new(Topology::one_host(2), program)
        .env("TWOSHOT_MAX_BLOCKS", 1)
        .env("TWOSHOT_MAX_BYTES", "64K")
        .env("TWOSHOT_ONESHOT_MAX_BYTES", "16K")
}

fn stats(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twoshot"));
    command.arg("stats").args(args).stdin(Stdio::null()).output().expect("stats starts")
}

/// The ways of a communicator as `route[ reason] calls bytes`.
fn ways(value: &Value) -> Vec<String> {
    let ways = value.as_array().expect("a list").iter();
    ways.map(|way| {
        let reason = way["reason"].as_str().map(|reason| format!(" {reason}")).unwrap_or_default();
        format!("{}{reason} {} {}", way["route"].as_str().expect("a route"), way["calls"], way["bytes"])
    })
    .collect()
}

const WAYS: [&str; 4] = ["oneshot 3 1200", "twoshot 2 80000", "stock empty 1 0", "stock size 1 400000"];

fn read(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).expect("JSON")
}

/// The processes whose environment holds this text.
fn processes_with(text: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("processes").flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let holds = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == text.as_bytes())
    };
    numbers.filter(holds).collect()
}

#[test]
fn a_running_programs_calls_are_shown_by_route_reason_and_size() {
    let mark = format!("TWOSHOT_SIM_MARK=stats-{}", std::process::id());
    let (name, value) = mark.split_once('=').expect("a pair");
    let job = job(&format!("{CALLS}; sleep ms=20000; destroy; release")).env(name, value);
    let running = std::thread::spawn(move || job.run());
    let start = Instant::now();
    let seen = loop {
        assert!(start.elapsed() < Duration::from_secs(60), "no communicator with all its calls was ever seen");
        let outputs = processes_with(&mark).into_iter().map(|pid| (pid, stats(&["--json", &pid.to_string()])));
        let parsed = outputs.filter_map(|(pid, output)| Some((pid, serde_json::from_slice(&output.stdout).ok()?)));
        let complete = |one: &(u32, Value)| {
            let communicators = one.1["communicators"].as_array().expect("a list");
            communicators.len() == 1 && ways(&communicators[0]["ways"]) == WAYS
        };
        let complete: Vec<(u32, Value)> = parsed.filter(complete).collect();
        if complete.len() == 2 {
            break complete;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    for (pid, value) in &seen {
        assert_eq!(value["pid"], *pid);
        let communicator = &value["communicators"][0];
        assert_eq!((&communicator["standing"], &communicator["ranks"]), (&"on".into(), &2.into()));
        assert_eq!(communicator["ways"][0]["sizes"], serde_json::json!([{"up_to": 512, "calls": 3, "bytes": 1200}]));
        let screen = stats(&[&pid.to_string()]);
        let screen = String::from_utf8(screen.stdout).expect("text");
        assert!(screen.contains("/2: ON\n") && screen.contains("3 to 512 B"), "{screen}");
    }
    let report = running.join().expect("the job");
    report.expect_success();
    for (pid, _) in seen {
        assert!(String::from_utf8_lossy(&stats(&[&pid.to_string()]).stderr).contains("there is no such process"));
    }
}

#[test]
fn the_file_is_written_at_the_end_of_a_communicator_and_of_the_process() {
    // What runs behind the last communicator's end, and a program that ends without destroying any.
    for end in ["; destroy; release", "; leave"] {
        for door in [Door::Plugin, Door::Preload, Door::Path] {
            let folder =
                std::env::temp_dir().join(format!("twoshot-stats-{}-{door:?}{}", std::process::id(), end.len()));
            fs::create_dir_all(&folder).expect("a folder");
            let job =
                job(&format!("{CALLS}{end}")).door(door).env("TWOSHOT_STATS", folder.join("%h-%p.json").display());
            let report: Report = job.run();
            report.expect_success();
            let mut names: Vec<_> = fs::read_dir(&folder).expect("a folder").flatten().map(|e| e.path()).collect();
            names.sort();
            assert_eq!(names.len(), 2, "one file per process: {names:?}");
            for outcome in &report.outcomes {
                let tail = format!("-{}.json", outcome.pid);
                let path = names.iter().find(|path| path.to_string_lossy().ends_with(&tail));
                let value = read(path.expect("named after the process"));
                assert_eq!(value["version"], env!("CARGO_PKG_VERSION"));
                let (counted, ended) = match end {
                    "; leave" => (&value["communicators"][0]["ways"], 0),
                    _ => (&value["ended_ways"], 1),
                };
                assert_eq!(ways(counted), WAYS, "{value}");
                assert_eq!(value["ended"], ended, "{value}");
            }
            fs::remove_dir_all(folder).expect("it was there");
        }
    }
}

#[test]
fn where_it_is_asked_for_some_calls_are_timed_on_the_device_by_route_and_size() {
    let folder = std::env::temp_dir().join(format!("twoshot-sample-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    // Of 19 calls that are not captured and 3 that are.
    for (every, timed) in [("1", 19..=19), ("3", 5..=8), ("0", 0..=0)] {
        // Captured calls and groups in between; a routed call of a group is timed, one of a capture is not.
        let program = "init; allreduce count=10; repeat n=3; allreduce count=100; allreduce count=10000; \
            allreduce count=100000; capture counts=300; replay; drop_graphs; group_start; allreduce count=100; group_end; \
            allreduce count=10000; allreduce count=100000; end; sleep ms=60; destroy; release";
        let report =
            job(program).env("TWOSHOT_STATS", folder.join("%p.json").display()).env("TWOSHOT_SAMPLE", every).run();
        report.expect_success().expect_on().expect_nothing_live();
        for outcome in &report.outcomes {
            let value = read(&folder.join(format!("{}.json", outcome.pid)));
            let sum = |of: &Value| of.as_u64().unwrap_or(0);
            let ways = value["ended_ways"].as_array().expect("a list").iter();
            let sizes: Vec<_> = ways.flat_map(|way| way["sizes"].as_array().expect("a list")).collect();
            assert!(sizes.iter().all(|size| (sum(&size["timed"]) > 0) == (sum(&size["timed_ns"]) > 0)), "{value}");
            assert!(timed.contains(&sizes.iter().map(|size| sum(&size["timed"])).sum::<u64>()), "{every}: {value}");
        }
    }
    fs::remove_dir_all(folder).expect("it was there");
}

#[test]
fn a_file_that_cannot_be_written_is_one_warning_and_changes_nothing() {
    let report = job(&format!("{CALLS}; destroy; release")).env("TWOSHOT_STATS", "/nowhere/stats.json").run();
    report.expect_success().expect_on();
    for rank in 0..2 {
        let lines = report.lines(rank);
        let said = lines.iter().filter(|line| line.contains("TWOSHOT_STATS=/nowhere/stats.json: No such file")).count();
        assert!(said >= 1, "{lines:?}");
    }
}

#[test]
fn memory_that_only_has_the_name_is_one_line_and_no_crash() {
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::io::Write;
    let pid = std::process::id().to_string();
    for (bytes, words) in [
        (vec![], "not the memory of twoshot's counters"),
        (vec![1, 2, 3], "another size"),
        (vec![0xff; 1 << 20], "not the memory of twoshot's counters"),
        (twoshot::stats::MAGIC.to_le_bytes().to_vec(), "have layout 0"),
        (
            [twoshot::stats::MAGIC, twoshot::stats::VERSION].map(u64::to_le_bytes).concat(),
            "use the same version of both",
        ),
    ] {
        let file = memfd_create(twoshot::stats::NAME, MemfdFlags::CLOEXEC).expect("an anonymous file");
        let mut file = fs::File::from(file);
        file.write_all(&bytes).expect("written");
        let output = stats(&[&pid]);
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains(words), "{said}");
    }
}
