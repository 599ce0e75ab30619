//! Set-up beside what else the program does: work that waits for a peer, captures, groups that only stock NCCL knows of,
//! and ranks that stand still for a while.

use std::time::Duration;

use twoshot_sim::{Rank, Session, Topology, twoshot_library, worker};

use crate::common::{Job, Report};
use crate::world::World;

/// Each rank has a receive under way whose send its peer issues behind the first collective of another communicator.
const BESIDE_A_RECEIVE: &str = "init; split color=0; use comm=0; split color=0; barrier; hold; \
    use comm=1 on=0; stream i=1 on=0; collective name=recv root=1 call=50 count=100 on=0; \
    use comm=2 on=1; stream i=1 on=1; collective name=recv root=0 call=51 count=300 on=1; \
    use comm=0; stream i=2; allreduce count=1000 call=60; \
    use comm=2 on=0; stream i=3 on=0; collective name=send root=1 call=51 count=300 on=0; \
    use comm=1 on=1; stream i=3 on=1; collective name=send root=0 call=50 count=100 on=1; \
    flush; use comm=0; allreduce count=70; destroy; destroy; destroy; release; sleep ms=50";

/// Runs the program where every call that the driver may hold until the device is idle is held so.
fn beside(ranks: u32, program: &str, rules: &str) -> Report {
    let job = Job::new(Topology::one_host(ranks), program)
        .env("TWOSHOT_MAX_BYTES", "64K")
        .env("TWOSHOT_SIM_CALLER", "libtwoshot.so")
        .env("TWOSHOT_SIM_CALLS_WAIT", 1)
        .timeout(Duration::from_secs(40));
    let report = if rules.is_empty() { job.run() } else { job.env("TWOSHOT_SIM_FAULTS", rules).run() };
    report.expect_success().expect_nothing_live();
    for outcome in &report.outcomes {
        assert!(outcome.elapsed < Duration::from_secs(15), "it waited: {outcome}");
    }
    report
}

fn beside_a_receive(rules: &str) -> Report {
    beside(2, BESIDE_A_RECEIVE, rules)
}

#[test]
fn a_set_up_does_not_wait_for_work_that_its_program_queued_before() {
    beside_a_receive("").expect_on();
}

#[test]
fn the_set_up_of_a_smaller_communicator_loads_no_code_while_kernels_wait_for_peers() {
    // Four ranks first; then two of them, for which there are kernels of their own, beside a receive that is under way.
    let program = "init; allreduce count=500; split color=0; split div=2; barrier; hold; \
        use comm=1 on=0; stream i=1 on=0; collective name=recv root=1 call=50 count=100 on=0; \
        use comm=2; stream i=2; allreduce count=1000 call=60; \
        use comm=1 on=1; stream i=3 on=1; collective name=send root=0 call=50 count=100 on=1; \
        flush; use comm=0; allreduce count=70; destroy; destroy; destroy; release; sleep ms=50";
    beside(4, program, "").expect_on();
}

#[test]
fn a_communicator_is_made_beside_a_receive_on_the_first_one_that_nobody_saw_being_made() {
    // Nothing but the receive has been called on it, so it was never set up.
    let program = "init; barrier; hold; stream i=1 on=0; collective name=recv root=1 call=50 count=100 on=0; \
        init; use comm=0 on=1; stream i=1 on=1; collective name=send root=0 call=50 count=100 on=1; \
        flush; use comm=1; stream i=0; allreduce count=700; destroy; destroy; release; sleep ms=50";
    beside(2, program, "").expect_on();
}

#[test]
fn a_set_up_whose_verdict_is_no_does_not_wait_for_it_either() {
    for (call, reason) in [
        ("cuMemCreate,nth=1", "allocate"),
        ("cuMemExportToShareableHandle,nth=1", "export"),
        ("cuMemImportFromShareableHandle,nth=1", "import"),
        ("cuMemMap,nth=2", "map"),
        ("cuMemsetD32Async,nth=2", "prepare"),
        ("cuMemAlloc_v2,nth=2", "known-answer"),
        ("cuLaunchKernelEx,nth=3", "known-answer"),
        ("cuEventCreate,nth=1", "known-answer"),
    ] {
        let report = beside_a_receive(&format!("rank=1,call={call},code=999"));
        report.expect_off(reason);
    }
}

#[test]
fn multicast_that_is_lost_on_the_way_does_not_make_it_wait() {
    for call in ["cuMulticastAddDevice", "cuMulticastBindMem"] {
        let report = beside_a_receive(&format!("rank=1,call={call},nth=1,code=999"));
        report.expect_on();
        assert!(report.lines(0).iter().any(|line| line.contains("unicast")), "{}", report.outcomes[0]);
    }
}

/// Two ranks of one process set up and end a communicator while a third thread captures in the strictest mode.
fn beside_a_capture(rules: &str) -> (Session, twoshot_sim::Outcome) {
    // The first communicator leaves the program its buffers, so that it calls nothing itself that a capture forbids.
    let program = "init ranks=2 on=0,1; allreduce count=1000 on=0,1; split color=0 on=0,1; barrier; \
        begin_capture on=2; barrier; allreduce count=1000 on=0,1; allreduce count=500 on=0,1; destroy on=0,1; \
        group_start on=0,1; group_end on=0,1; barrier; end_capture on=2; barrier; destroy on=0,1; release; sleep ms=50";
    let session = Session::new(&Topology::one_host(3)).expect("a session directory");
    let rank = Rank::new(worker())
        .gpus("0,1,2")
        .args(["--rank", "0", "--ranks", "3", "--threads", "3", "--program", program, "--id"])
        .arg(session.dir().join("unique-id"))
        .env("NCCL_NET_PLUGIN", twoshot_library())
        .env("NCCL_DEBUG", "INFO")
        .env("TWOSHOT_MAX_BYTES", "64K")
        .env("TWOSHOT_SIM_CALLER", "libtwoshot.so")
        .env("TWOSHOT_SIM_FAULTS", rules);
    let outcome = session.run_all([rank], Duration::from_secs(60)).expect("the process was started").remove(0);
    (session, outcome)
}

