//! Every reason for staying with stock NCCL is said in one line that names reason, rank and what to do; and the
//! counters account for every call.
mod common;

use std::time::Duration;

use common::{Job, Report};
use twoshot::decline::Decline;
use twoshot_sim::{Fabric, Link, Topology};

const PROGRAM: &str = "random calls=4 seed=3 max=3000; destroy; release";

/// Small windows, faults in the library's own calls only.
fn job(topology: Topology) -> Job {
    Job::new(topology, PROGRAM)
        .env("TWOSHOT_SIM_CALLER", "libtwoshot.so")
        .env("TWOSHOT_MAX_BLOCKS", 1)
        .timeout(Duration::from_secs(60))
}

fn two() -> Job {
    job(Topology::one_host(2)).env("TWOSHOT_MAX_BYTES", "64K").env("TWOSHOT_ONESHOT_MAX_BYTES", "16K")
}

fn two_hosts(change: impl FnOnce(Topology) -> Topology) -> Job {
    job(change(Topology::fabric(2, 1)))
}

fn fault(rule: &str) -> Job {
    two().env("TWOSHOT_SIM_FAULTS", rule)
}

/// What brings a reason about, and the rank and code that the line names; `None` where nothing outside can.
fn provoke(reason: Decline) -> Option<(Job, u32, i32)> {
    Some(match reason {
        Decline::Disabled => (two().rank_env(1, "TWOSHOT_ENABLE", 0), 1, 0),
        Decline::InvalidConfig => (two().rank_env(1, "TWOSHOT_TIMEOUT_MS", "soon"), 1, 0),
        Decline::Forbidden => (two().rank_env(1, "NCCL_P2P_DISABLE", 1), 1, 0),
        Decline::ConfigDiffers => (two().rank_env(1, "TWOSHOT_MIN_BYTES", "4K"), 1, 0),
        // One build has one version; the merge of two is tested beside `domain::merge`.
        Decline::VersionDiffers => return None,
        // Its one rank has nobody to vote with and no payload to reduce: it is declined without a word.
        Decline::OneRank => return None,
        // The plugin is loaded by the first communicator, whose configuration it cannot have seen.
        Decline::Probe => (fault("rank=1,call=cuDeviceGetUuid_v2,nth=0,code=999"), 1, 999),
        Decline::Architecture => (job(Topology::one_host(2).gpus("cc=8.0")), 0, 0),
        Decline::NoVirtualMemory => (job(Topology::one_host(2).gpu(0, 1, "fd-handle=0")), 1, 0),
        Decline::SharedGpu => (two().rank_env(1, "CUDA_VISIBLE_DEVICES", 0), 1, 0),
        Decline::NoNvlink => (job(Topology::one_host(2).pair(0, 0, 1, Link::Pcie)), 0, 0),
        Decline::FabricDisabled => (two_hosts(|t| t).rank_env(1, "NCCL_MNNVL_ENABLE", 0), 1, 0),
        Decline::NoFabric => (two_hosts(|t| t.with_host(1, |host| host.fabric = Fabric::InProgress)), 1, 0),
        Decline::OtherCluster => (two_hosts(|t| t.with_host(1, |host| host.uuid = *b"another-cluster!")), 1, 0),
        Decline::OtherClique => (two_hosts(|t| t.with_host(1, |host| host.clique = 7)), 1, 0),
        Decline::FabricHandle => (two_hosts(|t| t.with_host(1, |host| host.imex = false)), 1, 800),
        Decline::TooManyRanks => {
            // The largest limit there is, kept once for each rank, by that many ranks.
            let job = job(Topology::one_host(37)).env("TWOSHOT_MAX_BYTES", "1G");
            (job.env("TWOSHOT_ONESHOT_MAX_BYTES", "1G"), 0, 0)
        }
        Decline::Module => (fault("rank=1,call=cuModuleLoadData,nth=0,code=209"), 1, 209),
        Decline::Allocate => (fault("rank=1,call=cuMemCreate,nth=1,code=2"), 1, 2),
        Decline::Export => (fault("rank=1,call=cuMemExportToShareableHandle,nth=1,code=1"), 1, 1),
        // One rank comes late from the vote before: without host memory its blobs are copied, and a copy can be slow.
        Decline::Handoff => {
            let rules = "rank=1,call=cuMemHostAlloc,nth=1,code=2;rank=1,call=cuMemHostAlloc,nth=2,code=2;\
                         rank=1,call=cuMemcpyDtoHAsync_v2,nth=3,delay=2500";
            (fault(rules).env("TWOSHOT_SETUP_TIMEOUT_MS", 1000), 0, 0)
        }
        Decline::Import => (fault("rank=1,call=cuMemImportFromShareableHandle,nth=1,code=999"), 1, 999),
        Decline::Map => (fault("rank=1,call=cuMemMap,nth=2,code=2"), 1, 2),
        Decline::Prepare => (fault("rank=1,call=cuMemsetD32Async,nth=1,code=1"), 1, 1),
        Decline::KnownAnswer => {
            let job = fault("rank=0,call=cuLaunchKernelEx,nth=3,code=701");
            (job.env("TWOSHOT_SETUP_TIMEOUT_MS", 4000), 0, 701)
        }
        Decline::Deadline => {
            let job = fault("rank=1,call=cuMemCreate,nth=1,block");
            (job.env("TWOSHOT_SETUP_TIMEOUT_MS", 1000), 1, 0)
        }
        // Its peer has no such library.
        Decline::BindingDiffers => (two().rank_program(1, &format!("extend; init; {PROGRAM}")), 1, 0),
        Decline::BindingIncomplete => {
            let job = two().rank_program(0, &format!("extend; init; {PROGRAM}"));
            (job.rank_program(1, &format!("extend frozen=1; init; {PROGRAM}")), 1, 0)
        }
        Decline::Memory => (two().rank_env(1, "TWOSHOT_MEMORY", "1M"), 1, 0),
        // Needs a peer that is not twoshot and yet answers in its place; tested beside `exchange::vote`.
        Decline::Foreign => return None,
    })
}

