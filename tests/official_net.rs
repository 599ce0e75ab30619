//! The tables of the official door driven call by call, as NCCL's proxy drives them: the network over NVLink in every
//! version, and what a simulated NCCL does not do with the collective one.

use std::time::Duration;

use twoshot_sim::{End, Outcome, Rank, Session, Topology, plugin_driver, twoshot_library};

const VERSIONS: [u32; 5] = [8, 9, 10, 11, 12];

/// Runs one program of the driver on every GPU of a topology.
fn run(topology: &Topology, program: &str, version: u32, seed: u32, env: &[(&str, &str)]) -> (Session, Vec<Outcome>) {
    let session = Session::new(topology).expect("a session directory");
    let ranks = session.ranks(plugin_driver());
    let count = ranks.len().to_string();
    let ranks: Vec<Rank> = ranks
        .into_iter()
        .enumerate()
        .map(|(r, rank)| {
            let rank = rank
                .args(["--rank", &r.to_string(), "--ranks", &count, "--version", &version.to_string()])
                .args(["--seed", &seed.to_string()])
                .arg("--library")
                .arg(twoshot_library())
                .arg("--dir")
                .arg(session.dir())
                .arg(program)
                .env("TWOSHOT_MODE", "collnet")
                .env("TWOSHOT_SETUP_TIMEOUT_MS", "10000")
                .env("NCCL_DEBUG", "INFO");
            env.iter().fold(rank, |rank, (name, value)| rank.env(name, value))
        })
        .collect();
    let outcomes = session.run_all(ranks, Duration::from_secs(100)).expect("the ranks were started");
    (session, outcomes)
}

#[track_caller]
fn expect_clean(session: &Session, outcomes: &[Outcome], but: &[&str]) {
    let failed = outcomes.iter().any(|outcome| !outcome.succeeded());
    assert!(!failed, "{}", outcomes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
    for outcome in outcomes {
        session.stats(outcome.pid).expect("stats of a rank").assert_nothing_live_but(but);
    }
}

#[test]
fn messages_of_all_kinds_arrive_whole_in_every_version_on_one_host() {
    for version in VERSIONS {
        let (session, outcomes) = run(&Topology::one_host(3), "messages", version, version, &[]);
        expect_clean(&session, &outcomes, &[]);
        let sum = session.sum_of_stats().expect("stats");
        assert!(sum.calls("cuMemImportFromShareableHandle") >= 3, "v{version}: windows are shared");
    }
}

#[test]
fn messages_arrive_between_hosts_of_a_fabric_and_a_window_outlives_its_sender() {
    for (version, topology) in [(8, Topology::fabric(2, 2)), (11, Topology::fabric(3, 1)), (12, Topology::fabric(2, 1))]
    {
        let (session, outcomes) = run(&topology, "messages", version, 40 + version, &[]);
        // A window may wait for the last word of its sender when the program ends.
        let waiting = [
            "contexts",
            "allocations",
            "device_bytes",
            "mappings",
            "mapped_bytes",
            "reservations",
            "reserved_bytes",
            "fds",
            "streams",
            "events",
        ];
        expect_clean(&session, &outcomes, &waiting);
        let sum = session.sum_of_stats().expect("stats");
        assert_eq!(sum.total("fabric_orphans"), 0, "memory went while a peer could write to it");
        assert_eq!(sum.live("imports"), 0, "no sender holds a window any more");
    }
}

#[test]
fn a_full_sender_is_told_to_try_again_and_loses_nothing() {
    for version in [8, 12] {
        let (session, outcomes) = run(&Topology::one_host(2), "flood", version, 3, &[]);
        expect_clean(&session, &outcomes, &[]);
    }
}

#[test]
fn connections_close_with_requests_in_flight_and_listeners_without_a_caller() {
    for version in [8, 11] {
        let (session, outcomes) = run(&Topology::one_host(3), "close", version, 5, &[]);
        expect_clean(&session, &outcomes, &[]);
    }
}

#[test]
fn connecting_says_try_again_until_the_slowest_has_come() {
    let (session, outcomes) = run(&Topology::one_host(4), "late", 11, 7, &[]);
    expect_clean(&session, &outcomes, &[]);
}

#[test]
fn a_capture_on_another_thread_does_not_suffer() {
    let (session, outcomes) = run(&Topology::one_host(2), "capture", 11, 12, &[]);
    expect_clean(&session, &outcomes, &[]);
}

#[test]
fn a_dead_sender_becomes_an_error() {
    let (session, outcomes) = run(&Topology::one_host(3), "die", 11, 8, &[]);
    assert_eq!(outcomes[1].end, End::Signal(9));
    for rank in [0, 2] {
        expect_clean(&session, &outcomes[rank..=rank], &[]);
    }
}

#[test]
fn ranks_of_different_domains_are_refused_and_the_log_names_the_way_out() {
    let alone = Topology::of(vec![twoshot_sim::Host::alone(1), twoshot_sim::Host::alone(1)]);
    let (_session, outcomes) = run(&alone, "late", 11, 9, &[]);
    for outcome in &outcomes {
        assert_eq!(outcome.end, End::Exit(1), "{outcome}");
    }
    assert!(outcomes.iter().any(|outcome| outcome.stdout.contains("set TWOSHOT_NET")), "{}", outcomes[0]);
}

#[test]
fn whatever_call_of_the_driver_fails_while_connecting_both_ends_get_an_error() {
    for call in
        ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle", "cuMemMap", "cuEventCreate"]
    {
        let rule = format!("rank=1,call={call},nth=1,code=2");
        let (_session, outcomes) = run(&Topology::one_host(2), "late", 11, 10, &[("TWOSHOT_SIM_FAULTS", &rule)]);
        for outcome in &outcomes {
            // An end that failed behind the handshake is noticed by the other at its first message, as by NCCL.
            let clean = outcome.end == End::Exit(1) || (call == "cuEventCreate" && outcome.succeeded());
            assert!(clean, "{call}: {outcome}");
        }
        assert_eq!(outcomes[1].end, End::Exit(1), "{call}: {}", outcomes[1]);
    }
}

#[test]
fn the_collective_network_reduces_gathers_and_scatters_in_every_version() {
    for version in VERSIONS {
        let most = if version == 9 { "9000" } else { "300000" };
        let (session, outcomes) =
            run(&Topology::one_host(3), "collect", version, 60 + version, &[("TWOSHOT_MAX_BYTES", most)]);
        expect_clean(&session, &outcomes, &[]);
    }
}

#[test]
fn the_collective_network_closes_with_requests_that_wait_for_a_rank() {
    let (session, outcomes) = run(&Topology::one_host(3), "collclose", 11, 70, &[("TWOSHOT_SETUP_TIMEOUT_MS", "3000")]);
    expect_clean(&session, &outcomes, &[]);
}
