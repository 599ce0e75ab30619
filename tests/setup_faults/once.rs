//! A verdict is found once, quickly, in the right order, and whatever the ranks' pace.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use twoshot_sim::{Link, Topology};

use crate::common::Job;
use crate::world::{World, own_calls};

/// Calls of the AllReduce path itself: is a set-up due on this stream?
const PER_CALL: [&str; 1] = ["cuStreamGetCaptureInfo_v3"];

fn declined_calls(reductions: u32) -> (BTreeMap<String, u64>, Duration) {
    let program = format!("allreduce count=64 reps={reductions}; destroy; release");
    let job = Job::new(Topology::one_host(2).pair(0, 0, 1, Link::Pcie), &program);
    let report = job.env("TWOSHOT_SIM_CALLER", "libtwoshot.so").run();
    report.expect_success().expect_off("no-nvlink").expect_nothing_live();
    assert_eq!(report.counters(0), (0, u64::from(reductions)));
    let first = report.outcomes[0].elapsed;
    (own_calls(&report, 0), first)
}

#[test]
fn after_a_negative_verdict_a_thousand_calls_ask_the_driver_nothing_more() {
    let (mut one, quick) = declined_calls(1);
    let (mut thousand, _) = declined_calls(1000);
    for calls in [&mut one, &mut thousand] {
        // How often a wait polls is chance.
        calls.retain(|name, _| name != "cuStreamQuery" && !PER_CALL.contains(&name.as_str()));
    }
    assert_eq!(one, thousand);
    assert!(quick < Duration::from_secs(1), "a negative verdict took {quick:?}, start and end of the job included");
}

#[test]
fn without_a_completed_fabric_no_multicast_call_is_made() {
    for fabric in [twoshot_sim::Fabric::NotStarted, twoshot_sim::Fabric::InProgress] {
        let topology = Topology::one_host(3).with_host(0, |host| host.fabric = fabric);
        let report = Job::new(topology, "random calls=3; destroy; release").run();
        report.expect_success().expect_on().expect_nothing_live();
        for outcome in &report.outcomes {
            let stats = report.session.stats(outcome.pid).expect("stats of a rank");
            assert_eq!(stats.calls_beginning("cuMulticast"), 0, "{fabric:?}");
        }
    }
}

/// Row 10: a stage is filled before anybody can write into it, and never again.
#[test]
fn windows_are_armed_before_the_first_kernel_of_any_rank_and_never_again() {
    // The rank that fills late: had a peer's kernel started before, its data would be wiped and the peer would wait
    // for it in vain.
    for world in World::ALL {
        for nth in [1, 2] {
            let rule = format!("rank=1,call=cuMemsetD32Async,nth={nth},delay=700");
            let report = world.job("random calls=5 seed=9 max=9000; destroy; release");
            let report = report.env("TWOSHOT_SIM_FAULTS", rule).run();
            report.expect_success().expect_on().expect_nothing_live();
            for rank in 0..world.ranks() {
                assert_eq!(own_calls(&report, rank)["cuMemsetD32Async"], 2, "header and stages, once each");
            }
        }
    }
}

/// A rank whose kernel could not start votes no while its peers' kernels still store into its window.
#[test]
fn a_rank_that_fails_the_known_answer_keeps_its_memory_until_its_peers_have_left_their_kernels() {
    // Rank 1 would release after one second, its peers' kernels wait for it for two.
    let rules = "rank=1,call=cuLaunchKernelEx,nth=1,code=999;rank=1,call=cuMemUnmap,nth=1,delay=1000";
    let job = World::Fabric.job("random calls=2; destroy; sleep ms=500; release");
    let report = job.env("TWOSHOT_SETUP_TIMEOUT_MS", 8000).env("TWOSHOT_SIM_FAULTS", rules).run();
    report.expect_success().expect_off("known-answer").expect_nothing_live();
    let stats = report.session.stats(report.outcomes[1].pid).expect("stats of a rank");
    assert_eq!(stats.total("fabric_orphans"), 0, "peers still had the window of rank 1 when it was released");
}

/// Calls between which a rank may be slow.
const STEPS: [&str; 10] = [
    "cuDevicePrimaryCtxRetain",
    "cuModuleLoadData",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMulticastAddDevice",
    "cuMulticastBindMem",
    "cuLaunchKernelEx",
    "cuEventCreate",
];

#[test]
fn ranks_of_any_pace_set_up_together() {
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let begun = Instant::now();
    let mut random = seed;
    let mut draw = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for round in 0..24 {
        let world = World::ALL[round % 2];
        let rules: Vec<_> = (0..3)
            .map(|_| {
                let (rank, ms) = (draw(world.ranks() as u64), draw(250) + 1);
                format!("rank={rank},call={},nth=1,delay={ms}", STEPS[draw(10) as usize])
            })
            .collect();
        let rules = rules.join(";");
        let job = world.job("random calls=4 seed=2 max=9000; destroy; release");
        let report = job.env("TWOSHOT_SIM_FAULTS", &rules).run();
        report.expect_success().expect_on().expect_nothing_live();
    }
    eprintln!("24 set-ups in {:?}", begun.elapsed());
}
