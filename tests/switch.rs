//! Sums made by the NVLink switch (`TWOSHOT_SWITCH_REDUCE`), on a simulated one that adds in an order of its own: within
//! what docs/numerics.md allows, the same bits on every rank, and only where every rank asked and has multicast.
mod common;
#[path = "worlds/world.rs"]
mod world;

use std::fmt::Write;
use std::time::Duration;

use common::{Job, Report};
use twoshot_sim::Topology;
use world::{TYPES, calls_beginning, digests, expect_nothing_left, expect_routed, expect_wire, hosts};

/// Integers whose sum over up to 72 ranks every type holds exactly: 1, -2, 3, for 16-bit types in both halves.
const INTEGERS: [(&str, &str); 3] = [
    ("f32", "3f800000,c0000000,40400000"),
    ("f16", "c0003c00,42003c00,4200c000"),
    ("bf16", "c0003f80,40403f80,4040c000"),
];

fn job(topology: Topology, program: &str) -> Job {
    Job::new(topology, program).env("TWOSHOT_SWITCH_REDUCE", 1)
}

/// Every sum in the switch, whatever its size.
fn forced(topology: Topology, program: &str) -> Job {
    job(topology, program).env("TWOSHOT_ALGO", "switch")
}

/// How many calls of a rank ran as what, by the line at the communicator's end.
fn ran(report: &Report, rank: usize, what: &str) -> u64 {
    let lines = report.lines(rank);
    let end = lines.iter().find(|line| line.contains(" ends: ")).unwrap_or_else(|| panic!("{}", report.outcomes[rank]));
    let counts = end.split_once(" ends: ").expect("just found").1.split([',', ';']);
    let of = counts.filter_map(|part| part.trim().strip_prefix(what)?.strip_prefix(' ')?.parse().ok()).next();
    of.unwrap_or(0)
}

#[track_caller]
fn expect_in_switch(report: &Report, calls: u64) {
    for rank in 0..report.outcomes.len() {
        assert_eq!(ran(report, rank, "switch"), calls, "{}", report.outcomes[rank]);
        let told = report.lines(rank).iter().any(|line| line.contains(": ON,") && line.contains("sums in the switch"));
        assert_eq!(told, calls > 0, "{}", report.outcomes[rank]);
    }
}

/// Counts on both sides of every edge: line, shard, chunk of a shard, largest payload.
fn counts(ranks: u64, size: u64, most: u64, chunks: bool) -> Vec<u64> {
    let (shards, chunk) = (ranks * 128, ranks * 2048);
    let edges = [16, shards, if chunks { chunk } else { 2 * shards }, most];
    let near = edges.iter().flat_map(|edge| [edge / size - 1, edge / size, edge / size + 1]);
    // The largest first: what a stage was used for last must not matter.
    let mut counts: Vec<u64> = near.chain([1]).filter(|count| *count > 0).collect();
    counts.sort_unstable();
    counts.dedup();
    counts.reverse();
    counts
}

/// One world: random payloads of everything within the tolerance, integers exactly, the same bits everywhere.
fn sums_are_right(gpus: &[u32], types: &[(&str, u64)], chunks: bool) {
    let ranks = gpus.iter().map(|gpus| u64::from(*gpus)).sum();
    let most = if chunks { ranks * 2048 + 1000 } else { 2 * ranks * 128 + 260 };
    let (mut program, mut routed) = (String::new(), 0);
    for (dtype, size) in types {
        let counts = counts(ranks, *size, most, chunks);
        routed += counts.iter().filter(|count| *count * size <= most).count() as u64;
        let list: Vec<_> = counts.iter().map(u64::to_string).collect();
        let _ = write!(program, "allreduce dtype={dtype} counts={} mixed exact=3 seed={ranks}; ", list.join(","));
        let words = INTEGERS.iter().find(|(name, _)| name == dtype).expect("a type").1;
        let _ = write!(program, "allreduce dtype={dtype} counts=3,{} mixed words={words}; ", most / size);
        routed += 2;
    }
    program.push_str("destroy");
    // Many processes take turns on few cores; the deadline is not what is tested here.
    let job = forced(hosts(gpus), &program).env("TWOSHOT_SETUP_TIMEOUT_MS", 120_000);
    let report = job.env("TWOSHOT_MAX_BYTES", most).timeout(Duration::from_secs(200)).run();
    report.expect_success();
    expect_wire(&report, "multicast");
    expect_routed(&report, routed);
    expect_in_switch(&report, routed);
    digests(&report);
    expect_nothing_left(&report);
}

