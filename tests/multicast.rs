//! Multicast objects: taken where the topology has them, kept away where the user or the fabric says so, and given up
//! by all ranks together, for unicast and never for an error, when anything about them fails on any rank.
mod common;
#[path = "worlds/world.rs"]
mod world;

use std::time::Duration;

use common::{Job, Report};
use twoshot_sim::{Fabric, Topology};
use world::{calls_beginning, expect_nothing_left, expect_wire, hosts};

/// One- and two-shot, every type; a further command gives what lags behind time to end.
const CALLS: &str = "allreduce dtype=f32 counts=3,300,1000 mixed; allreduce dtype=bf16 counts=900,17 mixed; \
                     allreduce dtype=f16 counts=40,801 mixed; destroy";
const CODES: [i32; 9] = [1, 2, 101, 201, 401, 800, 801, 802, 999];

fn job(topology: Topology, program: &str) -> Job {
    Job::new(topology, program).env("TWOSHOT_ONESHOT_MAX_BYTES", 1024).env("TWOSHOT_MAX_BYTES", 8192)
}

/// Right results on every rank, over unicast, with nothing left behind.
#[track_caller]
fn expect_unicast(report: &Report) {
    report.expect_success();
    expect_wire(report, "unicast");
    for rank in 0..report.outcomes.len() {
        assert!(report.counters(rank).0 > 0, "nothing was routed: {}", report.outcomes[rank]);
    }
    expect_nothing_left(report);
}

#[track_caller]
fn expect_no_multicast_call(report: &Report) {
    expect_unicast(report);
    assert_eq!(calls_beginning(report, "cuMulticast"), 0);
}

/// Both kinds of handles: one host, and two hosts of one fabric.
fn both() -> [Topology; 2] {
    [hosts(&[3]), hosts(&[2, 1])]
}

#[test]
fn where_all_ranks_have_multicast_one_object_joins_them_and_is_given_back() {
    for topology in both() {
        let report = job(topology, CALLS).run();
        report.expect_success();
        expect_wire(&report, "multicast");
        expect_nothing_left(&report);
        for (call, times) in [("cuMulticastCreate", 1), ("cuMulticastAddDevice", 3), ("cuMulticastBindMem", 3)] {
            assert_eq!(calls_beginning(&report, call), times, "{call}");
        }
        assert_eq!(calls_beginning(&report, "cuMulticastUnbind"), 3);
    }
}

/// All kernels are looked up when NCCL opens the plugin: 30 for unicast, then those for multicast, for each of four worlds.
#[test]
fn a_multicast_kernel_that_did_not_load_early_keeps_nobody_from_being_routed() {
    let rules = "rank=1,call=cuModuleGetFunction,nth=42,code=2;rank=1,call=cuModuleGetFunction,nth=84,code=2";
    for topology in both() {
        let report = job(topology, CALLS).env("TWOSHOT_SIM_FAULTS", rules).run();
        report.expect_success();
        expect_wire(&report, "multicast");
        expect_nothing_left(&report);
    }
}

#[test]
fn switched_off_on_one_rank_alone_no_rank_makes_a_multicast_call() {
    for topology in both() {
        for (rank, name) in
            [(0, "NCCL_NVLS_ENABLE"), (2, "NCCL_NVLS_ENABLE"), (0, "TWOSHOT_MULTICAST"), (1, "TWOSHOT_MULTICAST")]
        {
            expect_no_multicast_call(&job(topology.clone(), CALLS).rank_env(rank, name, 0).run());
        }
        expect_no_multicast_call(&job(topology.clone(), CALLS).env("NCCL_NVLS_ENABLE", 0).run());
        expect_no_multicast_call(&job(topology, CALLS).env("TWOSHOT_MULTICAST", 0).run());
    }
}

#[test]
fn a_gpu_without_multicast_keeps_all_multicast_calls_away() {
    for topology in both() {
        expect_no_multicast_call(&job(topology.gpu(0, 1, "multicast=0"), CALLS).run());
    }
}

