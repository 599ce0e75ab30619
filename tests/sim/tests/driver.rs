//! The simulated driver keeps CUDA's rules.

use std::time::Duration;

use twoshot_sim::{End, Fabric, Host, Link, Netns, Outcome, Rank, Session, Topology, selftest};

const LIMIT: Duration = Duration::from_secs(60);

fn scenario(name: &str, rank: usize, ranks: usize, option: &str) -> Vec<String> {
    vec![name.into(), rank.to_string(), ranks.to_string(), option.into()]
}

/// One process per GPU.
fn run(topology: &Topology, name: &str, option: &str) -> (Session, Vec<Outcome>) {
    let session = Session::new(topology).expect("a session");
    let ranks = session.ranks(selftest());
    let count = ranks.len();
    let ranks = ranks.into_iter().enumerate().map(|(r, rank)| rank.args(scenario(name, r, count, option)));
    let outcomes = session.run_all(ranks, LIMIT).expect("processes");
    (session, outcomes)
}

/// As `run`; everyone succeeds and leaves nothing.
fn passes(topology: &Topology, name: &str, option: &str) -> Session {
    let (session, outcomes) = run(topology, name, option);
    for outcome in outcomes {
        outcome.expect_success();
        session.stats(outcome.pid).expect("statistics").assert_nothing_live();
    }
    session
}

fn one(topology: &Topology, rank: Rank, name: &str) -> (Session, Outcome) {
    let session = Session::new(topology).expect("a session");
    let mut outcomes =
        session.run_all([rank.args(scenario(name, 0, 1, ""))], Duration::from_secs(2)).expect("a process");
    (session, outcomes.remove(0))
}

#[test]
fn memory_is_shared_by_descriptor() {
    let session = passes(&Topology::one_host(4), "share", "fd");
    let sum = session.sum_of_stats().unwrap();
    assert_eq!((sum.total("allocations"), sum.total("imports"), sum.total("mappings")), (1, 3, 4));
    assert_eq!(sum.calls("cuMemCreate"), 1);
}

#[test]
fn memory_is_shared_by_fabric_handle_across_hosts() {
    passes(&Topology::fabric(3, 2), "share", "fabric");
}

#[test]
fn a_descriptor_keeps_memory_that_nobody_else_holds() {
    passes(&Topology::one_host(1), "descriptor-keeps", "");
}

#[test]
fn wrong_uses_of_memory_are_refused() {
    let topology = Topology::one_host(2).pair(0, 0, 1, Link::None);
    let session = Session::new(&topology).unwrap();
    let rank = Rank::new(selftest()).gpus("0,1").args(scenario("refusals", 0, 1, ""));
    let outcome = session.run_all([rank], LIMIT).unwrap().remove(0);
    outcome.expect_success();
    session.stats(outcome.pid).unwrap().assert_nothing_live();
}

#[test]
fn a_fabric_handle_ends_at_the_clique() {
    let topology = Topology::fabric(2, 1).with_host(1, |h| h.clique = 2);
    passes(&topology, "foreign-fabric", "");
}

#[test]
fn processes_on_one_gpu_share_its_capacity() {
    let session = Session::new(&Topology::one_host(1)).unwrap();
    let ranks = (0..3).map(|r| Rank::new(selftest()).gpu(0).args(scenario("capacity", r, 3, "")));
    for outcome in session.run_all(ranks, LIMIT).unwrap() {
        outcome.expect_success();
    }
}

#[test]
fn multicast_stores_reach_every_process() {
    passes(&Topology::one_host(4), "fanout", "fd");
    passes(&Topology::fabric(2, 3), "fanout", "fabric");
}

#[test]
fn parts_of_a_multicast_object_are_bound_apart_from_each_other() {
    passes(&Topology::one_host(1), "parts", "");
}

#[test]
fn a_store_or_load_where_nothing_is_bound_to_a_multicast_object_is_reported() {
    for name in ["unbound-store", "unbound-load"] {
        let (_session, outcome) = one(&Topology::one_host(1), Rank::new(selftest()), name);
        assert_eq!(outcome.end, End::Signal(6), "{outcome}");
        assert!(outcome.stderr.contains("0 of 1 devices are bound there"), "{outcome}");
    }
}

