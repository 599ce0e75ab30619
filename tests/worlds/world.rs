//! Worlds of simulated ranks: how they lie on hosts, which sizes sit on an edge, and what their results' digests say.
#![allow(dead_code, reason = "every test program uses another part")]

use std::fmt::Write;

use twoshot_sim::{Host, Topology};

use crate::common::{Job, Report};

/// Cluster of the fabrics made here.
pub const CLUSTER: [u8; 16] = *b"one-nvlink-world";
/// The routed types: the worker's name, and bytes of an element.
pub const TYPES: [(&str, u64); 3] = [("f32", 4), ("f16", 2), ("bf16", 2)];

/// Hosts of one NVLink fabric with so many GPUs each; a single host is one without a fabric beyond it.
pub fn hosts(gpus: &[u32]) -> Topology {
    match gpus {
        [one] => Topology::one_host(*one),
        many => Topology::of(many.iter().map(|gpus| Host::in_fabric(*gpus, CLUSTER, 1)).collect()),
    }
}

/// Payload limits of a communicator, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub ranks: u64,
    pub oneshot: u64,
    pub most: u64,
}

impl Limits {
    /// Small, so that every edge is near; neither is a whole number of lines.
    pub fn of(ranks: u64) -> Self {
        Self { ranks, oneshot: 1030, most: (2 * ranks * 128 + 260).max(1500) }
    }

    /// Element counts just below, on and just above every edge of the layout: line, slot, shard, switch of the
    /// algorithm, largest payload.
    pub fn counts(self, size: u64) -> Vec<u64> {
        let shards = self.ranks * 128;
        let edges = [16, 128, 256, self.oneshot, shards, 2 * shards, self.most];
        let near = edges.iter().flat_map(|edge| [edge / size - 1, edge / size, edge / size + 1]);
        let mut counts: Vec<u64> = near.chain([1, 2, 3]).filter(|count| *count > 0).collect();
        counts.sort_unstable();
        counts.dedup();
        // Neighbours in time should differ much in size: what a stage was used for last must not matter.
        let (low, high) = counts.split_at(counts.len() / 2);
        let (mut low, mut high) = (low.to_vec(), high.to_vec());
        let mut shuffled = Vec::new();
        while let Some(count) = high.pop() {
            shuffled.push(count);
            shuffled.extend(low.pop());
        }
        shuffled
    }

    /// The worker's program over all types, and the number of its calls that twoshot takes.
    pub fn program(self) -> (String, u64) {
        let (mut program, mut routed) = (String::new(), 0);
        for (dtype, size) in TYPES {
            let counts = self.counts(size);
            routed += counts.iter().filter(|count| *count * size <= self.most).count() as u64;
            let list: Vec<_> = counts.iter().map(u64::to_string).collect();
            let _ = write!(program, "allreduce dtype={dtype} counts={} mixed seed={}; ", list.join(","), self.ranks);
        }
        program.push_str("destroy");
        (program, routed)
    }
}

/// Which algorithm the ranks are told to use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Algo {
    /// Both, by size.
    Auto,
    OneShot,
    TwoShot,
    /// Through the ring: unicast, up to 16 ranks.
    Bulk,
}

impl Algo {
    /// Sets its variables, so that payloads up to `limits.most` are taken in every case.
    pub fn on(self, job: Job, limits: Limits) -> Job {
        match self {
            Self::Auto => job.env("TWOSHOT_ONESHOT_MAX_BYTES", limits.oneshot).env("TWOSHOT_MAX_BYTES", limits.most),
            Self::OneShot => job.env("TWOSHOT_ALGO", "oneshot").env("TWOSHOT_ONESHOT_MAX_BYTES", limits.most),
            Self::TwoShot => job.env("TWOSHOT_ALGO", "twoshot").env("TWOSHOT_MAX_BYTES", limits.most),
            Self::Bulk => {
                job.env("TWOSHOT_ALGO", "bulk").env("TWOSHOT_MAX_BYTES", limits.most).env("TWOSHOT_MULTICAST", 0)
            }
        }
    }
}

/// The digests of a job's results, one per command, which must be the same on every rank.
#[track_caller]
pub fn digests(report: &Report) -> Vec<u64> {
    let of = |rank: usize| -> Vec<u64> {
        let lines = report.outcomes[rank].stdout.lines();
        lines.filter_map(|line| line.split_once("\"digest\":")?.1.split([',', '}']).next()?.parse().ok()).collect()
    };
    let first = of(0);
    assert!(!first.is_empty(), "no digest: {}", report.outcomes[0]);
    for rank in 1..report.outcomes.len() {
        assert_eq!(first, of(rank), "rank {rank} has other bits than rank 0: {}", report.outcomes[rank]);
    }
    first
}

/// Every rank is on, over this wire.
#[track_caller]
pub fn expect_wire(report: &Report, wire: &str) {
    report.expect_on();
    for (rank, outcome) in report.outcomes.iter().enumerate() {
        let wired =
            report.lines(rank).iter().any(|line| line.contains(": ON,") && line.contains(&format!(", {wire},")));
        assert!(wired, "not over {wire}: {outcome}");
    }
}

/// Every rank routed this many calls.
#[track_caller]
pub fn expect_routed(report: &Report, routed: u64) {
    for (rank, outcome) in report.outcomes.iter().enumerate() {
        assert_eq!(report.counters(rank).0, routed, "calls routed: {outcome}");
    }
}

/// How often the ranks together called the driver's entries that begin so.
pub fn calls_beginning(report: &Report, prefix: &str) -> u64 {
    let pids = report.outcomes.iter().map(|outcome| outcome.pid);
    pids.map(|pid| report.session.stats(pid).expect("stats of a rank").calls_beginning(prefix)).sum()
}

/// The ranks hold nothing of the driver but what the program itself made: its context, stream and buffers.
#[track_caller]
pub fn expect_nothing_left(report: &Report) {
    const OWN: [&str; 4] = ["contexts", "streams", "device_allocations", "device_bytes"];
    for outcome in &report.outcomes {
        let stats = report.session.stats(outcome.pid).expect("stats of a rank");
        stats.assert_nothing_live_but(&OWN);
        assert!(
            stats.live("contexts") <= 1 + stats.live("modules") && stats.live("streams") <= 1,
            "left behind: {:?}",
            stats.all_live()
        );
    }
}