#[test]
fn an_unfinished_fabric_sees_no_multicast_call() {
    for state in [Fabric::NotSupported, Fabric::NotStarted, Fabric::InProgress] {
        expect_no_multicast_call(&job(hosts(&[3]).with_host(0, |host| host.fabric = state), CALLS).run());
    }
}

#[test]
fn a_communicator_that_never_reduces_takes_no_memory_and_no_object() {
    let report = job(hosts(&[2, 2]), "init; barrier; destroy").run();
    report.expect_success();
    for prefix in ["cuMulticast", "cuMemCreate", "cuMemExport", "cuMemImport", "cuMemAddressReserve"] {
        assert_eq!(calls_beginning(&report, prefix), 0, "{prefix}");
    }
}

/// Every use that fails: the entry, and which use of it belongs to multicast among `ranks` ranks.
fn failures(fabric: bool, ranks: u32) -> Vec<(&'static str, u32, Vec<u32>)> {
    let probes = u32::from(fabric);
    let all: Vec<u32> = (0..ranks).collect();
    vec![
        ("cuMulticastGetGranularity", 1, all.clone()),
        ("cuMulticastGetGranularity", 2, all.clone()),
        ("cuMulticastCreate", 0, vec![0]),
        ("cuMemExportToShareableHandle", probes + 2, vec![0]),
        ("cuMemImportFromShareableHandle", probes + ranks, all[1..].to_vec()),
        ("cuMulticastAddDevice", 0, all.clone()),
        ("cuMulticastBindMem", 0, all.clone()),
        ("cuMemAddressReserve", 2, all.clone()),
        ("cuMemMap", ranks + 1, all.clone()),
        ("cuMemSetAccess", ranks + 1, all),
    ]
}

fn every_failure_gives_unicast(topology: &Topology, fabric: bool, codes: &[i32]) {
    for (call, nth, ranks) in failures(fabric, 3) {
        for rank in ranks {
            for code in codes {
                let rule = format!("rank={rank},call={call},nth={nth},code={code}");
                eprintln!("{rule}");
                expect_unicast(&job(topology.clone(), CALLS).env("TWOSHOT_SIM_FAULTS", &rule).run());
            }
        }
    }
}

#[test]
fn on_one_host_every_error_of_every_multicast_step_on_any_rank_means_unicast_for_all() {
    every_failure_gives_unicast(&hosts(&[3]), false, &CODES);
}

#[test]
fn across_hosts_every_multicast_step_that_fails_on_any_rank_means_unicast_for_all() {
    every_failure_gives_unicast(&hosts(&[2, 1]), true, &[2, 401, 800]);
}

#[test]
fn a_multicast_call_that_blocks_is_left_behind_at_the_deadline_for_unicast() {
    // The granularity is asked for when windows are sized and when the object is.
    let granularity = "cuMulticastGetGranularity";
    let calls = [
        (granularity, 1),
        (granularity, 2),
        ("cuMulticastCreate", 1),
        ("cuMulticastAddDevice", 1),
        ("cuMulticastBindMem", 1),
    ];
    for (call, nth) in calls {
        let rule = format!("rank=0,call={call},nth={nth},block");
        let report =
            job(hosts(&[2, 1]), CALLS).env("TWOSHOT_SIM_FAULTS", &rule).env("TWOSHOT_SETUP_TIMEOUT_MS", 1500).run();
        report.expect_success();
        expect_wire(&report, "unicast");
        for outcome in &report.outcomes {
            assert!(outcome.elapsed < Duration::from_secs(10), "{call}: {outcome}");
            // What the blocked call works on stays with it; nobody else keeps anything.
            if outcome.rank != 0 {
                let stats = report.session.stats(outcome.pid).unwrap();
                stats.assert_nothing_live_but(&["contexts", "streams", "device_allocations", "device_bytes"]);
            }
        }
    }
}

