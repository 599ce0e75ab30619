//! What happens to a running AllReduce when a rank dies, stalls or aborts, or when launches overlap.
mod common;
#[path = "common/script.rs"]
mod script;

use common::{Job, Report};
use script::{field, lines_of, ms, routed};
use twoshot_sim::{End, Topology};

#[track_caller]
fn expect_released(report: &Report, ranks: &[usize]) {
    for rank in ranks {
        let outcome = &report.outcomes[*rank];
        assert!(outcome.succeeded(), "{outcome}");
        report.session.stats(outcome.pid).expect("stats").assert_nothing_live();
    }
}

/// Twoshot's line about a fault.
#[track_caller]
fn fault_line(report: &Report, rank: usize) -> String {
    let found: Vec<_> = report.lines(rank).into_iter().filter(|line| line.contains("a kernel reported")).collect();
    assert_eq!(found.len(), 1, "not one line about the fault: {}", report.outcomes[rank]);
    found[0].to_owned()
}

#[test]
fn a_missed_deadline_becomes_an_asynchronous_error_that_names_what_is_missing() {
    for (algorithm, kernel) in [("oneshot", "one-shot"), ("twoshot", "two-shot"), ("bulk", "bulk")] {
        let program = "init; allreduce count=100 reps=5; expect_error code=6; allreduce count=900 on=0,2; \
            async_error expect=6 on=0,2; expect_error code=6; allreduce count=100 on=0,2; barrier; abort; \
            init; allreduce count=50 reps=2; destroy";
        let job = Job::new(Topology::one_host(3), program).env("TWOSHOT_ALGO", algorithm);
        // There is no ring beside multicast.
        let job = job.env("TWOSHOT_MULTICAST", u8::from(algorithm != "bulk"));
        let report = job.env("TWOSHOT_TIMEOUT_MS", 400).run();
        expect_released(&report, &[0, 1, 2]);
        for rank in [0, 2] {
            let line = fault_line(&report, rank);
            // 5 calls came before it; the known answers of set-up are counted too, hence no exact epoch.
            assert!(line.contains("a missed deadline: epoch "), "{line}");
            assert!(
                line.contains(&format!(", {kernel}, 900 elements; first missing: rank 1, scatter stage, line ")),
                "{line}"
            );
            let outcome = &report.outcomes[rank];
            // Later calls fail at once, an abort is quick, and the same GPUs work again.
            let calls = lines_of(outcome, "allreduce");
            assert!(field(calls[2], "ms") < 300.0 && ms(outcome, "abort") < 5000.0, "{outcome}");
        }
    }
}

#[test]
fn what_a_deadline_cut_off_is_named_at_the_latest_when_the_communicator_ends() {
    // Nobody asks for the error: the stream is waited for, and then the communicator ends.
    for end in ["abort", "destroy"] {
        let program = format!(
            "init; allreduce count=100; hold; allreduce count=700 dtype=bf16 on=0,2; sleep ms=1200; drop; barrier; {end}; release"
        );
        let report = Job::new(Topology::one_host(3), &program).env("TWOSHOT_TIMEOUT_MS", 300).run();
        expect_released(&report, &[0, 1, 2]);
        for rank in [0, 2] {
            let line = fault_line(&report, rank);
            let whose = line.contains(&format!("rank {rank}/3, communicator 0x"));
            assert!(
                whose && line.contains("a missed deadline: epoch ") && line.contains("first missing: rank 1, "),
                "{line}"
            );
            assert!(line.contains("one-shot, 700 elements") && line.contains(" stage, line "), "{line}");
        }
        assert!(!report.lines(1).iter().any(|line| line.contains("a kernel reported")), "{}", report.outcomes[1]);
    }
}

#[test]
fn an_abort_from_another_thread_ends_a_replay_that_spins_and_the_graph_can_go_later() {
    let program = "init; allreduce count=10; capture counts=100,900; replay n=2; barrier; launch graph=0 stream=0 on=0; \
        abort_in ms=200 on=0; sleep ms=300; forget on=0; sync on=0; barrier; abort on=1; drop_graphs; sleep ms=60; \
        init; allreduce count=50; destroy; release";
    for algorithm in ["auto", "bulk"] {
        let job = Job::new(Topology::one_host(2), program).env("TWOSHOT_TIMEOUT_MS", 0).env("TWOSHOT_ALGO", algorithm);
        let report = job.env("TWOSHOT_MULTICAST", 0).run();
        expect_released(&report, &[0, 1]);
        let outcome = &report.outcomes[0];
        let took = field(lines_of(outcome, "aborted")[0], "ms");
        assert!(took < 5000.0, "abort took {took} ms: {outcome}");
    }
}

