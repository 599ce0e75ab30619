//! The shipped library against the simulated NCCL and driver, through every door.
mod common;
#[path = "common/script.rs"]
mod script;

use std::os::unix::fs::symlink;
use std::path::Path;

use common::{Door, Job, Report};
use script::{field, lines_of, routed, stock_runs, summary};
use twoshot_sim::{Session, Topology, collnet_plugin, lib_dir, nccl, old_nccl_dir, twoshot_library};

const MIXED: &str = "random calls=30 seed=5 dtypes=f32,f16,bf16 max=20000; destroy";
const SHORT: &str = "facts; random calls=8 seed=6 max=3000; destroy";

/// Every operation but AllReduce, with results checked by the worker.
const OTHERS: &str = "allreduce count=300; collective name=reduce count=77 root=1; collective name=broadcast count=78; \
    collective name=bcast count=79 root=1; collective name=allgather count=80; collective name=reducescatter count=81; \
    collective name=sendrecv count=85; allreduce count=301; allreduce count=300 op=max; allreduce count=300 op=avg; \
    allreduce count=300 op=prod; allreduce count=300 op=premulsum; allreduce count=300 dtype=i32; \
    allreduce count=300 dtype=f64; allreduce count=300 dtype=u8; allreduce count=2000000; destroy";
/// Those that came with 2.28.
const NEWEST: &str = "collective name=alltoall count=82; collective name=gather count=83 root=1; \
    collective name=scatter count=84; allreduce count=300; destroy";

fn folder(session: &Session) -> std::path::PathBuf {
    let folder = session.dir().join("links");
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn search_path(first: &Path) -> String {
    format!("{}:{}", first.display(), lib_dir().display())
}

#[track_caller]
fn expect_routed(report: &Report, what: &str) {
    report.expect_success().expect_on();
    for rank in 0..report.outcomes.len() {
        let (routed, _) = report.counters(rank);
        assert!(routed > 0, "{what}: nothing was routed: {}", report.outcomes[rank]);
    }
    report.expect_nothing_live();
}

#[track_caller]
fn expect_line(report: &Report, text: &str) {
    for outcome in &report.outcomes {
        assert!(outcome.stdout.contains(text), "no \"{text}\": {outcome}");
    }
}

#[test]
fn through_every_door_sums_are_routed_and_right() {
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let report = Job::new(Topology::one_host(4), MIXED).door(door).run();
        expect_routed(&report, &format!("{door:?}"));
    }
}

#[test]
fn every_release_from_2_20_to_2_30_opens_the_plugin_door_and_keeps_its_network() {
    let releases = [
        22005, 22105, 22203, 22304, 22403, 22501, 22602, 22605, 22703, 22705, 22707, 22803, 22807, 22809, 22902, 22907,
        23004, 23007,
    ];
    for release in releases {
        let session = Session::new(&Topology::one_host(2)).expect("a session directory");
        let links = folder(&session);
        let mut job = Job::new(Topology::one_host(2), SHORT).env("SIM_NCCL_VERSION", release);
        if release < 22100 {
            // Takes a name only.
            symlink(twoshot_library(), links.join("libnccl-net-twoshot.so")).expect("a link");
            job = job.door(Door::Shut).env("NCCL_NET_PLUGIN", "twoshot").env("LD_LIBRARY_PATH", search_path(&links));
            // Where the worker finds the counters.
            job = job.env("TWOSHOT_LIBRARY", links.join("libnccl-net-twoshot.so").display());
        } else if release == 22703 {
            // Takes a path for a name, unless it begins with lib.
            symlink(twoshot_library(), links.join("libtwoshot.so")).expect("a link");
            job = job.door(Door::Shut).env("NCCL_NET_PLUGIN", "libtwoshot.so");
            job = job.env("LD_LIBRARY_PATH", search_path(&links));
        }
        let report = job.run_in(session);
        expect_routed(&report, &release.to_string());
        expect_line(&report, "Assigned NET plugin Socket to comm");
        expect_line(&report, &format!("version {release}"));
    }
}

