//! The official door, `TWOSHOT_MODE=collnet`, through a simulated NCCL that loads and drives plugins as the releases do:
//! every version of the tables, hosts that pretend, faults, and what NCCL does where there is no domain.
mod common;
#[path = "common/script.rs"]
mod script;

use common::{Job, Report};
use script::{field, lines_of, ms, stock_runs, summary};
use twoshot_sim::{End, Topology, collnet_plugin};

/// One release for each version of the tables.
const RELEASES: [(u32, u32); 5] = [(22304, 8), (22403, 9), (22605, 10), (22809, 11), (23007, 12)];

const TYPES: [&str; 12] = ["i8", "u8", "i32", "u32", "i64", "u64", "f16", "f32", "f64", "bf16", "e4m3", "e5m2"];

/// What the worker itself may leave after an error.
const OWN: [&str; 4] = ["contexts", "streams", "device_allocations", "device_bytes"];

#[track_caller]
fn expect_released(report: &Report, rank: usize) {
    let stats = report.session.stats(report.outcomes[rank].pid).expect("stats of a rank");
    stats.assert_nothing_live_but(&OWN);
    assert!(
        stats.live("contexts") <= 1 + stats.live("modules") && stats.live("streams") <= 1,
        "left behind: {:?}",
        stats.all_live()
    );
}

fn job(topology: Topology, program: &str) -> Job {
    Job::new(topology, program)
        .env("TWOSHOT_MODE", "collnet")
        .env("NCCL_COLLNET_ENABLE", 1)
        .env("NCCL_MNNVL_ENABLE", 0)
        .env("TWOSHOT_NET", collnet_plugin().display())
}

/// Every rank ran so many AllReduce calls through CollNet, right, and holds nothing any more.
#[track_caller]
fn expect_collnet(report: &Report, calls: f64, what: &str) {
    report.expect_success().expect_on().expect_nothing_live();
    for (rank, outcome) in report.outcomes.iter().enumerate() {
        assert_eq!(field(summary(outcome), "nccl_collnet_runs"), calls, "{what}: {outcome}");
        // A rank may have had no share of a very short one.
        assert!(report.counters(rank).0 * 2 >= calls as u64, "{what}: not by our kernels: {outcome}");
    }
}

#[test]
fn every_version_of_the_tables_reduces_all_types_and_operations() {
    for (release, version) in RELEASES {
        let mut program = String::new();
        let mut calls = 0.0;
        // 8-bit floats came with 2.24.
        for dtype in TYPES.iter().filter(|dtype| release >= 22400 || !dtype.starts_with("e")) {
            for (op, count) in [("sum", 1000), ("prod", 33), ("max", 4099), ("min", 7)] {
                program += &format!("allreduce dtype={dtype} op={op} count={count}; ");
                calls += 1.0;
            }
        }
        let report = job(Topology::fabric(3, 1), &(program + "destroy")).env("SIM_NCCL_VERSION", release).run();
        expect_collnet(&report, calls, &format!("{release}"));
        let loaded = format!("Loaded collnet plugin twoshot (v{version})");
        assert!(report.outcomes[0].stdout.contains(&loaded), "{loaded}: {}", report.outcomes[0]);
    }
}

#[test]
fn slices_of_any_size_several_in_flight_and_rails_of_two_hosts() {
    // Slices larger than a launch takes, and many small ones in flight. The barrier keeps rank 0, and in it what stands in
    // for NVLink inside a host, until all are done.
    for (slice, depth) in [(4 << 20, 1), (1 << 16, 8), (64, 3)] {
        let report =
            job(Topology::fabric(2, 2), "random calls=12 seed=9 dtypes=f32,f16,i8,f64 max=60000; barrier; destroy")
                // The node's own sum comes first: another order than the ranks'.
                .args(&["--exact", "0"])
                .env("SIM_NCCL_COLLNET_SLICE", slice)
                .env("SIM_NCCL_COLLNET_DEPTH", depth)
                .env("TWOSHOT_MAX_BYTES", 20_000)
                .run();
        expect_collnet(&report, 12.0, &format!("slices of {slice}"));
    }
}

