//! The tables of the official door driven call by call, as NCCL's proxy drives them: the network over NVLink in every
//! version, and what a simulated NCCL does not do with the collective one.

use std::time::Duration;

use twoshot_sim::{End, Outcome, Rank, Session, Topology, plugin_driver, twoshot_library};

const VERSIONS: [u32; 5] = [8, 9, 10, 11, 12];

/// What may wait for the last word of a sender on another host when the program ends.
const WAITING: [&str; 10] = [
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

/// Runs one program of the driver on every GPU of a topology.
fn run(topology: &Topology, program: &str, version: u32, seed: u32, env: &[(&str, &str)]) -> (Session, Vec<Outcome>) {
    run_with(topology, (program, "mixed"), version, seed, env)
}

/// The same, with network buffers of one kind.
fn run_with(
    topology: &Topology,
    (program, memory): (&str, &str),
    version: u32,
    seed: u32,
    env: &[(&str, &str)],
) -> (Session, Vec<Outcome>) {
    let session = Session::new(topology).expect("a session directory");
    let ranks = session.ranks(plugin_driver());
    let count = ranks.len().to_string();
    let ranks: Vec<Rank> = ranks
        .into_iter()
        .enumerate()
        .map(|(r, rank)| {
            let rank = rank
                .args(["--rank", &r.to_string(), "--ranks", &count, "--version", &version.to_string()])
                .args(["--seed", &seed.to_string(), "--memory", memory])
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
        expect_clean(&session, &outcomes, &WAITING);
        let sum = session.sum_of_stats().expect("stats");
        assert_eq!(sum.total("fabric_orphans"), 0, "memory went while a peer could write to it");
        assert_eq!(sum.live("imports"), 0, "no sender holds a window any more");
    }
}

/// One host, or two of a fabric: how handles travel, and what may wait when the program ends.
fn both_ways() -> [(Topology, &'static [&'static str]); 2] {
    [(Topology::one_host(2), &[]), (Topology::fabric(2, 1), &WAITING)]
}

#[test]
fn messages_go_straight_into_memory_that_can_be_shared() {
    for (version, topology) in [(8, Topology::one_host(3)), (10, Topology::fabric(2, 1)), (12, Topology::fabric(2, 2))]
    {
        let (session, outcomes) = run_with(&topology, ("direct", "mapped"), version, 100 + version, &[]);
        expect_clean(&session, &outcomes, &WAITING);
        let sum = session.sum_of_stats().expect("stats");
        assert_eq!((sum.total("fabric_orphans"), sum.live("imports")), (0, 0));
        let ended = |outcome: &&Outcome| outcome.stdout.contains("were sent straight into registered memory");
        assert!(outcomes.iter().all(|outcome| ended(&outcome)), "{}", outcomes[0]);
    }
}

#[test]
fn messages_for_memory_that_cannot_be_shared_go_through_the_window_and_the_log_says_so_once() {
    for (topology, waiting) in both_ways() {
        let (session, outcomes) = run_with(&topology, ("direct", "plain"), 11, 31, &[]);
        expect_clean(&session, &outcomes, waiting);
        for outcome in &outcomes {
            let named = outcome.stdout.matches("registered memory is reached through the window (").count();
            assert_eq!(named, 1, "{outcome}");
            assert!(outcome.stdout.contains("cuMemRetainAllocationHandle failed with"), "{outcome}");
        }
    }
}

#[test]
fn the_users_word_keeps_everything_to_the_window() {
    let env = [("TWOSHOT_NET_DIRECT", "0")];
    let (session, outcomes) = run_with(&Topology::one_host(2), ("little", "mapped"), 11, 33, &env);
    expect_clean(&session, &outcomes, &[]);
    assert_eq!(session.sum_of_stats().expect("stats").calls("cuMemRetainAllocationHandle"), 0);
    for outcome in &outcomes {
        assert!(outcome.stdout.contains("network: 0 messages (0 B) were sent straight"), "{outcome}");
    }
}

#[test]
fn an_address_that_is_registered_again_over_other_memory_leads_to_that() {
    for (version, (topology, waiting)) in [9, 12].into_iter().zip(both_ways()) {
        let (session, outcomes) = run_with(&topology, ("again", "mapped"), version, 17, &[]);
        expect_clean(&session, &outcomes, waiting);
        assert_eq!(session.sum_of_stats().expect("stats").total("fabric_orphans"), 0);
    }
}

#[test]
fn memory_that_its_owner_frees_under_a_copy_stays_until_the_copy_has_ended() {
    for (topology, waiting) in both_ways() {
        let (session, outcomes) = run_with(&topology, ("vanish", "mapped"), 11, 23, &[]);
        expect_clean(&session, &outcomes, waiting);
        assert_eq!(session.sum_of_stats().expect("stats").total("fabric_orphans"), 0);
    }
}

#[test]
fn connections_close_with_straight_copies_in_flight_on_one_host_and_between_two() {
    for (topology, waiting) in both_ways() {
        let (session, outcomes) = run_with(&topology, ("close", "mapped"), 11, 6, &[]);
        expect_clean(&session, &outcomes, waiting);
        assert_eq!(session.sum_of_stats().expect("stats").total("fabric_orphans"), 0);
    }
}

#[test]
fn whatever_call_of_the_driver_fails_for_registered_memory_messages_arrive_and_nothing_is_left() {
    // At which use: behind those for the window of each end. 0 is every use.
    let cells: [(&str, &[u32]); 9] = [
        ("cuMemRetainAllocationHandle", &[0, 1, 4]),
        ("cuMemGetAddressRange", &[0, 2]),
        ("cuMemGetAllocationPropertiesFromHandle", &[0, 1]),
        ("cuMemExportToShareableHandle", &[2, 3]),
        ("cuMemImportFromShareableHandle", &[2, 4]),
        ("cuMemGetAllocationGranularity", &[3, 4]),
        ("cuMemAddressReserve", &[3, 5]),
        ("cuMemMap", &[3, 4]),
        ("cuMemSetAccess", &[3, 4]),
    ];
    let mut codes = [1, 2, 101, 201, 800, 801, 999].into_iter().cycle();
    let mut topologies = both_ways().into_iter().cycle();
    for (call, uses) in cells {
        for nth in uses {
            let (code, (topology, waiting)) = (codes.next().unwrap_or(1), topologies.next().expect("a cycle"));
            let at = if *nth == 0 { String::new() } else { format!("nth={nth},") };
            let rule = format!("rank=1,call={call},{at}code={code}");
            let env = [("TWOSHOT_SIM_FAULTS", rule.as_str()), ("TWOSHOT_SIM_CALLER", "libtwoshot.so")];
            let (session, outcomes) = run_with(&topology, ("little", "mapped"), 11, 40 + nth, &env);
            expect_clean(&session, &outcomes, waiting);
            let sum = session.sum_of_stats().expect("stats");
            assert_eq!((sum.total("fabric_orphans"), sum.live("imports")), (0, 0), "{rule}");
        }
    }
}

#[test]
fn a_straight_copy_that_fails_becomes_an_error_at_both_ends() {
    let env = [("TWOSHOT_SIM_FAULTS", "rank=1,call=cuMemcpyDtoDAsync,nth=9,code=700")];
    let (_session, outcomes) = run_with(&Topology::one_host(2), ("little", "mapped"), 11, 3, &env);
    for outcome in &outcomes {
        assert_eq!(outcome.end, End::Exit(1), "{outcome}");
    }
    assert!(outcomes[1].stdout.contains("cuMemcpyDtoDAsync_v2 failed with"), "{}", outcomes[1]);
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
    // The first to end has it from its own accept or from the other's; the second may see no more than that the first is gone.
    assert!(
        outcomes.iter().any(|outcome| outcome.stdout.contains("set TWOSHOT_NET")),
        "{}{}",
        outcomes[0],
        outcomes[1]
    );
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
