//! Communicators that span hosts: only where every rank's fabric says so, with one verdict and one reason everywhere,
//! and no fabric handle before that.
mod common;
#[path = "worlds/world.rs"]
mod world;

use common::{Job, Report};
use twoshot_sim::{Fabric, Host, Link, Session, Topology};
use world::{calls_beginning, expect_nothing_left, expect_wire, hosts};

const CALLS: &str =
    "allreduce dtype=f32 counts=3,300,1000 mixed special=0; allreduce dtype=bf16 counts=900,17 mixed; destroy";

fn job(topology: Topology) -> Job {
    Job::new(topology, CALLS).env("TWOSHOT_ONESHOT_MAX_BYTES", 1024).env("TWOSHOT_MAX_BYTES", 8192)
}

fn two_hosts() -> Topology {
    hosts(&[2, 2])
}

/// All ranks use stock NCCL for this reason, which lies with this rank; nothing is held.
#[track_caller]
fn expect_stock(report: &Report, reason: &str, rank: u32) {
    report.expect_success().expect_off(&format!("{reason} (rank {rank}"));
    for rank in 0..report.outcomes.len() {
        assert_eq!(report.counters(rank).0, 0, "{}", report.outcomes[rank]);
    }
    expect_nothing_left(report);
}

/// And it was known from the facts alone: nobody tried memory.
#[track_caller]
fn expect_stock_untried(report: &Report, reason: &str, rank: u32) {
    expect_stock(report, reason, rank);
    // To ask for a granularity is no attempt.
    let attempts = ["cuMemCreate", "cuMemExport", "cuMemImport", "cuMemAddressReserve", "cuMulticastCreate"];
    for prefix in attempts {
        assert_eq!(calls_beginning(report, prefix), 0, "{prefix}");
    }
}

#[test]
fn two_hosts_of_one_fabric_are_one_domain() {
    for topology in [two_hosts(), hosts(&[1, 1, 1])] {
        let report = job(topology).run();
        report.expect_success();
        expect_wire(&report, "multicast");
        expect_nothing_left(&report);
    }
}

#[test]
fn hosts_in_different_cliques_leave_all_ranks_with_stock() {
    expect_stock_untried(&job(two_hosts().with_host(1, |host| host.clique = 2)).run(), "other-clique", 2);
}

#[test]
fn hosts_of_different_clusters_leave_all_ranks_with_stock() {
    expect_stock_untried(&job(two_hosts().with_host(1, |host| host.uuid[15] ^= 1)).run(), "other-cluster", 2);
}

#[test]
fn a_zero_uuid_is_no_cluster_on_one_host_or_on_all() {
    let zero = |host: &mut Host| host.uuid = [0; 16];
    expect_stock_untried(&job(two_hosts().with_host(1, zero)).run(), "no-fabric", 2);
    expect_stock_untried(&job(two_hosts().with_host(0, zero).with_host(1, zero)).run(), "no-fabric", 0);
}

#[test]
fn a_uuid_that_begins_with_zero_bytes_is_a_cluster() {
    let tail = |host: &mut Host| host.uuid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    let report = job(two_hosts().with_host(0, tail).with_host(1, tail)).run();
    report.expect_success().expect_on();
}

#[test]
fn a_fabric_that_is_not_complete_on_every_host_is_none() {
    for state in [Fabric::NotSupported, Fabric::NotStarted, Fabric::InProgress] {
        let report = job(two_hosts().with_host(1, |host| host.fabric = state)).run();
        expect_stock_untried(&report, "no-fabric", 2);
    }
}

#[test]
fn a_fabric_that_completed_with_an_error_is_none() {
    let session = Session::new(&two_hosts()).unwrap();
    let file = session.dir().join("topology");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.trim_end().to_owned() + " fabric-status=999\n").unwrap();
    expect_stock_untried(&job(two_hosts()).run_in(session), "no-fabric", 2);
}

#[test]
fn a_host_without_imex_is_found_by_trying_a_fabric_handle() {
    expect_stock(&job(two_hosts().with_host(1, |host| host.imex = false)).run(), "fabric-handle", 2);
}

#[test]
fn a_gpu_without_fabric_handles_is_not_tried() {
    let report = job(two_hosts().gpu(0, 1, "fabric-handle=0")).run();
    expect_stock_untried(&report, "fabric-handle", 1);
}