/// The lines that give a verdict, without host, process and device.
fn verdicts(report: &Report, rank: usize) -> Vec<String> {
    let lines = report.lines(rank).into_iter().filter(|line| line.contains(": ON, ") || line.contains(": OFF, "));
    lines.map(|line| line.split_once(" TWOSHOT ").expect("lines of twoshot").1.to_owned()).collect()
}

/// Routed and stock calls are all calls, and the line at the communicator's end says the same.
#[track_caller]
fn account(report: &Report, calls: u64) {
    for rank in 0..report.outcomes.len() {
        let (routed, stock) = report.counters(rank);
        assert_eq!(routed + stock, calls, "rank {rank}: {}", report.outcomes[rank]);
    }
}

#[test]
fn every_reason_is_said_in_one_line_that_names_reason_rank_and_hint() {
    let mut silent = Vec::new();
    for reason in Decline::ALL {
        let Some((job, rank, code)) = provoke(*reason) else {
            silent.push(*reason);
            continue;
        };
        let report = job.run();
        report.expect_success();
        account(&report, 4);
        let failed = code;
        let code = if code == 0 { String::new() } else { format!(", code {code}") };
        let said = format!("{} (rank {rank}{code}): {}", reason.name(), reason.hint());
        // The user's own word is added on the rank whose environment holds it.
        let word = if *reason == Decline::Forbidden { " [NCCL_P2P_DISABLE=1]" } else { "" };
        for own in 0..report.outcomes.len() as u32 {
            let word = if own == rank { word } else { "" };
            let expected = format!("rank {own}/{}: OFF, stock NCCL: {said}{word}", report.outcomes.len());
            let outcome = &report.outcomes[own as usize];
            let [line] = &verdicts(&report, own as usize)[..] else { panic!("{reason:?}: one verdict: {outcome}") };
            // So is what failed there: a call of the driver and its code, or of the system.
            let detail = line.strip_prefix(&expected).unwrap_or_else(|| panic!("{reason:?}: {line}"));
            if own == rank && matches!(reason, Decline::Allocate | Decline::Export | Decline::Import | Decline::Map) {
                assert!(detail.contains(&format!("CUDA driver error {failed}")), "{reason:?}: {outcome}");
            }
            // Several ranks can fail at a step; the verdict names the first.
            let told = detail.starts_with(" [") && detail.ends_with(']');
            assert!(detail.is_empty() || told, "{reason:?}: {outcome}");
        }
    }
    assert_eq!(silent, [Decline::VersionDiffers, Decline::OneRank, Decline::Foreign]);
}

#[test]
fn a_communicator_that_is_on_says_so_once_with_its_sizes_and_memory() {
    for (topology, hosts, handles) in [(Topology::one_host(2), 1, "Fd"), (Topology::fabric(2, 1), 2, "Fabric")] {
        for (switch, wire) in [(1, "multicast"), (0, "unicast")] {
            let job = job(topology.clone()).env("TWOSHOT_MAX_BYTES", "64K").env("TWOSHOT_ONESHOT_MAX_BYTES", "16K");
            let report = job.env("TWOSHOT_MULTICAST", switch).run();
            report.expect_success().expect_nothing_live();
            account(&report, 4);
            for rank in 0..2 {
                let expected = format!(
                    "rank {rank}/2: ON, {hosts} host(s), {wire}, handles {handles}, one-shot to 16384 B, \
                     two-shot to 65536 B, blocks 1, memory 2097152 B, table: "
                );
                let said = verdicts(&report, rank);
                assert!(said.len() == 1 && said[0].starts_with(&expected), "{said:?} is not {expected}");
            }
        }
    }
}

#[test]
fn a_communicator_with_a_ring_says_how_far_it_goes() {
    let job = job(Topology::one_host(2)).env("TWOSHOT_MAX_BYTES", "8M").env("TWOSHOT_MULTICAST", 0);
    let report = job.run();
    report.expect_success().expect_nothing_live();
    for rank in 0..2 {
        let said = verdicts(&report, rank);
        let expected = "one-shot to 1048576 B, two-shot to 4194304 B, bulk to 8388608 B, blocks 1, memory ";
        assert!(said.len() == 1 && said[0].contains(expected), "{said:?} does not say {expected}");
    }
}

#[test]
fn the_counters_of_a_communicator_name_every_call_by_its_route() {
    let program = "allreduce count=100 reps=3; allreduce count=10000 reps=2; allreduce count=100000; \
                   allreduce count=10 dtype=i32 op=premulsum maker=stock; allreduce count=10 op=premulsum maker=stock; destroy; release";
    let job = Job::new(Topology::one_host(2), program).env("TWOSHOT_MAX_BLOCKS", 1);
    let report = job.env("TWOSHOT_MAX_BYTES", "64K").env("TWOSHOT_ONESHOT_MAX_BYTES", "16K").run();
    report.expect_success().expect_on();
    account(&report, 8);
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (5, 3));
        let lines = report.lines(rank);
        let end = lines.iter().find(|line| line.contains(" ends: ")).expect("a line at the end");
        assert!(end.contains("oneshot 3, twoshot 2, stock 3"), "{end}");
    }
}