#[test]
fn a_bind_that_returns_after_its_deadline_gives_everything_back() {
    let program = format!("{} sleep ms=2500", CALLS.replace("destroy", "destroy;"));
    let report = job(hosts(&[2, 1]), &program)
        .env("TWOSHOT_SIM_FAULTS", "rank=1,call=cuMulticastBindMem,delay=2500")
        .env("TWOSHOT_SETUP_TIMEOUT_MS", 1000)
        .run();
    expect_unicast(&report);
}

#[test]
fn an_address_of_zero_for_the_multicast_window_is_refused_for_unicast() {
    for rank in 0..3 {
        expect_unicast(&job(hosts(&[3]), CALLS).rank_env(rank, "TWOSHOT_SIM_NULL_RESERVE", 2).run());
    }
}

#[test]
fn an_address_of_zero_for_the_windows_leaves_all_ranks_with_stock() {
    for rank in 0..3 {
        let report = job(hosts(&[3]), CALLS).rank_env(rank, "TWOSHOT_SIM_NULL_RESERVE", 1).run();
        report.expect_success().expect_off("map");
        expect_nothing_left(&report);
    }
}

#[test]
fn only_the_smallest_granularity_is_asked_for() {
    // The recommended one would not even fit the GPU.
    let topology = hosts(&[2, 2]).gpus("mem=256M granularity=2M mc-granularity=4M mc-recommended=512M");
    let report = job(topology, CALLS).run();
    report.expect_success();
    expect_wire(&report, "multicast");
    for rank in 0..4 {
        assert!(report.lines(rank).iter().any(|line| line.contains("memory 4194304 B")), "{}", report.outcomes[rank]);
    }
}

#[test]
fn gpus_of_one_cluster_on_hosts_of_different_granularity_agree_on_one_window() {
    let topology = hosts(&[2, 2]).gpu(0, 1, "granularity=4M").gpu(1, 0, "mc-granularity=8M");
    let report = job(topology, CALLS).run();
    report.expect_success().expect_on();
    expect_nothing_left(&report);
}

/// `payloads` of the line that says what is on.
fn said(report: &Report, rank: usize, before: &str) -> u64 {
    let lines = report.lines(rank);
    let on = lines.iter().find(|line| line.contains(": ON,")).unwrap_or_else(|| panic!("{}", report.outcomes[rank]));
    let digits = on.split_once(before).and_then(|(_, rest)| rest.split(' ').next());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("no {before} in {on}"))
}

#[test]
fn where_multicast_is_lost_while_joining_limits_and_description_are_those_of_unicast() {
    // One-shot ends at 64 KiB with multicast and at 32 KiB without, two-shot at 2 and 4 MiB.
    let program = "allreduce count=1000; allreduce count=300000; describe; destroy";
    let limits = |report: &Report, rank| (said(report, rank, "one-shot to "), said(report, rank, "two-shot to "));
    let run = |rules: &str| {
        let job = Job::new(hosts(&[7]), program).env("TWOSHOT_SIM_CALLER", "libtwoshot.so");
        let report = job.env("TWOSHOT_SIM_FAULTS", rules).run();
        report.expect_success();
        expect_wire(&report, "unicast");
        expect_nothing_left(&report);
        report
    };
    let lost = run("rank=3,call=cuMulticastBindMem,nth=1,code=999");
    let off = Job::new(hosts(&[7]), program).env("TWOSHOT_MULTICAST", 0).run();
    let (one, two) = limits(&off, 0);
    for rank in 0..7 {
        // What windows sized for multicast hold is the limit, where it is less.
        assert_eq!(limits(&lost, rank), limits(&lost, 0));
        let (one, two) = limits(&lost, rank);
        let described = format!("state 1, multicast 0, one-shot {one}, two-shot {two}");
        assert!(lost.outcomes[rank].stdout.contains(&described), "{}", lost.outcomes[rank]);
    }
    let (lost_one, lost_two) = limits(&lost, 0);
    assert!(lost_one == one && lost_two <= two && lost_two >= 2 << 20, "{lost_one} {lost_two}, unicast {one} {two}");
}