#[test]
fn two_to_eight_ranks_get_the_switchs_sums_at_every_edge() {
    for gpus in [&[2][..], &[1, 1], &[3], &[4], &[4, 1], &[4, 4]] {
        sums_are_right(gpus, &TYPES, true);
    }
}

#[test]
fn twelve_and_twenty_four_ranks_in_odd_splits_get_the_switchs_sums() {
    sums_are_right(&[4, 3, 4, 1], &TYPES, false);
    sums_are_right(&[4, 4, 3, 4, 2, 1, 4, 2], &TYPES[..2], false);
}

#[test]
fn nine_and_eighteen_hosts_of_four_get_the_switchs_sums() {
    sums_are_right(&[4; 9], &TYPES[2..], false);
    sums_are_right(&[4; 18], &TYPES[..1], false);
}

#[test]
fn shuffled_late_and_torn_launches_change_nothing() {
    let program = "allreduce counts=900,5,40,1500 mixed exact=3 reps=3; allreduce dtype=bf16 counts=3000,1 mixed exact=3 \
                   reps=3; destroy";
    let job = forced(hosts(&[2, 1]), program).env("TWOSHOT_MAX_BYTES", 8192);
    let report = job.env("TWOSHOT_SIM_SHUFFLE", 1).env("TWOSHOT_SIM_SEED", 5).env("TWOSHOT_SIM_DELAY_US", 100).run();
    report.expect_success();
    expect_in_switch(&report, 18);
    digests(&report);
}

#[test]
fn by_itself_it_is_taken_from_where_the_model_says_among_one_shot_and_two_shot() {
    // Six ranks of this generation with multicast: one-shot to 64 KiB, two-shot to 2 MiB, in the switch 1 to 4 MiB.
    let program = "allreduce counts=300,20000 mixed; allreduce dtype=bf16 count=524288 mixed exact=3; \
                   allreduce dtype=f16 count=524287 mixed; allreduce dtype=f16 count=1048577 exact=3; \
                   allreduce op=max counts=20000,524289 mixed; allreduce dtype=i8 count=30000 mixed; destroy";
    let report = job(hosts(&[3, 3]), program).timeout(Duration::from_secs(200)).run();
    report.expect_success();
    expect_routed(&report, 7);
    expect_in_switch(&report, 2);
    assert_eq!((ran(&report, 0, "oneshot"), ran(&report, 0, "twoshot"), report.counters(0).1), (2, 3, 1));
    digests(&report);
    expect_nothing_left(&report);
}

#[test]
fn sums_of_nothing_but_the_word_that_means_not_here_yet_arrive() {
    let mut program = String::new();
    for (dtype, _) in TYPES {
        let _ = write!(program, "allreduce dtype={dtype} counts=3,700,64 mixed words=fffafffa exact=3; ");
        let _ = write!(program, "allreduce dtype={dtype} count=700 mixed words=fffafffa,3f803c00,fffafffb exact=3; ");
    }
    let report = forced(hosts(&[3]), &format!("{program}destroy")).env("TWOSHOT_MAX_BYTES", 8192).run();
    report.expect_success();
    expect_in_switch(&report, 12);
    digests(&report);
    expect_nothing_left(&report);
}

#[test]
fn a_payload_beyond_one_launch_takes_several() {
    let program = "allreduce dtype=f16 counts=2100000,90 mixed exact=3; destroy";
    let report = forced(hosts(&[2]), program).env("TWOSHOT_MAX_BYTES", "8M").run();
    report.expect_success();
    expect_in_switch(&report, 2);
    digests(&report);
}

