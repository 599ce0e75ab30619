//! Reading what a worker printed, and jobs of one process with several GPUs.
#![allow(dead_code, reason = "every test program uses another part")]

use std::time::Duration;

use twoshot_sim::{Outcome, Rank, Session, Topology, twoshot_library, worker};

/// The lines of one command, in order.
pub fn lines_of<'a>(outcome: &'a Outcome, command: &str) -> Vec<&'a str> {
    let start = format!("{{\"cmd\":\"{command}\"");
    outcome.stdout.lines().filter(|line| line.starts_with(&start)).collect()
}

/// A number of a line, or of the summary.
#[track_caller]
pub fn field(line: &str, key: &str) -> f64 {
    let key = format!("\"{key}\":");
    let at = line.find(&key).unwrap_or_else(|| panic!("no {key} in {line}")) + key.len();
    let digits: String = line[at..].chars().take_while(|c| c.is_ascii_digit() || "-.".contains(*c)).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number after {key} in {line}"))
}

/// The last line of a worker that ended by itself.
#[track_caller]
pub fn summary(outcome: &Outcome) -> &str {
    let found = outcome.stdout.lines().rev().find(|line| line.starts_with("{\"summary\""));
    found.unwrap_or_else(|| panic!("no summary: {outcome}"))
}

/// Milliseconds of the last command of this name.
#[track_caller]
pub fn ms(outcome: &Outcome, command: &str) -> f64 {
    let lines = lines_of(outcome, command);
    field(lines.last().unwrap_or_else(|| panic!("no {command}: {outcome}")), "ms")
}

/// AllReduce calls that twoshot's kernels ran and those that the simulated NCCL was asked for.
#[track_caller]
pub fn routed(outcome: &Outcome) -> u64 {
    field(summary(outcome), "routed") as u64
}

/// AllReduce calls that stock NCCL executed.
#[track_caller]
pub fn stock_runs(outcome: &Outcome) -> u64 {
    field(summary(outcome), "nccl_allreduce_runs") as u64
}

/// One process that drives all GPUs of a host, with one thread (`--gpus`) or one each (`--threads`).
pub fn one_process(gpus: u32, how: &str, program: &str, env: &[(&str, &str)]) -> (Session, Outcome) {
    let session = Session::new(&Topology::one_host(gpus)).expect("a session directory");
    let all: Vec<String> = (0..gpus).map(|gpu| gpu.to_string()).collect();
    let count = gpus.to_string();
    let mut rank = Rank::new(worker())
        .gpus(&all.join(","))
        .args(["--rank", "0", "--ranks", &count, how, &count, "--program", program, "--id"])
        .arg(session.dir().join("unique-id"))
        .env("NCCL_NET_PLUGIN", twoshot_library())
        .env("NCCL_DEBUG", "INFO")
        .env("TWOSHOT_TIMEOUT_MS", "20000");
    for (name, value) in env {
        rank = rank.env(name, value);
    }
    let mut outcomes = session.run_all([rank], Duration::from_secs(60)).expect("the process was started");
    let outcome = outcomes.pop().expect("one outcome");
    (session, outcome)
}