#[test]
fn every_release_is_routed_when_preloaded_or_opened_by_path() {
    for release in [22005, 22304, 22602, 22703, 22809, 23007] {
        for door in [Door::Preload, Door::Path] {
            let job = Job::new(Topology::one_host(2), SHORT).door(door).env("SIM_NCCL_VERSION", release);
            let report = job.run();
            expect_routed(&report, &format!("{release} {door:?}"));
            expect_line(&report, &format!("version {release}"));
        }
    }
}

#[test]
fn a_network_plugin_behind_ours_in_the_list_is_still_chosen() {
    for release in [22705, 22809, 22907, 23007] {
        let list = format!("{},{}", twoshot_library().display(), collnet_plugin().display());
        let job = Job::new(Topology::one_host(2), SHORT).door(Door::Shut).env("NCCL_NET_PLUGIN", list);
        let report = job.env("SIM_NCCL_VERSION", release).run();
        expect_routed(&report, &release.to_string());
        expect_line(&report, "Assigned NET plugin SimTest to comm");
    }
}

#[test]
fn preloaded_beside_a_network_plugin_it_leaves_that_plugin_in_place() {
    for release in [22304, 22605, 22809] {
        let job = Job::new(Topology::one_host(2), SHORT).door(Door::Preload).env("SIM_NCCL_VERSION", release);
        let report = job.env("NCCL_NET_PLUGIN", collnet_plugin().display()).run();
        expect_routed(&report, &release.to_string());
        expect_line(&report, "Assigned NET plugin SimTest to comm");
    }
}

#[test]
fn a_collective_network_of_another_vendor_runs_as_it_does_without_us() {
    // Routed calls go past it; what we leave to stock still reaches it. 2 hosts, since that is when NCCL asks for it.
    let program = "allreduce count=1000 reps=3; allreduce count=1300 reps=4; barrier; destroy";
    for (release, door) in [
        (22005, Door::Shut),
        (22304, Door::Shut),
        (22403, Door::Preload),
        (22602, Door::Preload),
        (22803, Door::Shut),
        (22809, Door::Preload),
        (23007, Door::Preload),
        (23007, Door::Shut),
    ] {
        let topology = Topology::fabric(2, 2);
        let session = Session::new(&topology).expect("a session directory");
        let links = folder(&session);
        symlink(collnet_plugin(), links.join("libnccl-net-simtest.so")).expect("a link");
        let plugin = if release < 22100 { "simtest".to_owned() } else { collnet_plugin().display().to_string() };
        // The network adds in the order of the hosts.
        let report = Job::new(topology, program)
            .door(door)
            .args(&["--exact", "0"])
            .env("NCCL_NET_PLUGIN", plugin)
            .env("NCCL_COLLNET_ENABLE", 1)
            .env("TWOSHOT_MAX_BYTES", 4096)
            .env("SIM_NCCL_VERSION", release)
            .env("LD_LIBRARY_PATH", search_path(&links))
            .run_in(session);
        report.expect_success();
        for outcome in &report.outcomes {
            let collnet = field(summary(outcome), "nccl_collnet_runs");
            let expected = if door == Door::Shut { 7.0 } else { 4.0 };
            assert_eq!(collnet, expected, "{release} {door:?}: {outcome}");
            if door != Door::Shut {
                assert_eq!(routed(outcome), 3, "{outcome}");
            }
        }
    }
}

#[test]
fn a_tuner_of_another_vendor_is_asked_in_every_version_and_runs_as_it_does_without_us() {
    // One release for each version of the table; it is found in the network plugin, as NCCL finds one.
    for (release, version) in [(22203, 3), (22403, 4), (22809, 5), (23007, 6)] {
        for (wish, expected) in [("avoid", 0.0), ("leave", 4.0)] {
            let report = Job::new(Topology::fabric(2, 2), "allreduce count=1300 reps=4; destroy")
                .door(Door::Preload)
                .args(&["--exact", "0"])
                .env("NCCL_NET_PLUGIN", collnet_plugin().display())
                .env("NCCL_COLLNET_ENABLE", 1)
                .env("TWOSHOT_MAX_BYTES", 4096)
                .env("SIM_NCCL_VERSION", release)
                .env("SIM_TUNER", wish)
                .run();
            report.expect_success();
            for outcome in &report.outcomes {
                let asked = format!("Using simtuner (v{version})");
                assert!(outcome.stdout.contains(&asked), "{asked}: {outcome}");
                assert_eq!(field(summary(outcome), "nccl_collnet_runs"), expected, "{release} {wish}: {outcome}");
            }
        }
    }
}