#[test]
fn ranks_of_one_host_that_pretend_to_be_hosts_share_memory_by_descriptor() {
    let mut job = job(Topology::one_host(4), "random calls=20 seed=11 dtypes=f32,bf16 max=20000; destroy");
    for rank in 0..4 {
        job = job.rank_env(rank, "NCCL_HOSTID", format!("pretended-{rank}"));
    }
    let report = job.run();
    expect_collnet(&report, 20.0, "pretended hosts");
    assert!(report.lines(0).iter().any(|line| line.contains("1 host(s)") && line.contains("handles Fd")));
}

#[test]
fn several_communicators_come_and_go_and_nothing_is_left() {
    // The barriers let the other ranks' connections to what stands in for NCCL's bootstrap go too.
    let program = "repeat n=5; init; allreduce count=3000 reps=3; split color=0; allreduce count=77 reps=3; use comm=0; \
                   allreduce count=78; destroy; destroy; end; barrier; sleep ms=300; process; repeat n=10; init; \
                   allreduce count=500; destroy; end; barrier; sleep ms=300; process expect=same slack=12";
    let report = job(Topology::fabric(3, 1), program).run();
    report.expect_success().expect_nothing_live();
}

#[test]
fn nccls_own_word_about_algorithms_does_not_switch_it_off() {
    let report = job(Topology::fabric(2, 1), "allreduce count=1000 reps=3; destroy")
        .env("NCCL_ALGO", "allreduce:collnetchain")
        .run();
    expect_collnet(&report, 3.0, "NCCL_ALGO");
}

#[test]
fn without_a_domain_nccl_goes_on_without_collnet_and_the_log_says_why() {
    let alone = Topology::of(vec![twoshot_sim::Host::alone(1), twoshot_sim::Host::alone(1)]);
    for (topology, name, value, reason) in [
        (alone, "TWOSHOT_MAX_BLOCKS", "8", "no-fabric"),
        (Topology::fabric(2, 1).gpus("cc=8.0"), "TWOSHOT_MAX_BLOCKS", "8", "architecture"),
        (Topology::fabric(2, 1), "TWOSHOT_ENABLE", "0", "disabled"),
        (Topology::fabric(2, 1), "NCCL_P2P_DISABLE", "1", "forbidden"),
    ] {
        let report = job(topology, "allreduce count=1000 reps=3; destroy").env(name, value).run();
        report.expect_success().expect_off(reason).expect_nothing_live();
        for outcome in &report.outcomes {
            assert_eq!(field(summary(outcome), "nccl_collnet_runs"), 0.0, "{outcome}");
            assert_eq!(stock_runs(outcome), 3, "{outcome}");
        }
    }
}

#[test]
fn whatever_call_of_the_driver_fails_at_connect_on_one_rank_nccl_goes_on_and_nothing_is_left() {
    for call in [
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemImportFromShareableHandle",
        "cuMemMap",
        "cuMemSetAccess",
        "cuModuleLoadData",
        "cuStreamCreateWithPriority",
        "cuEventCreate",
        "cuDevicePrimaryCtxRetain",
        "cuLaunchKernelEx",
    ] {
        // The first context is the program's own.
        let nth = if call == "cuDevicePrimaryCtxRetain" { 2 } else { 1 };
        for rank in 0..2 {
            let report = job(Topology::fabric(2, 1), "allreduce count=1000 reps=3; destroy")
                .env("TWOSHOT_SIM_FAULTS", format!("rank={rank},call={call},nth={nth},code=2"))
                .run();
            report.expect_success().expect_nothing_live();
            for outcome in &report.outcomes {
                let collnet = field(summary(outcome), "nccl_collnet_runs");
                assert!(collnet == 0.0 && stock_runs(outcome) == 3, "{call} on {rank}: {outcome}");
            }
        }
    }
}

