//! Hosts in network namespaces of their own: nothing that crosses hosts may rest on a shared loopback or on abstract
//! sockets. Skipped, and said so, where namespaces are not permitted.
mod common;
#[path = "worlds/world.rs"]
mod world;

use std::time::Duration;

use common::Report;
use twoshot_sim::{Netns, Rank, Session, Topology, twoshot_library, worker};
use world::{expect_nothing_left, expect_wire, hosts};

const CALLS: &str =
    "allreduce dtype=f32 counts=3,300,1000 mixed special=0; allreduce dtype=bf16 counts=900,17 mixed; destroy";

/// Runs ranks whose placements are (simulated host, namespace, GPU).
fn run(topology: &Topology, netns: &Netns, places: &[(u32, u32, u32)]) -> Report {
    let session = Session::new(topology).unwrap();
    let count = places.len().to_string();
    let ranks: Vec<Rank> = places
        .iter()
        .enumerate()
        .map(|(rank, (host, space, gpu))| {
            Rank::new(worker())
                .host(*space)
                .netns(netns)
                .host(*host)
                .gpu(*gpu)
                .args(["--rank", &rank.to_string(), "--ranks", &count, "--device", "0", "--program", CALLS, "--id"])
                .arg(session.dir().join("unique-id"))
                .env("NCCL_NET_PLUGIN", twoshot_library())
                .env("NCCL_DEBUG", "INFO")
                .env("NCCL_SOCKET_IFNAME", "eth0")
                .env("TWOSHOT_SETUP_TIMEOUT_MS", "5000")
                .env("TWOSHOT_TIMEOUT_MS", "60000")
        })
        .collect();
    let outcomes = session.run_all(ranks, Duration::from_secs(60)).unwrap();
    Report { session, outcomes }
}

#[test]
fn hosts_that_share_no_network_stack_are_joined_by_fabric_handles() {
    let Some(netns) = Netns::try_new(2) else { return };
    let report = run(&hosts(&[2, 2]), &netns, &[(0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)]);
    report.expect_success();
    expect_wire(&report, "multicast");
    expect_nothing_left(&report);
    for rank in 0..4 {
        assert!(report.counters(rank).0 == 5, "{}", report.outcomes[rank]);
    }
}

#[test]
fn one_host_whose_ranks_share_no_abstract_sockets_is_declined_without_a_hang() {
    let Some(netns) = Netns::try_new(2) else { return };
    let report = run(&hosts(&[2]), &netns, &[(0, 0, 0), (0, 1, 1)]);
    report.expect_success().expect_off("handoff (rank 0");
    expect_nothing_left(&report);
    for outcome in &report.outcomes {
        assert!(outcome.elapsed < Duration::from_secs(15), "{outcome}");
    }
}

#[test]
fn ranks_of_one_host_in_one_namespace_pass_descriptors() {
    let Some(netns) = Netns::try_new(1) else { return };
    let report = run(&hosts(&[3]), &netns, &[(0, 0, 0), (0, 0, 1), (0, 0, 2)]);
    report.expect_success().expect_on();
    expect_nothing_left(&report);
}