#[test]
fn an_ordinary_access_to_a_multicast_address_is_reported() {
    for name in ["ordinary-store", "ordinary-load"] {
        let (_session, outcome) = one(&Topology::one_host(1), Rank::new(selftest()), name);
        assert_eq!(outcome.end, End::Signal(6), "{outcome}");
        assert!(outcome.stderr.contains("twoshot-sim: ordinary access to multicast address"), "{outcome}");
    }
}

#[test]
fn a_switch_has_as_many_multicast_slots_as_the_topology_says() {
    passes(&Topology::one_host(1), "slots", "128");
    passes(&Topology::one_host(1).multicast_slots(3), "slots", "3");
}

#[test]
fn a_dead_process_gives_its_multicast_slots_back() {
    let (session, outcomes) = run(&Topology::one_host(2).multicast_slots(1), "survivor", "");
    outcomes[0].expect_success();
    assert_eq!(outcomes[1].end, End::Signal(9));
    session.stats(outcomes[0].pid).unwrap().assert_nothing_live();
}

#[test]
fn a_call_after_main_meets_a_driver_that_is_gone() {
    let session = Session::new(&Topology::one_host(1)).unwrap();
    let rank = Rank::new(selftest()).args(scenario("after-exit", 0, 1, ""));
    let outcome = session.run_all([rank], LIMIT).unwrap().remove(0);
    assert_eq!(outcome.stdout, "refused\n", "{outcome}");
    assert_eq!(session.stats(outcome.pid).unwrap().total("calls_after_exit"), 1);
}

#[test]
fn multicast_needs_hardware_that_has_it() {
    passes(&Topology::one_host(2).gpus("multicast=0"), "unsupported", "");
    let (_session, outcomes) =
        run(&Topology::one_host(1).with_host(0, |h| h.fabric = Fabric::InProgress), "slots", "1");
    assert!(outcomes[0].stderr.contains("gave 802"), "{}", outcomes[0]);
}

#[test]
fn a_bind_waits_for_all_devices() {
    let (_session, outcome) = one(&Topology::one_host(2), Rank::new(selftest()), "bind-alone");
    assert_eq!(outcome.end, End::TimedOut);
    passes(&Topology::one_host(1).line("mc-bind-timeout 50"), "bind-alone", "");
}

#[test]
fn streams_and_events_keep_cuda_order() {
    passes(&Topology::one_host(1), "order", "");
}

#[test]
fn a_captured_graph_replays() {
    let session = passes(&Topology::one_host(1), "replay", "");
    assert_eq!(session.sum_of_stats().unwrap().total("graph_launches"), 3);
}

#[test]
fn calls_that_a_capture_forbids_are_refused() {
    passes(&Topology::one_host(1), "capture-errors", "");
}

#[test]
fn modules_and_symbols_are_found_by_name() {
    passes(&Topology::one_host(1), "modules", "");
}

#[test]
fn the_shipped_kernels_reduce_across_processes() {
    let topology = Topology::fabric(2, 2);
    for name in ["oneshot_f32_4_uc", "oneshot_f32_n_mc", "twoshot_f32_n_uc", "twoshot_f32_4_mc"] {
        let session = passes(&topology, "allreduce", &format!("twoshot_{name}"));
        let sum = session.sum_of_stats().unwrap();
        assert_eq!((sum.total("launches"), sum.total("lazy_loads")), (4 * 6, 0));
    }
}

#[test]
fn a_rack_of_seventy_two_reduces() {
    let session = passes(&Topology::fabric(18, 4), "allreduce", "twoshot_twoshot_f32_n_mc");
    assert_eq!(session.sum_of_stats().unwrap().total("imports"), 72 * 71);
}