#[test]
fn a_first_collective_routed_or_declined_leaves_a_global_capture_of_another_thread_valid_and_nothing_behind() {
    for (rules, on, off) in [
        ("", 4, 0),
        // Each communicator fills header and stages on both ranks.
        ("call=cuMemsetD32Async,nth=5,code=999", 2, 2),
        ("call=cuMulticastBindMem,nth=3,code=999", 4, 0),
    ] {
        let (session, outcome) = beside_a_capture(rules);
        outcome.expect_success();
        session.stats(outcome.pid).expect("stats").assert_nothing_live();
        let count = |word: &str| outcome.stdout.lines().filter(|line| line.contains(word)).count();
        assert_eq!((count(": ON,"), count(": OFF,")), (on, off), "{rules}: {outcome}");
    }
}

#[test]
fn a_first_collective_of_a_group_leaves_a_global_capture_of_another_thread_valid() {
    let program = "init ranks=2 on=0,1; allreduce count=1000 on=0,1; split color=0 on=0,1; barrier; \
        begin_capture on=2; barrier; group_start on=0,1; allreduce count=900 on=0,1; group_end on=0,1; barrier; \
        end_capture on=2; barrier; destroy on=0,1; destroy on=0,1; release; sleep ms=50";
    let session = Session::new(&Topology::one_host(3)).expect("a session directory");
    let rank = Rank::new(worker())
        .gpus("0,1,2")
        .args(["--rank", "0", "--ranks", "3", "--threads", "3", "--program", program, "--id"])
        .arg(session.dir().join("unique-id"))
        .env("NCCL_NET_PLUGIN", twoshot_library())
        .env("TWOSHOT_MAX_BYTES", "64K");
    let outcome = session.run_all([rank], Duration::from_secs(60)).expect("the process was started").remove(0);
    outcome.expect_success();
    session.stats(outcome.pid).expect("stats").assert_nothing_live();
}

#[test]
fn a_rank_that_is_stopped_in_the_middle_of_set_up_for_longer_than_its_own_deadline_comes_to_the_verdict_of_all() {
    for (call, ms) in [
        ("cuMemCreate,nth=1", 1500),
        ("cuMemMap,nth=1", 1500),
        ("cuStreamQuery,nth=8", 1500),
        ("cuLaunchKernelEx,nth=5", 1500),
        // Longer than its peers would wait, had each counted by its own clock only.
        ("cuMemHostAlloc,nth=2", 4000),
    ] {
        let report = World::OneHost
            .job("random calls=4 seed=2 max=3000; destroy; release; sleep ms=300")
            .env("TWOSHOT_SETUP_TIMEOUT_MS", 400)
            .env("TWOSHOT_SIM_FAULTS", format!("rank=1,call={call},stop={ms}"))
            .run();
        let all: String = report.outcomes.iter().map(|outcome| format!("{outcome}\n")).collect();
        assert!(report.outcomes.iter().all(twoshot_sim::Outcome::succeeded), "{call}: {all}");
        report.expect_nothing_live();
        let verdict = |rank: usize| {
            let lines = report.lines(rank);
            // What failed is said by the rank on which it did.
            let word = |said: &str| said.split(" [").next().unwrap_or_default().to_owned();
            lines.iter().find_map(|line| line.split_once(": O").map(|(_, said)| word(said)))
        };
        let same = (0..3).all(|rank| verdict(rank).is_some() && verdict(rank) == verdict(0));
        assert!(same, "{call}: the ranks disagree: {all}");
    }
}

/// One rank gives up after 100 ms, another may take so long for each of several steps that its peer would have lost it.
#[test]
fn ranks_with_different_deadlines_wait_for_each_other_as_long_as_the_most_patient_one_may_take() {
    let rules = "rank=1,call=cuMemGetAllocationGranularity,nth=1,delay=4000;\
        rank=1,call=cuMulticastGetGranularity,nth=1,delay=4000;rank=1,call=nvmlDeviceGetP2PStatus,nth=1,delay=4000";
    let report = World::OneHost
        .job("random calls=4 seed=2 max=3000; destroy; release")
        .rank_env(0, "TWOSHOT_SETUP_TIMEOUT_MS", 100)
        .rank_env(1, "TWOSHOT_SETUP_TIMEOUT_MS", 6000)
        .env("TWOSHOT_SIM_FAULTS", rules)
        .run();
    report.expect_success().expect_on().expect_nothing_live();
}

/// The library does not see the group, so stock NCCL only queues what the ranks say to each other.
#[test]
fn an_exchange_that_stock_only_queued_frees_nothing() {
    let program = "init; hidden_group_start; allreduce count=700; hidden_group_end; allreduce count=50; destroy";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_off("foreign");
    for outcome in &report.outcomes {
        let stats = report.session.stats(outcome.pid).expect("stats of a rank");
        // The page stays, since nobody can say when stock NCCL is done with it, and the stream it is used on.
        assert_eq!((stats.live("host_allocations"), stats.live("streams")), (1, 1), "{outcome}");
        stats.assert_nothing_live_but(&["host_allocations", "streams", "contexts"]);
    }
}
