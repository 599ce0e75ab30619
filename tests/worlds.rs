//! Worlds of 2 to 72 simulated ranks: at every edge of the layout the results are bit for bit those of the CPU
//! reference, whatever the algorithm, the wire, the split into hosts and each rank's own placement of its buffers.
mod common;
#[path = "worlds/world.rs"]
mod world;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use common::{Job, Report};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use world::{Algo, Limits, digests, expect_routed, expect_wire, hosts};

/// Large worlds one at a time: all of them share two cores.
static TURN: Mutex<()> = Mutex::new(());

fn run(gpus: &[u32], algo: Algo, multicast: bool) -> Report {
    let limits = Limits::of(gpus.iter().map(|gpus| u64::from(*gpus)).sum());
    let (program, routed) = limits.program();
    let job = Job::new(hosts(gpus), &program).env("TWOSHOT_MULTICAST", u8::from(multicast));
    let report = algo.on(job, limits).timeout(Duration::from_secs(200)).run();
    report.expect_success();
    expect_wire(&report, if multicast { "multicast" } else { "unicast" });
    expect_routed(&report, routed);
    report
}

/// All runs agree with the reference (the worker looks) and with each other, to the last bit of every NaN.
fn all_agree(gpus: &[u32], algos: &[Algo]) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut first = None;
    for algo in algos {
        for multicast in [true, false] {
            let report = run(gpus, *algo, multicast);
            world::expect_nothing_left(&report);
            let found = digests(&report);
            assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{gpus:?} {algo:?} multicast={multicast}");
        }
    }
}

const ALL: [Algo; 3] = [Algo::Auto, Algo::OneShot, Algo::TwoShot];

#[test]
fn two_ranks_on_one_host_or_on_two_give_the_reference_bits() {
    all_agree(&[2], &ALL);
    all_agree(&[1, 1], &ALL);
}

#[test]
fn three_and_five_ranks_give_the_reference_bits() {
    all_agree(&[3], &ALL);
    all_agree(&[2, 1], &[Algo::Auto]);
    all_agree(&[4, 1], &ALL);
}

#[test]
fn four_ranks_give_the_reference_bits() {
    all_agree(&[4], &ALL);
    all_agree(&[1, 2, 1], &[Algo::Auto]);
}

#[test]
fn eight_ranks_on_one_host_or_on_two_give_the_reference_bits() {
    all_agree(&[4, 4], &ALL);
    all_agree(&[8], &[Algo::Auto]);
}

#[test]
fn twelve_and_sixteen_ranks_give_the_reference_bits() {
    all_agree(&[4, 3, 4, 1], &[Algo::OneShot, Algo::TwoShot]);
    all_agree(&[4, 4, 4, 4], &[Algo::Auto]);
}

#[test]
fn twenty_four_ranks_in_an_odd_split_give_the_reference_bits() {
    all_agree(&[4, 4, 3, 4, 2, 1, 4, 2], &[Algo::Auto]);
}

#[test]
fn nine_hosts_of_four_give_the_reference_bits() {
    all_agree(&[4; 9], &[Algo::Auto]);
}

#[test]
fn eighteen_hosts_of_four_give_the_reference_bits() {
    all_agree(&[4; 18], &[Algo::Auto]);
}

#[test]
fn with_the_tables_own_limits_the_edges_are_right_too() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Unicast on four GPUs of this generation: one-shot to 128 KiB, two-shot to 4 MiB.
    let edges = |size: u64| [(128 << 10) / size, (4 << 20) / size];
    let (mut program, mut routed) = (String::new(), 0);
    for (dtype, size) in world::TYPES {
        let counts: Vec<_> = edges(size).into_iter().flat_map(|edge| [edge - 1, edge, edge + 1]).collect();
        routed += counts.len() as u64 - 1;
        let counts: Vec<_> = counts.iter().map(u64::to_string).collect();
        program.push_str(&format!("allreduce dtype={dtype} counts={} mixed; ", counts.join(",")));
    }
    let report = Job::new(hosts(&[4]), &program).env("TWOSHOT_MULTICAST", 0).run();
    report.expect_success();
    expect_routed(&report, routed);
    world::expect_nothing_left(&report);
}

#[test]
fn ranks_on_interleaved_hosts_give_the_reference_bits() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Every second rank of a split communicator: its ranks alternate between hosts.
    let program = "init; split mod=3; allreduce counts=5,300,500 mixed; use comm=0; split none=2 reverse=1; \
                   allreduce dtype=bf16 counts=7,700,1000 mixed; destroy; destroy; destroy";
    let limits = Limits::of(7);
    let job = Algo::Auto.on(Job::new(hosts(&[3, 1, 3]), program), limits);
    let report = job.run();
    report.expect_success();
    world::expect_nothing_left(&report);
    // Ranks 0, 3, 6 are a trio; 1, 4 and 2, 5 are pairs; and rank 2 is in no second split.
    for rank in 0..7 {
        assert_eq!(report.counters(rank).0, if rank == 2 { 3 } else { 6 }, "{}", report.outcomes[rank]);
    }
}

/// Runs 72 ranks whose processes start with this stack limit, in bytes; `None` is no limit.
fn with_stack(limit: Option<u64>) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let usual = getrlimit(Resource::Stack);
    // Processes inherit it; threads of this one that run already keep what they have.
    if let Err(errno) = setrlimit(Resource::Stack, Rlimit { current: limit, maximum: usual.maximum }) {
        eprintln!("a stack limit of {limit:?} is not permitted here ({errno}): skipped");
        return;
    }
    let program = "allreduce dtype=f32 counts=7,3000 mixed; allreduce dtype=bf16 counts=900 mixed; destroy";
    let limits = Limits::of(72);
    // 72 processes take turns on two cores; the deadline is not what is tested here.
    let job = Job::new(hosts(&[4; 18]), program).env("TWOSHOT_SETUP_TIMEOUT_MS", 120_000);
    let report = Algo::Auto.on(job, limits).run();
    setrlimit(Resource::Stack, usual).expect("the limit there was");
    report.expect_success();
    expect_wire(&report, "multicast");
    expect_routed(&report, 3);
    world::expect_nothing_left(&report);
}

#[test]
fn seventy_two_ranks_run_on_stacks_of_256_kib() {
    with_stack(Some(256 << 10));
}

#[test]
fn seventy_two_ranks_run_without_a_stack_limit() {
    with_stack(None);
}