#[test]
fn a_routed_call_that_could_not_be_launched_makes_every_later_call_an_error() {
    let before = Job::new(Topology::one_host(2), "init; allreduce count=10; destroy").run();
    let stats = before.session.stats(before.outcomes[0].pid).expect("stats of a rank");
    // Once, at the next call: the launch itself, and the event behind it.
    for call in ["cuLaunchKernelEx", "cuEventRecord"] {
        let rule = format!("rank=0,call={call},nth={},code=999", stats.calls(call) + 1);
        let program = "init; allreduce count=10; expect_error; allreduce count=20; expect_error; allreduce count=30; \
            barrier; abort; init; allreduce count=40 path=routed; destroy; release";
        let other = program.replace("expect_error; allreduce count=20;", "allreduce count=20;");
        let job =
            Job::new(Topology::one_host(2), program).env("TWOSHOT_SIM_FAULTS", rule).env("TWOSHOT_TIMEOUT_MS", 400);
        // The event's kernel ran; the peer learns of it at the call that this rank does not make any more.
        let report = if call == "cuEventRecord" { job.rank_program(1, &other) } else { job }.run();
        expect_released(&report, &[0, 1]);
        let line = fault_line(&report, 0);
        assert!(line.contains("a launch of 20 elements that failed"), "{line}");
    }
}

#[test]
fn an_abort_at_any_moment_of_a_set_up_or_behind_it_returns_and_leaves_no_window() {
    for ms in [0, 1, 2, 3, 4, 6, 8, 10, 13, 17, 22, 30] {
        let program = format!(
            "init; barrier; abort_in ms={ms} on=0; expect_error; allreduce count=900 reps=40; forget on=0; \
             abort on=1,2; init; allreduce count=10 path=routed; destroy; release"
        );
        let report = Job::new(Topology::one_host(3), &program).env("TWOSHOT_TIMEOUT_MS", 1500).run();
        for outcome in &report.outcomes {
            assert!(outcome.succeeded(), "{outcome}");
            // What stock NCCL's kernel may still work on stays, where it was cut off in the ranks' exchange.
            let stats = report.session.stats(outcome.pid).expect("stats of a rank");
            stats.assert_nothing_live_but(&["host_allocations", "streams"]);
            assert!(stats.live("host_allocations").max(stats.live("streams")) <= 1, "{outcome}");
        }
        let took = field(lines_of(&report.outcomes[0], "aborted")[0], "ms");
        assert!(took < 5000.0, "abort took {took} ms: {}", report.outcomes[0]);
    }
}

#[test]
fn a_revoke_from_another_thread_frees_the_spinning_kernel_and_abort_ends_the_communicator() {
    let program = "init; allreduce count=1000 reps=2; abort_in how=revoke ms=200 on=0; expect_error; allreduce count=700 on=0; \
        join on=0; barrier; abort; init; allreduce count=10; destroy; release";
    let report = Job::new(Topology::one_host(2), program).env("TWOSHOT_TIMEOUT_MS", 0).run();
    expect_released(&report, &[0, 1]);
    let outcome = &report.outcomes[0];
    let took = field(lines_of(outcome, "aborted")[0], "ms");
    assert!(took < 5000.0 && ms(outcome, "abort") < 5000.0, "{outcome}");
}

#[test]
fn what_a_kernel_holds_that_outlives_its_communicators_end_is_freed_when_it_has_ended() {
    // Longer than an abort waits; to the library it looks as if its kernel did not see the abort.
    let program =
        "init; allreduce count=100 reps=2; barrier; abort; sleep ms=2500; init; allreduce count=9; destroy; release";
    let report = Job::new(Topology::one_host(2), program)
        .env("TWOSHOT_SIM_CALLER", "libtwoshot.so")
        .env("TWOSHOT_SIM_FAULTS", "rank=0,call=cuEventQuery,nth=0,code=600,for=4500")
        .run();
    expect_released(&report, &[0, 1]);
    assert!(
        report.lines(0).iter().any(|line| line.contains("its memory stays until it ends")),
        "{}",
        report.outcomes[0]
    );
}

#[test]
fn what_the_last_abort_of_a_process_lets_go_is_freed_at_once() {
    // Both communicators wait for a rank that never comes; nothing is created afterwards.
    let program = "init; split color=0; allreduce count=100; use comm=0; allreduce count=100; barrier; hold; \
        allreduce count=900 on=0; use comm=1; stream i=1; allreduce count=300 on=0; sleep ms=50; abort; use comm=0; abort; \
        drop; release";
    let report = Job::new(Topology::one_host(2), program).env("TWOSHOT_TIMEOUT_MS", 0).run();
    expect_released(&report, &[0, 1]);
}