#[test]
fn a_rank_that_is_late_to_connect_is_given_up_in_time() {
    let report = job(Topology::fabric(3, 1), "allreduce count=1000 reps=2; destroy")
        .env("TWOSHOT_SETUP_TIMEOUT_MS", 600)
        .env("TWOSHOT_SIM_FAULTS", "rank=1,call=cuMemCreate,block")
        .run();
    report.expect_success();
    for outcome in &report.outcomes {
        assert_eq!(stock_runs(outcome), 2, "{outcome}");
        assert!(outcome.elapsed.as_secs() < 20, "{outcome}");
    }
}

#[test]
fn a_killed_rank_becomes_an_error_of_nccls_and_an_abort_releases_everything() {
    let program = "init; allreduce count=1000 reps=4; barrier; kill_self on=1; expect_error; allreduce count=1000 on=0,2; \
                   abort on=0,2";
    let report = job(Topology::fabric(3, 1), program).env("TWOSHOT_TIMEOUT_MS", 500).run();
    assert_eq!(report.outcomes[1].end, End::Signal(9));
    for rank in [0, 2] {
        let outcome = &report.outcomes[rank];
        assert!(outcome.succeeded() && ms(outcome, "abort") < 8000.0, "{outcome}");
        expect_released(&report, rank);
    }
}

#[test]
fn without_a_deadline_an_abort_closes_with_requests_in_flight_and_frees_the_kernels() {
    let program = "init; allreduce count=1000 reps=3; abort_in ms=300 on=0; expect_error; allreduce count=1000 on=0; \
                   forget on=0; barrier; abort on=1; init; allreduce count=10; destroy";
    expect_freed(&job(Topology::fabric(2, 1), program).env("TWOSHOT_TIMEOUT_MS", 0).run());
}

#[track_caller]
fn expect_freed(report: &Report) {
    // What an abort leaves to a later moment is gone after the next communicator.
    expect_released(report, 0);
    expect_released(report, 1);
    assert!(report.outcomes[1].succeeded(), "{}", report.outcomes[1]);
    let closed = "closed with requests in flight";
    assert!(report.lines(0).iter().any(|line| line.contains(closed)), "{}", report.outcomes[0]);
    assert_eq!(field(lines_of(&report.outcomes[0], "aborted")[0], "result"), 0.0, "{}", report.outcomes[0]);
    let took = field(lines_of(&report.outcomes[0], "aborted")[0], "ms");
    assert!(took < 8000.0, "abort took {took} ms: {}", report.outcomes[0]);
}

#[test]
fn the_tuner_of_every_version_prefers_collnet_where_nccl_holds_it_for_dearer() {
    for (release, version) in [(22304, 3), (22403, 4), (22809, 5), (23007, 6)] {
        for (mode, expected) in [("collnet", 4.0), ("direct", 0.0)] {
            // In direct mode beyond what is routed.
            let report = job(Topology::fabric(2, 1), "allreduce count=1300 reps=4; destroy")
                .env("TWOSHOT_MODE", mode)
                .env("TWOSHOT_MAX_BYTES", 4096)
                .env("SIM_NCCL_VERSION", release)
                .env("SIM_NCCL_COLLNET_COST", 35)
                .run();
            report.expect_success();
            for outcome in &report.outcomes {
                assert_eq!(field(summary(outcome), "nccl_collnet_runs"), expected, "{release} {mode}: {outcome}");
                let found = outcome.stdout.contains(&format!("Using twoshot (v{version})"));
                assert_eq!(found, mode == "collnet", "{release} {mode}: {outcome}");
            }
        }
    }
}

#[test]
fn the_tuner_asks_for_the_channels_that_make_the_fewest_requests_where_nccl_has_as_many() {
    let program =
        "allreduce count=1000; allreduce count=65536; allreduce count=131072; allreduce count=655360; destroy";
    for (release, _) in [(22304, 3), (22403, 4), (22809, 5), (23007, 6)] {
        for (given, asked) in [("8", ["1", "4", "8", "none"]), ("4", ["1", "4", "4", "none"]), ("", ["none"; 4])] {
            let report = job(Topology::fabric(2, 1), program)
                .env("SIM_NCCL_VERSION", release)
                .env("SIM_NCCL_COLLNET_COST", 35)
                .env("NCCL_MIN_NCHANNELS", given)
                .run();
            expect_collnet(&report, 4.0, &format!("{release} {given}"));
            for outcome in &report.outcomes {
                for (bytes, channels) in [4000, 262_144, 524_288, 2_621_440].into_iter().zip(asked) {
                    let line = format!("TUNER/Plugin: {channels} channels for {bytes} bytes");
                    let any = format!(" channels for {bytes} bytes");
                    let expected = if channels == "none" {
                        !outcome.stdout.contains(&any)
                    } else {
                        outcome.stdout.contains(&line)
                    };
                    assert!(expected, "{release} {given} {line}: {outcome}");
                }
            }
        }
    }
}