#[test]
fn in_place_of_libnccl_by_a_link_it_finds_the_stock_library() {
    for explicit in [true, false] {
        let session = Session::new(&Topology::one_host(2)).expect("a session directory");
        let links = folder(&session);
        symlink(twoshot_library(), links.join("libnccl.so.2")).expect("a link");
        let mut job = Job::new(Topology::one_host(2), SHORT).door(Door::Shut);
        if explicit {
            job = job.env("TWOSHOT_NCCL_LIBRARY", nccl().display());
        }
        let report = job.env("LD_LIBRARY_PATH", search_path(&links)).run_in(session);
        expect_routed(&report, if explicit { "named" } else { "found" });
    }
}

#[test]
fn an_nccl_that_lacks_what_came_after_2_20_works_through_every_door() {
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let session = Session::new(&Topology::one_host(2)).expect("a session directory");
        let links = folder(&session);
        symlink(twoshot_library(), links.join("libnccl-net-twoshot.so")).expect("a link");
        let path = format!("{}:{}:{}", links.display(), old_nccl_dir().display(), lib_dir().display());
        let mut job = Job::new(Topology::one_host(2), SHORT).door(door).env("LD_LIBRARY_PATH", path);
        if door == Door::Plugin {
            job = job.door(Door::Shut).env("NCCL_NET_PLUGIN", "twoshot");
            job = job.env("TWOSHOT_LIBRARY", links.join("libnccl-net-twoshot.so").display());
        }
        if door == Door::Path {
            job = job.env("TWOSHOT_NCCL_LIBRARY", old_nccl_dir().join("libnccl.so.2").display());
        }
        let report = job.run_in(session);
        expect_routed(&report, &format!("{door:?}"));
        expect_line(&report, "version 22005");
        expect_line(&report, "lib/old/libnccl.so.2");
    }
}

#[test]
fn of_two_nccl_libraries_in_a_process_the_one_the_program_uses_stays_in_use() {
    // The program is linked with one and opens another by path; the second one loads us.
    let session = Session::new(&Topology::one_host(2)).expect("a session directory");
    let copy = folder(&session).join("libnccl-copy.so");
    std::fs::copy(nccl(), &copy).expect("a copy");
    let args = ["--nccl".to_owned(), copy.display().to_string()];
    let program = "facts; random calls=8 seed=6 max=3000; destroy";
    let report = Job::new(Topology::one_host(2), program).args(&[&args[0], &args[1]]).run_in(session);
    // Function pointers of the opened copy cannot be rerouted: stock does everything, and right.
    report.expect_success();
    for outcome in &report.outcomes {
        assert_eq!(stock_runs(outcome), 8, "{outcome}");
    }
    // By its path the same program is routed, to the copy that it names.
    let session = Session::new(&Topology::one_host(2)).expect("a session directory");
    let copy = folder(&session).join("libnccl-copy.so");
    std::fs::copy(nccl(), &copy).expect("a copy");
    let job = Job::new(Topology::one_host(2), program).door(Door::Path).env("TWOSHOT_NCCL_LIBRARY", copy.display());
    let report = job.run_in(session);
    expect_routed(&report, "by path");
    expect_line(&report, "libnccl-copy.so");
}

#[test]
fn calls_that_stock_nccl_makes_of_its_own_functions_never_come_back() {
    let program = "init_all; allreduce count=100; destroy";
    let (_, outcome) = script::one_process(2, "--gpus", program, &[("SIM_NCCL_REENTER", "1")]);
    outcome.expect_success();
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let program = "random calls=12 seed=7 max=3000; allreduce count=9 op=premulsum maker=stock; split color=0; \
                       allreduce count=500; destroy; destroy";
        let report = Job::new(Topology::one_host(2), program).door(door).env("SIM_NCCL_REENTER", 1).run();
        expect_routed(&report, &format!("{door:?}"));
        for rank in 0..2 {
            // 13 collectives of the program and none that were counted twice: the first communicator is set up before
            // its first call, so is the child.
            assert_eq!(report.counters(rank), (13, 1), "{}{}", report.outcomes[0], report.outcomes[1]);
        }
    }
}