#[test]
fn a_fault_rule_gives_its_code_once_or_always() {
    let rank = || Rank::new(selftest());
    let (session, outcome) = one(&Topology::one_host(1), rank().faults("call=cuMemCreate,nth=2,code=2"), "create");
    assert_eq!(outcome.stdout, "0\n2\n0\n", "{outcome}");
    session.stats(outcome.pid).unwrap().assert_nothing_live();
    let (_s, outcome) = one(&Topology::one_host(1), rank().faults("rank=0,call=cuMemCreate,nth=0,code=801"), "create");
    assert_eq!(outcome.stdout, "801\n801\n801\n");
    let (_s, outcome) = one(&Topology::one_host(1), rank().faults("rank=1,call=cuMemCreate,nth=0,code=801"), "create");
    assert_eq!(outcome.stdout, "0\n0\n0\n");
    let (_s, outcome) = one(&Topology::one_host(1), rank().faults("call=cuMemCreate,nth=2,code=401,sticky"), "create");
    assert_eq!(outcome.stdout, "0\n401\n401\n");
}

#[test]
fn a_fault_rule_delays_blocks_or_kills() {
    let rank = || Rank::new(selftest());
    let (_s, outcome) = one(&Topology::one_host(1), rank().faults("call=cuMemCreate,nth=1,delay=300"), "create");
    assert!(outcome.succeeded() && outcome.elapsed >= Duration::from_millis(300), "{outcome}");
    let (_s, outcome) = one(&Topology::one_host(1), rank().faults("call=cuMemCreate,nth=3,block"), "create");
    assert_eq!((outcome.end, outcome.stdout.as_str()), (End::TimedOut, "0\n0\n"));
    let (_s, outcome) = one(&Topology::one_host(1), rank().faults("call=cuMemCreate,nth=2,kill"), "create");
    assert_eq!((outcome.end, outcome.stdout.as_str()), (End::Signal(9), "0\n"));
}

#[test]
fn what_a_process_leaves_behind_is_counted() {
    let (session, outcome) = one(&Topology::one_host(1), Rank::new(selftest()), "leak");
    outcome.expect_success();
    let stats = session.stats(outcome.pid).unwrap();
    for kind in ["allocations", "mappings", "reservations", "fds", "contexts"] {
        assert_eq!(stats.live(kind), 1, "{kind}: {:?}", stats.all_live());
    }
    assert!(std::panic::catch_unwind(|| stats.assert_nothing_live()).is_err());
}

#[test]
fn nvml_tells_of_links_and_fabric() {
    let mut host = Host::in_fabric(2, [7; 16], 1);
    let (_s, outcomes) = run(&Topology::of(vec![host.clone()]), "nvml", "nvlink");
    outcomes.iter().for_each(Outcome::expect_success);
    host.link = Link::Pcie;
    let (_s, outcomes) = run(&Topology::of(vec![host]), "nvml", "pcie");
    outcomes.iter().for_each(Outcome::expect_success);
}

#[test]
fn a_library_can_lack_a_symbol() {
    for (lacking, answer) in [(&[][..], "present\n"), (&["cuMulticastCreate"][..], "absent\n")] {
        let session = Session::new(&Topology::one_host(1)).unwrap().without_symbols(lacking).unwrap();
        let rank = Rank::new(selftest()).args(scenario("symbol", 0, 1, "cuMulticastCreate"));
        let outcome = session.run_all([rank], LIMIT).unwrap().remove(0);
        assert_eq!(outcome.stdout, answer, "{outcome}");
    }
}

#[test]
fn hosts_in_network_namespaces_still_share_the_fabric() {
    let Some(netns) = Netns::try_new(2) else { return };
    let session = Session::new(&Topology::fabric(2, 2)).unwrap();
    let ranks = session.ranks(selftest()).into_iter().enumerate();
    let ranks = ranks.map(|(r, rank)| rank.args(scenario("share", r, 4, "fabric")).netns(&netns));
    for outcome in session.run_all(ranks, LIMIT).unwrap() {
        outcome.expect_success();
        session.stats(outcome.pid).unwrap().assert_nothing_live();
    }
}
