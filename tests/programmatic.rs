//! Programmatic dependent launch: which kernels may overlap with what is before and behind them in their stream.
mod common;

use common::Job;
use twoshot_sim::{Outcome, Topology};

/// A launch: `(may start before its predecessor ends, lets its successor start before it ends)`.
type Overlap = (bool, bool);

/// The launches of so many elements, in order; those of set-up have other counts.
fn launches(outcome: &Outcome, counts: &[u64]) -> Vec<Overlap> {
    let lines = outcome.stderr.lines().filter(|line| line.starts_with("launch "));
    let parsed = lines.filter(|line| !line.contains("twoshot_scale_")).map(|line| {
        let (head, words) = line.split_once(" words ").expect("a launch line");
        let words: Vec<u64> = words.split(' ').map(|word| word.parse().expect("a number")).collect();
        // The last word: the operation, then type and trigger.
        (words[2], (head.ends_with(" programmatic"), words[10] >> 48 != 0))
    });
    parsed.filter(|(count, _)| counts.contains(count)).map(|(_, overlap)| overlap).collect()
}

fn run(program: &str, env: &[(&str, &str)], counts: &[u64]) -> Vec<Vec<Overlap>> {
    let job = Job::new(Topology::one_host(2), program).env("TWOSHOT_SIM_LAUNCHES", 1).env("TWOSHOT_MAX_BYTES", "16M");
    let report = env.iter().fold(job, |job, (name, value)| job.env(name, value)).run();
    report.expect_success().expect_on();
    report.outcomes.iter().map(|outcome| launches(outcome, counts)).collect()
}

/// Two launches of 1 Mi elements and one of 77.
const LARGE: &str = "allreduce count=2097229 path=routed";
const PIECES: [u64; 2] = [1 << 20, 77];

#[test]
fn a_call_lets_no_kernel_of_the_program_in_and_its_launches_only_each_other() {
    let program = format!("init; allreduce count=5; {LARGE}; allreduce count=500 reps=2 path=routed; destroy");
    for rank in run(&program, &[], &[PIECES[0], PIECES[1], 500]) {
        assert_eq!(rank, [(true, true), (true, true), (true, false), (true, false), (true, false)]);
    }
}

#[test]
fn where_the_user_says_that_what_comes_behind_waits_it_is_let_in() {
    let program = format!("init; allreduce count=5; {LARGE}; allreduce count=500 reps=2 path=routed; destroy");
    for rank in run(&program, &[("TWOSHOT_PDL", "1")], &[PIECES[0], PIECES[1], 500]) {
        assert_eq!(rank, [(true, true); 5]);
    }
}

#[test]
fn where_a_device_has_two_communicators_nothing_is_let_in() {
    let program = format!("init; allreduce count=5; split color=0; allreduce count=6; {LARGE}; destroy; destroy");
    for rank in run(&program, &[("TWOSHOT_PDL", "1")], &PIECES) {
        assert_eq!(rank, [(true, false); 3]);
    }
}

#[test]
fn a_captured_call_behind_one_on_another_stream_starts_behind_both_of_its_predecessors() {
    let program = "init; allreduce count=5; capture streams=2 counts=500,500,500; replay; drop_graphs; destroy";
    for rank in run(program, &[("TWOSHOT_PDL", "1")], &[500]) {
        assert!(rank.contains(&(true, true)) && rank.contains(&(false, true)), "{rank:?}");
    }
}
