//! Values on the edge: every 16-bit pattern in both halves of a word, boundary values of f32, payloads of nothing but
//! the word that means "not here yet". The worker compares with the CPU reference; the digests with each other.
mod common;
#[path = "worlds/world.rs"]
mod world;

use std::time::Duration;

use common::{Job, Report};
use world::{Algo, Limits, TYPES, digests, expect_routed, expect_wire, hosts};

/// Ranks on one host or, for odd ones, on two.
const WORLDS: [&[u32]; 4] = [&[2], &[2, 1], &[4], &[4, 4]];

fn run(gpus: &[u32], program: &str, most: u64, algo: Algo, multicast: bool) -> Report {
    let ranks = gpus.iter().map(|gpus| u64::from(*gpus)).sum();
    // For `Auto` the switch lies inside the payload's range.
    let limits = Limits { ranks, oneshot: most / 3, most };
    let job = Job::new(hosts(gpus), program).env("TWOSHOT_MULTICAST", u8::from(multicast));
    let report = algo.on(job, limits).timeout(Duration::from_secs(200)).run();
    report.expect_success();
    expect_wire(&report, if multicast { "multicast" } else { "unicast" });
    report
}

/// The same bits from one-shot, two-shot and through the ring, over multicast and unicast, with `routed` calls each.
fn all_agree(gpus: &[u32], program: &str, most: u64, routed: u64) {
    let mut first = None;
    let ways = [
        (Algo::OneShot, true),
        (Algo::TwoShot, true),
        (Algo::OneShot, false),
        (Algo::TwoShot, false),
        (Algo::Bulk, false),
    ];
    for (algo, multicast) in ways {
        let report = run(gpus, program, most, algo, multicast);
        expect_routed(&report, routed);
        let found = digests(&report);
        assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{gpus:?} {algo:?} multicast={multicast}");
    }
}

#[test]
fn every_bf16_pattern_in_either_half_of_a_word_sums_as_the_reference() {
    for gpus in WORLDS {
        all_agree(gpus, "patterns dtype=bf16; destroy", 2 * 131_072, 10);
    }
}

#[test]
fn every_f16_pattern_in_either_half_of_a_word_sums_as_the_reference() {
    for gpus in WORLDS {
        all_agree(gpus, "patterns dtype=f16; destroy", 2 * 131_072, 10);
    }
}

#[test]
fn boundary_values_of_f32_sum_as_the_reference() {
    for gpus in WORLDS {
        all_agree(gpus, "patterns dtype=f32 count=4099; destroy", 4 * 4099, 10);
    }
}

#[test]
fn payloads_full_of_the_sentinel_and_its_neighbours_neither_hang_nor_change() {
    // The sentinel, what replaces it, what lies beside; halves of it swapped; zeros of both signs; subnormals;
    // infinities; NaNs with and without payload. Alone, where ranks hold nothing else, and mixed.
    let alone =
        ["fffafffa", "fffafffb", "fffafff9", "80000000", "80008000", "00000001", "807fffff", "ff800000", "7fffffff"];
    let mixed = "fffafffa,fffafffb,fffafff9,fffbfffa,fff9fffa,fffa0000,0000fffa,7ffa7ffa,80000000,00000000,80008000,\
                 00000001,80000001,00010001,007fffff,00800000,7f800000,ff800000,7c00fc00,7fc00000,ffffffff,7f7fffff";
    let mut program = String::new();
    for (dtype, _) in TYPES {
        for words in alone.into_iter().chain([mixed]) {
            program.push_str(&format!("allreduce dtype={dtype} words={words} counts=1,64,701 mixed; "));
        }
    }
    program.push_str("destroy");
    for gpus in WORLDS {
        all_agree(gpus, &program, 3000, 90);
    }
}

#[test]
fn a_slice_has_the_bits_it_has_in_the_whole() {
    for gpus in [&[3][..], &[4, 4]] {
        for (dtype, size) in TYPES {
            let whole = format!("allreduce dtype={dtype} count=5003 call=7 mixed");
            let slices = [2, 7, 64].map(|slices| format!("{whole} slices={slices}")).join("; ");
            for multicast in [true, false] {
                // The whole is two-shot's, its slices are both algorithms'.
                let report = run(gpus, &format!("{whole}; {slices}; destroy"), 5003 * size, Algo::Auto, multicast);
                expect_routed(&report, 1 + 2 + 7 + 64);
                let found = digests(&report);
                assert!(found.len() == 4 && found.iter().all(|digest| *digest == found[0]), "{dtype}: {found:x?}");
            }
        }
    }
}

#[test]
fn many_runs_of_one_payload_give_one_result() {
    let once = "allreduce dtype=bf16 count=3001 call=3 mixed; ";
    for algo in [Algo::OneShot, Algo::TwoShot] {
        let report = run(&[3, 2], &format!("{}destroy", once.repeat(40)), 6002, algo, true);
        let found = digests(&report);
        assert!(found.len() == 40 && found.iter().all(|digest| *digest == found[0]));
    }
}

#[test]
fn blocks_that_run_in_any_order_with_torn_stores_give_the_same_bits() {
    for gpus in [&[2][..], &[3], &[4, 4]] {
        let ranks = gpus.iter().map(|gpus| u64::from(*gpus)).sum();
        let (program, routed) = Limits::of(ranks).program();
        let mut first = None;
        let (auto, bulk) = (Algo::Auto, Algo::Bulk);
        let ways = [
            ("0", true, auto),
            ("11", true, auto),
            ("12", false, auto),
            ("13", false, auto),
            ("14", false, bulk),
            ("15", false, bulk),
        ];
        for (seed, multicast, algo) in ways {
            let job = Job::new(hosts(gpus), &program)
                .env("TWOSHOT_SIM_SHUFFLE", 1)
                .env("TWOSHOT_SIM_SEED", seed)
                .env("TWOSHOT_SIM_DELAY_US", 50)
                .env("TWOSHOT_MULTICAST", u8::from(multicast));
            let report = algo.on(job, Limits::of(ranks)).run();
            report.expect_success();
            expect_routed(&report, routed);
            let found = digests(&report);
            assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{gpus:?} seed {seed}");
        }
    }
}

#[test]
fn a_payload_of_several_launches_or_of_one_through_the_ring_gives_the_bits_of_the_reference() {
    // 4 MiB a launch: two and a part, four to the byte, one element more than one; in place and captured too.
    let program = "allreduce count=2200001 dtype=f32; allreduce count=8388608 dtype=bf16; \
        allreduce count=2097153 dtype=f16 inplace=1; capture counts=2200001 dtype=bf16; replay n=2; drop_graphs; \
        sleep ms=60; destroy";
    let mut first = None;
    for algo in ["twoshot", "auto"] {
        let job = Job::new(hosts(&[2]), program).env("TWOSHOT_MAX_BYTES", "16M").env("TWOSHOT_ALGO", algo);
        let report = job.timeout(Duration::from_secs(200)).run();
        report.expect_success().expect_nothing_live();
        for rank in 0..2 {
            assert_eq!(report.counters(rank).1, 0, "{}", report.outcomes[rank]);
        }
        let found = digests(&report);
        assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{algo}");
    }
}