#[test]
fn ranks_that_give_nccl_other_numbers_of_channels_go_without_collnet() {
    let report = job(Topology::fabric(2, 1), "allreduce count=1000 reps=3; destroy")
        .rank_env(0, "NCCL_MIN_NCHANNELS", "8")
        .run();
    report.expect_success().expect_nothing_live();
    for outcome in &report.outcomes {
        assert_eq!(field(summary(outcome), "nccl_collnet_runs"), 0.0, "{outcome}");
        assert!(outcome.stdout.contains("NCCL_MIN_NCHANNELS is another number on some rank"), "{outcome}");
    }
}

#[test]
fn slices_of_any_size_and_many_at_once_are_right_and_their_times_are_told() {
    for (slice, depth) in [(4 << 20, 1), (1 << 14, 8)] {
        let report =
            job(Topology::fabric(2, 2), "random calls=12 seed=5 dtypes=f32,f16,i8,f64 max=60000; barrier; destroy")
                .args(&["--exact", "0"])
                .env("SIM_NCCL_COLLNET_SLICE", slice)
                .env("SIM_NCCL_COLLNET_DEPTH", depth)
                .run();
        expect_collnet(&report, 12.0, &format!("slices of {slice}"));
        for (rank, outcome) in report.outcomes.iter().enumerate() {
            let told =
                report.lines(rank).iter().any(|line| line.contains("; requests: ") && line.contains("us to queue"));
            assert!(told, "{outcome}");
        }
    }
}

#[test]
fn requests_go_through_the_ring_of_large_payloads_where_the_ranks_have_one() {
    let program = "random calls=8 seed=9 dtypes=f32,bf16,i64 max=70000; allreduce count=90001 dtype=u8; \
                   allreduce count=5 reps=3; collective name=allgather count=3000; destroy";
    let report = job(Topology::fabric(2, 1), program)
        .args(&["--exact", "0"])
        .env("TWOSHOT_ALGO", "bulk")
        .env("TWOSHOT_MULTICAST", 0)
        .env("SIM_NCCL_COLLNET_SLICE", 4 << 20)
        .run();
    expect_collnet(&report, 12.0, "ring");
    for rank in 0..2 {
        let said = report.lines(rank).iter().any(|line| {
            line.contains("collnet communicator ends: oneshot 0, twoshot 0, bulk ") && !line.contains("bulk 0,")
        });
        assert!(said, "{}", report.outcomes[rank]);
    }
}