#[test]
fn switched_off_it_leaves_everything_alone_through_every_door() {
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let report = Job::new(Topology::one_host(2), SHORT).door(door).env("TWOSHOT_MODE", "off").run();
        report.expect_success().expect_nothing_live();
        for outcome in &report.outcomes {
            assert_eq!(stock_runs(outcome), 8, "{door:?}: {outcome}");
            assert_eq!(routed(outcome), 0, "{door:?}: {outcome}");
            let stats = report.session.stats(outcome.pid).expect("stats");
            assert_eq!(stats.calls("cuMemCreate") + stats.calls("cuModuleLoadData"), 0, "{door:?}");
            assert!(!outcome.stdout.contains("ON,"), "{outcome}");
        }
    }
}

#[test]
fn every_other_collective_passes_through_and_is_right() {
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let report = Job::new(Topology::one_host(3), OTHERS).door(door).run();
        report.expect_success().expect_on().expect_nothing_live();
        let report = Job::new(Topology::one_host(3), NEWEST).door(door).run();
        report.expect_success().expect_on().expect_nothing_live();
        for outcome in &report.outcomes {
            assert!(lines_of(outcome, "collective").iter().all(|line| line.contains("\"ok\":true")), "{outcome}");
            assert_eq!(routed(outcome), 1, "{outcome}");
        }
    }
}

/// Three ranks share two communicators, and a library that uses NCCL is loaded between them; meanwhile two of the ranks
/// have made one more. `door` opens on all ranks.
fn loaded_late(door: Door, release: u32) -> Report {
    let program = "init; allreduce count=100 path=routed; extend; init ranks=2 on=0,1; \
        allreduce count=50 on=0,1 path=routed; destroy on=0,1; init by=extension; allreduce count=300 by=extension reps=3; \
        allreduce count=60 path=routed; use comm=0; allreduce count=70 path=routed; allreduce count=80 by=extension; \
        destroy; destroy; release";
    Job::new(Topology::one_host(3), program).door(door).env("SIM_NCCL_VERSION", release).run()
}

#[test]
fn a_library_loaded_late_is_bound_on_all_ranks_of_a_communicator_or_none_though_some_ranks_made_more_communicators() {
    for release in [22605, 22809, 23007] {
        let report = loaded_late(Door::Plugin, release);
        report.expect_success().expect_on().expect_nothing_live();
        for (rank, outcome) in report.outcomes.iter().enumerate() {
            assert_eq!(routed(outcome), if rank < 2 { 4 } else { 3 }, "{outcome}");
            assert_eq!(stock_runs(outcome), 4, "{outcome}");
            if rank < 2 {
                let said =
                    report.lines(rank).iter().filter(|line| line.contains("after the first communicator")).count();
                assert_eq!(said, 1, "{outcome}");
            }
        }
    }
    // Preloaded, twoshot stands before NCCL for every library.
    let report = loaded_late(Door::Preload, 22809);
    report.expect_success().expect_on().expect_nothing_live();
    for (rank, outcome) in report.outcomes.iter().enumerate() {
        assert_eq!((routed(outcome), stock_runs(outcome)), (if rank < 2 { 8 } else { 7 }, 0), "{outcome}");
    }
}

#[test]
fn loaded_on_some_ranks_only_the_loaded_ones_name_that_cause() {
    let library = twoshot_library();
    let job = Job::new(Topology::one_host(3), "allreduce count=1000; destroy")
        .door(Door::Shut)
        .env("SIM_NCCL_DISAGREE", "hang")
        .timeout(std::time::Duration::from_secs(9))
        .rank_env(0, "NCCL_NET_PLUGIN", library.display())
        .rank_env(2, "NCCL_NET_PLUGIN", library.display());
    let report = job.run();
    for rank in [0, 2] {
        let said = report.lines(rank).iter().any(|line| line.contains("Is twoshot loaded on every rank?"));
        assert!(said, "rank {rank} does not name the cause: {}", report.outcomes[rank]);
    }
}