#[test]
fn when_a_rank_is_killed_the_others_abort_and_shrink_and_go_on() {
    let program = "init; allreduce count=1000 reps=4; barrier; kill_self on=1; expect_error; allreduce count=1000 on=0,2,3; \
        shrink exclude=1 abort=1 on=0,2,3; allreduce count=1000 reps=5 on=0,2,3; destroy on=0,2,3; abort on=0,2,3";
    let report = Job::new(Topology::one_host(4), program).env("TWOSHOT_TIMEOUT_MS", 500).run();
    assert_eq!(report.outcomes[1].end, End::Signal(9));
    for rank in [0, 2, 3] {
        let outcome = &report.outcomes[rank];
        assert!(outcome.succeeded() && ms(outcome, "abort") < 5000.0, "{outcome}");
        // The child of the survivors is routed.
        assert!(routed(outcome) >= 9, "{outcome}");
    }
}

#[test]
fn without_a_deadline_an_abort_from_another_thread_frees_the_spinning_kernel() {
    let program = "init; allreduce count=1000 reps=3; abort_in ms=300 on=0; expect_error; allreduce count=1000 on=0; \
        forget on=0; barrier; abort on=1; init; allreduce count=10; destroy";
    let report = Job::new(Topology::one_host(2), program).env("TWOSHOT_TIMEOUT_MS", 0).run();
    expect_released(&report, &[0, 1]);
    let outcome = &report.outcomes[0];
    let took = field(lines_of(outcome, "aborted")[0], "ms");
    assert!(took < 5000.0, "abort took {took} ms: {outcome}");
}

#[test]
fn a_killed_rank_leaves_no_survivor_spinning_even_without_a_deadline() {
    let program = "init; allreduce count=1000 reps=3; barrier; kill_self on=1; expect_error; allreduce count=1000 on=0,2; \
        abort on=0,2";
    for algorithm in ["auto", "bulk"] {
        let job = Job::new(Topology::one_host(3), program).env("TWOSHOT_TIMEOUT_MS", 0).env("TWOSHOT_ALGO", algorithm);
        let report = job.env("TWOSHOT_MULTICAST", 0).run();
        for rank in [0, 2] {
            let outcome = &report.outcomes[rank];
            assert!(outcome.succeeded() && ms(outcome, "abort") < 5000.0, "{outcome}");
        }
    }
}

#[test]
fn two_launches_of_one_communicator_at_once_are_reported_as_the_callers_error() {
    let program = "allreduce count=10; stream i=1; stream i=0; capture counts=100; capture counts=100; replay graph=0; \
        replay graph=1; barrier; launch graph=0 stream=0 on=0; launch graph=1 stream=1 on=0; \
        async_error expect=5 within=8000 on=0; barrier; abort; sync; drop_graphs";
    let report = Job::new(Topology::one_host(2), program).env("TWOSHOT_TIMEOUT_MS", 0).run();
    let outcome = &report.outcomes[0];
    assert!(lines_of(outcome, "async_error")[0].contains("\"ok\":true"), "{outcome}");
    assert!(fault_line(&report, 0).contains("two overlapping launches of one communicator"), "{outcome}");
}

#[test]
fn killed_at_any_moment_a_rank_never_takes_the_others_with_it() {
    let soak = std::env::var_os("TWOSHOT_SOAK").is_some();
    let rounds = if soak { 200 } else { 10 };
    // A call and how often a rank makes it at least.
    let moments = [
        ("cuLaunchKernelEx", 12),
        ("cuStreamQuery", 40),
        ("cuEventRecord", 6),
        ("cuMemcpyHtoDAsync", 6),
        ("cuMemMap", 4),
        ("cuMemSetAccess", 4),
        ("cuMemImportFromShareableHandle", 2),
        ("cuMulticastBindMem", 1),
        ("cuMemExportToShareableHandle", 1),
        ("cuMemsetD32Async", 2),
    ];
    let mut deaths = 0;
    for round in 0..rounds {
        let victim = round % 3;
        let (call, uses) = moments[round % moments.len()];
        let nth = 1 + (round * 7 + round / moments.len()) % uses;
        // Where the rank dies inside set-up, the others meet it as an error of the call or of the communicator.
        let program = "init; repeat n=6; allreduce count=3000; end; abort";
        let report = Job::new(Topology::one_host(3), program)
            .env("TWOSHOT_TIMEOUT_MS", 1500)
            .env("TWOSHOT_SETUP_TIMEOUT_MS", 2000)
            .env("TWOSHOT_SIM_FAULTS", format!("rank={victim},call={call},nth={nth},kill"))
            .run();
        for (rank, outcome) in report.outcomes.iter().enumerate() {
            let died = rank == victim && outcome.end == End::Signal(9);
            let ended = matches!(outcome.end, End::Exit(0 | 1));
            deaths += usize::from(died);
            assert!(died || ended, "round {round}, {call} {nth}: {outcome}");
            assert!(!outcome.stdout.contains("\"error\":\"timeout\""), "round {round}: {outcome}");
            if ended && !lines_of(outcome, "abort").is_empty() {
                assert!(ms(outcome, "abort") < 5000.0, "round {round}: {outcome}");
            }
        }
    }
    assert!(deaths * 2 >= rounds, "only {deaths} of {rounds} ranks died");
}