/// A tuning file that goes with the test.
struct File(std::path::PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("twoshot-official-{name}-{}.json", std::process::id()));
        std::fs::write(&path, text).expect("a file");
        Self(path)
    }

    /// For a communicator of two ranks on two hosts.
    fn preferring(name: &str, from: u64, to: u64) -> Self {
        let one = format!("{{\"ranks\": 2, \"hosts\": 2, \"from_bytes\": {from}, \"to_bytes\": {to}}}");
        Self::new(name, &format!("{{\"format\": 1, \"rows\": [], \"collnet\": [{one}]}}"))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Calls of 4000, 8000 and 12000 bytes where NCCL itself holds CollNet for dearer.
fn priced(release: u32) -> Job {
    job(Topology::fabric(2, 1), "allreduce count=1000; allreduce count=2000; allreduce count=3000; destroy")
        .env("SIM_NCCL_VERSION", release)
        .env("SIM_NCCL_COLLNET_COST", 35)
}

#[test]
fn the_tuner_of_every_version_prefers_collnet_for_the_sizes_of_the_tuning_file_alone() {
    for release in [22304, 22403, 22809, 23007] {
        for (from, to, expected) in [(4001, 11_999, 1.0), (4000, 8000, 2.0), (1, 3, 0.0)] {
            let file = File::preferring("sizes", from, to);
            let report = priced(release).env("TWOSHOT_TUNING_FILE", file.0.display()).run();
            report.expect_success().expect_nothing_live();
            for outcome in &report.outcomes {
                assert_eq!(field(summary(outcome), "nccl_collnet_runs"), expected, "{release} {from}: {outcome}");
            }
        }
    }
}

#[test]
fn a_tuning_file_without_this_world_or_that_is_none_leaves_the_rule_and_is_named() {
    let other = "{\"format\": 1, \"rows\": [], \"collnet\": [{\"ranks\": 4, \"hosts\": 2, \"from_bytes\": 1, \"to_bytes\": 1}]}";
    for (name, text, said) in [("other", other, None), ("bad", "{\"format\": 1, \"rows\": 3}", Some("invalid type"))] {
        let file = File::new(name, text);
        let report = priced(22809).env("TWOSHOT_TUNING_FILE", file.0.display()).run();
        report.expect_success().expect_nothing_live();
        for (rank, outcome) in report.outcomes.iter().enumerate() {
            assert_eq!(field(summary(outcome), "nccl_collnet_runs"), 3.0, "{name}: {outcome}");
            let lines = report.lines(rank);
            let named =
                lines.iter().any(|line| line.contains("the tuner goes by its rule") && line.contains(" NCCL WARN "));
            assert_eq!(named, said.is_some(), "{name}: {outcome}");
            assert!(said.is_none_or(|word| outcome.stdout.contains(word)), "{outcome}");
        }
    }
}

#[test]
fn ranks_whose_files_prefer_other_sizes_go_without_collnet_and_do_not_hang() {
    let (one, other) = (File::preferring("one", 1, 9000), File::preferring("two", 1, 9001));
    for files in [[Some(&one), Some(&other)], [Some(&one), None]] {
        let mut job = priced(22809);
        for (rank, file) in files.into_iter().enumerate() {
            if let Some(file) = file {
                job = job.rank_env(rank, "TWOSHOT_TUNING_FILE", file.0.display().to_string());
            }
        }
        let report = job.run();
        report.expect_success().expect_nothing_live();
        for outcome in &report.outcomes {
            assert_eq!(field(summary(outcome), "nccl_collnet_runs"), 0.0, "{outcome}");
            assert!(outcome.stdout.contains("prefers CollNet for other sizes on some rank"), "{outcome}");
        }
    }
}

#[test]
fn a_network_that_cannot_be_opened_leaves_nccl_its_own() {
    for net in ["/nowhere/libnet.so", "libc.so.6"] {
        let report = job(Topology::fabric(2, 1), "allreduce count=1000 reps=3; destroy").env("TWOSHOT_NET", net).run();
        report.expect_success().expect_nothing_live();
        for outcome in &report.outcomes {
            assert!(outcome.stdout.contains("Assigned NET plugin Socket to comm"), "{outcome}");
            assert!(outcome.stdout.contains(&format!("TWOSHOT_NET: {net}")), "{outcome}");
            assert_eq!(stock_runs(outcome), 3, "{outcome}");
        }
    }
}

#[test]
fn in_this_mode_no_call_slot_is_bound_and_preloaded_everything_passes_through() {
    for door in [common::Door::Plugin, common::Door::Preload, common::Door::Path] {
        let report =
            job(Topology::one_host(2), "allreduce count=100 reps=5; collective name=allgather count=80; destroy")
                .door(door)
                .run();
        report.expect_success().expect_nothing_live();
        for outcome in &report.outcomes {
            assert_eq!(stock_runs(outcome), 5, "{door:?}: {outcome}");
            assert!(!outcome.stdout.contains("direct door"), "{door:?}: {outcome}");
        }
    }
}