#[test]
fn mnnvl_switched_off_on_one_rank_is_obeyed_by_all() {
    let report = job(two_hosts()).rank_env(3, "NCCL_MNNVL_ENABLE", 0).run();
    expect_stock_untried(&report, "fabric-disabled", 3);
    // It is about several hosts only.
    job(hosts(&[3])).env("NCCL_MNNVL_ENABLE", 0).run().expect_success().expect_on();
}

#[test]
fn the_users_uuid_and_clique_replace_what_nvml_says() {
    let other = job(two_hosts()).rank_env(2, "NCCL_MNNVL_UUID", "0x77").run();
    expect_stock_untried(&other, "other-cluster", 2);
    let other = job(two_hosts()).rank_env(1, "NCCL_MNNVL_CLIQUE_ID", 9).run();
    expect_stock_untried(&other, "other-clique", 1);
    // Split into two by the user, as one does to test: each half still is a domain of its own, the whole is not.
    job(two_hosts()).env("NCCL_MNNVL_UUID", "0x77").env("NCCL_MNNVL_CLIQUE_ID", 9).run().expect_success().expect_on();
    // A zero UUID is no cluster, whoever says so.
    expect_stock_untried(&job(two_hosts()).env("NCCL_MNNVL_UUID", 0).run(), "no-fabric", 0);
}

#[test]
fn a_cluster_that_only_the_user_claims_is_found_out_by_importing() {
    let apart = two_hosts().with_host(1, |host| host.uuid[0] ^= 1);
    expect_stock(&job(apart).env("NCCL_MNNVL_UUID", 5).run(), "import", 0);
    let apart = two_hosts().with_host(1, |host| host.clique = 8);
    expect_stock(&job(apart).env("NCCL_MNNVL_CLIQUE_ID", 8).run(), "import", 0);
}

#[test]
fn gpus_of_a_host_that_only_pcie_joins_leave_all_ranks_with_stock() {
    expect_stock_untried(&job(hosts(&[3]).pair(0, 1, 2, Link::Pcie)).run(), "no-nvlink", 1);
    expect_stock_untried(&job(hosts(&[3]).pair(0, 0, 2, Link::None)).run(), "no-nvlink", 0);
    expect_stock_untried(&job(hosts(&[2]).with_host(0, |host| host.link = Link::Pcie)).run(), "no-nvlink", 0);
}

#[test]
fn every_error_of_a_fabric_handle_on_any_rank_leaves_all_ranks_with_stock() {
    let steps = [
        ("cuMemCreate", 1, "fabric-handle"),
        ("cuMemExportToShareableHandle", 1, "fabric-handle"),
        ("cuMemImportFromShareableHandle", 1, "fabric-handle"),
        ("cuMemCreate", 2, "allocate"),
        ("cuMemExportToShareableHandle", 2, "export"),
        ("cuMemImportFromShareableHandle", 2, "import"),
        ("cuMemImportFromShareableHandle", 4, "import"),
    ];
    for (call, nth, reason) in steps {
        for (rank, codes) in [(0, &[2, 800][..]), (3, &[1, 101, 201, 401, 801, 802, 999])] {
            for code in codes {
                let rule = format!("rank={rank},call={call},nth={nth},code={code}");
                eprintln!("{rule}");
                let report = job(two_hosts()).env("TWOSHOT_SIM_FAULTS", &rule).run();
                expect_stock(&report, reason, rank);
                assert!(report.lines(0).iter().any(|line| line.contains(&format!("code {code}"))), "{rule}");
            }
        }
    }
}

#[test]
fn a_fabric_call_that_blocks_ends_at_the_deadline_on_all_ranks() {
    for call in ["cuMemExportToShareableHandle", "cuMemImportFromShareableHandle"] {
        let rule = format!("rank=2,call={call},block");
        let job = job(two_hosts()).env("TWOSHOT_SIM_FAULTS", &rule).env("TWOSHOT_SETUP_TIMEOUT_MS", 1500);
        job.run().expect_success().expect_off("deadline (rank 2");
    }
}

#[test]
fn a_host_that_knows_only_the_older_fabric_query_is_asked_by_that() {
    let old = Session::new(&two_hosts()).unwrap();
    let old = old.without_symbols(&["nvmlDeviceGetGpuFabricInfoV"]).unwrap();
    job(two_hosts()).run_in(old).expect_success().expect_on();
    let none = Session::new(&two_hosts()).unwrap();
    let none = none.without_symbols(&["nvmlDeviceGetGpuFabricInfoV", "nvmlDeviceGetGpuFabricInfo"]).unwrap();
    expect_stock_untried(&job(two_hosts()).run_in(none), "no-fabric", 0);
}