#[test]
fn captured_calls_replay_among_eager_ones_of_every_kind() {
    let program = "allreduce count=10 exact=3; capture counts=100,1900,7 exact=3; replay n=3; allreduce count=70 exact=3; \
                   allreduce op=max count=900; capture counts=500 op=max; replay graph=1; replay graph=0 n=2; \
                   allreduce dtype=bf16 count=3000 exact=3; replay graph=1 n=2; replay graph=0; drop_graphs; sleep ms=60; destroy";
    let report = forced(hosts(&[3]), program).env("TWOSHOT_MAX_BYTES", 8192).run();
    report.expect_success().expect_on().expect_nothing_live();
    expect_in_switch(&report, 6);
    assert_eq!(ran(&report, 0, "twoshot"), 2);
}

const CALLS: &str = "allreduce dtype=f32 counts=3,300,1000 mixed; allreduce dtype=bf16 counts=900,17 mixed; \
                     allreduce dtype=f16 counts=40,801 mixed; destroy";

/// Bit for bit the fold in rank order, all of it routed, none of it in the switch.
#[track_caller]
fn expect_none(report: &Report, wire: &str) {
    report.expect_success();
    expect_wire(report, wire);
    expect_in_switch(report, 0);
    expect_routed(report, 7);
    expect_nothing_left(report);
}

#[test]
fn it_is_off_unless_every_rank_asks_for_it() {
    let unasked = || Job::new(hosts(&[2, 1]), CALLS).env("TWOSHOT_MAX_BYTES", 8192);
    expect_none(&unasked().run(), "multicast");
    expect_none(&unasked().env("TWOSHOT_ALGO", "switch").run(), "multicast");
    for rank in 0..3 {
        let report = forced(hosts(&[2, 1]), CALLS).env("TWOSHOT_MAX_BYTES", 8192);
        expect_none(&report.rank_env(rank, "TWOSHOT_SWITCH_REDUCE", 0).run(), "multicast");
    }
    // A word for two-shot is a word against it.
    let report = job(hosts(&[3]), CALLS).env("TWOSHOT_MAX_BYTES", 8192).env("TWOSHOT_ALGO", "twoshot").run();
    expect_none(&report, "multicast");
}

#[test]
fn without_multicast_on_any_rank_there_is_none() {
    let asked = || forced(hosts(&[2, 1]), CALLS).env("TWOSHOT_MAX_BYTES", 8192);
    for (rank, name) in [(0, "NCCL_NVLS_ENABLE"), (2, "TWOSHOT_MULTICAST")] {
        let report = asked().rank_env(rank, name, 0).run();
        expect_none(&report, "unicast");
        assert_eq!(calls_beginning(&report, "cuMulticast"), 0);
    }
    let lacking = hosts(&[2, 1]).gpu(1, 0, "multicast=0");
    expect_none(&forced(lacking, CALLS).env("TWOSHOT_MAX_BYTES", 8192).run(), "unicast");
}

#[test]
fn any_failure_of_multicast_means_unicast_and_rank_order() {
    // Every kernel is looked up when NCCL opens the plugin: those of 2, 4, 8 and any number of ranks. Set-up then looks
    // the multicast kernels up behind the unicast ones, those of the switch last.
    let (kernels, bulk, passes, switch) = (2 * 11, 11, 8, 3);
    let opened = 4 * (2 * (kernels + passes) + bulk + switch);
    let failures = [
        (0, "cuMulticastCreate", 0),
        (2, "cuMulticastAddDevice", 0),
        (1, "cuMulticastBindMem", 0),
        (1, "cuModuleGetFunction", opened + bulk + 2 * kernels + 2),
    ];
    for (rank, call, nth) in failures {
        let rule = format!("rank={rank},call={call},nth={nth},code=801");
        let job = forced(hosts(&[2, 1]), CALLS).env("TWOSHOT_MAX_BYTES", 8192);
        expect_none(&job.env("TWOSHOT_SIM_FAULTS", &rule).run(), "unicast");
    }
}

#[test]
fn a_switch_that_leaves_one_memory_out_is_found_before_the_first_call() {
    let rule = "rank=1,call=twoshot_sim_multimem_load,code=1";
    let report = forced(hosts(&[3]), CALLS).env("TWOSHOT_MAX_BYTES", 8192).env("TWOSHOT_SIM_FAULTS", rule).run();
    report.expect_success().expect_off("known-answer");
    expect_nothing_left(&report);
}
