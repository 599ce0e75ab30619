//! Wrong calls and hostile surroundings: an `ncclResult_t` and a clear line, never a crash, and the communicator, the
//! process and its peers go on.
mod common;
#[path = "common/script.rs"]
mod script;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Door, Job, Report};
use script::{field, lines_of, ms, routed, stock_runs};
use twoshot::config::VARIABLES;
use twoshot_sim::Topology;

/// A communicator is used, misused and used again: what comes after the misuse must be right and routed.
fn around(misuse: &str) -> Report {
    let program = format!("init; allreduce count=100; {misuse}; allreduce count=3000 dtype=bf16; destroy; release");
    let report = Job::new(Topology::one_host(2), &program).run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        assert_eq!(routed(outcome), 2, "{outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    }
    report
}

#[test]
fn a_null_communicator_is_an_invalid_argument_and_nothing_else_happens() {
    around(
        "raw comm=null expect=4; raw name=allgather comm=null expect=4; group_start; raw comm=null expect=4; \
        expect_error code=4; group_end",
    );
}

#[test]
fn handles_that_are_no_communicators_are_refused_and_none_is_remembered() {
    // More of them than there is room for in the counters' memory: a handle that was kept would show.
    let strangers: String = (0..100).map(|i| format!("raw comm=stranger at={} expect=4; ", i * 64)).collect();
    let report =
        around(&format!("{strangers} group_start; raw comm=stranger at=8 expect=0; expect_error code=4; group_end"));
    for outcome in &report.outcomes {
        assert_eq!(lines_of(outcome, "raw").len(), 101, "{outcome}");
    }
}

#[test]
fn operations_of_another_type_or_that_are_gone_get_stocks_answer_and_a_handle_that_comes_back_has_its_new_factor() {
    let program = "init; operations; allreduce count=100; operations; operations; destroy; release";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_on().expect_nothing_live();
    for outcome in &report.outcomes {
        // Of each one's calls the last.
        assert_eq!(routed(outcome), 4, "{outcome}");
    }
}

#[test]
fn a_communicator_that_is_gone_is_refused() {
    let gone = "raw comm=gone expect=4; raw comm=gone name=allgather expect=4; group_start; raw comm=gone; \
        expect_error code=4; group_end";
    let program = format!(
        "init; split color=0; allreduce count=100; destroy; {gone}; allreduce count=70; split color=0; allreduce count=9; \
         barrier; abort; {gone}; allreduce count=50; destroy; release"
    );
    let report = Job::new(Topology::one_host(2), &program).run();
    report.expect_success().expect_nothing_live();
    assert_eq!(routed(&report.outcomes[0]), 4, "{}", report.outcomes[0]);
}

#[test]
fn element_types_and_operations_that_do_not_exist_are_stocks_to_refuse() {
    for value in ["-1", "12", "13", "1000", "0x7fffffff", "-2147483648"] {
        around(&format!(
            "raw dtype={value} expect=4; group_start; raw dtype={value} expect=4; expect_error; group_end"
        ));
    }
    for value in ["-1", "5", "6", "1000", "0x7fffffff", "-2147483648"] {
        around(&format!("raw op={value} expect=4"));
    }
}

#[test]
fn null_buffers_and_counts_of_zero_are_left_to_stock() {
    let report =
        around("raw count=0 expect=0; raw count=0 send=null receive=null expect=0; raw count=0 dtype=9 expect=0");
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (2, 3), "{}", report.outcomes[rank]);
    }
}

/// Stock NCCL is asked about counts that no memory holds, with the very number; it is not called for real here, because
/// it believes them.
#[test]
fn negative_and_overflowing_counts_never_reach_a_kernel_of_ours() {
    // -1; as bytes 8 beyond the end, 4 beyond it, and exactly 0.
    let counts = ["max", "0x4000000000000002", "0x8000000000000001", "0x4000000000000000", "0x2000000000000000"];
    for count in counts {
        let misuse = format!("raw count={count} within=3000 expect=-1");
        let program = format!("init; allreduce count=100; {misuse}; destroy; release");
        let report = Job::new(Topology::one_host(2), &program).env("SIM_NCCL_MAX_COUNT", "1000000000").run();
        report.expect_success().expect_on().expect_nothing_live();
        for rank in 0..2 {
            assert_eq!(report.counters(rank), (1, 1), "{count}: {}", report.outcomes[rank]);
        }
    }
}

#[test]
fn counts_that_differ_between_ranks_end_by_the_deadline_and_the_gpus_serve_the_next_communicator() {
    // Both within one algorithm, and across the border of the two.
    for (one, other) in [("100", "900"), ("2000", "60000"), ("50000", "60000")] {
        let program = format!(
            "init; allreduce count=100; raw count={one} bytes=4m within=9000 on=0; raw count={other} bytes=4m within=9000 on=1; \
             barrier; abort; init; allreduce count=5000; destroy; release"
        );
        let report = Job::new(Topology::one_host(2), &program)
            .env("TWOSHOT_TIMEOUT_MS", 400)
            .env("TWOSHOT_MAX_BYTES", "1M")
            .env("TWOSHOT_ONESHOT_MAX_BYTES", "16K")
            .run();
        for outcome in &report.outcomes {
            assert!(outcome.succeeded(), "{one} and {other}: {outcome}");
            assert!(ms(outcome, "abort") < 5000.0, "{outcome}");
        }
        // The rank that waits for more than comes is told; the other one may have all it needs.
        let raw = lines_of(&report.outcomes[1], "raw");
        let told = raw.iter().any(|line| line.contains("the communicator says 6"));
        assert!(told, "{one} and {other}: {}", report.outcomes[1]);
    }
}

#[test]
fn a_count_that_only_one_rank_has_routed_ends_by_deadline_there_and_by_abort_at_stocks() {
    let program = "init; allreduce count=100; raw count=100 within=9000 ends=error on=0; hold; \
        allreduce count=1000000 on=1; sleep ms=300; barrier; abort; drop; barrier; init; allreduce count=5000; destroy; release";
    let report =
        Job::new(Topology::one_host(2), program).env("TWOSHOT_TIMEOUT_MS", 400).env("TWOSHOT_MAX_BYTES", "1M").run();
    report.expect_success();
    for outcome in &report.outcomes {
        assert!(ms(outcome, "abort") < 5000.0 && routed(outcome) >= 2, "{outcome}");
    }
}

#[test]
fn a_peer_whose_first_words_are_not_twoshots_leaves_all_to_stock() {
    // The last rank has no twoshot; its first collective is as large as a blob, so its payload is taken for one.
    let program = "init; raw name=allgather dtype=0 count=500; allreduce count=1000; destroy";
    let foreign = "init; raw name=allgather dtype=0 count=320; raw name=allgather dtype=0 count=500; \
        allreduce count=1000; destroy";
    let job = Job::new(Topology::one_host(3), program).rank_door(2, Door::Shut).rank_program(2, foreign);
    let report = job.run();
    report.expect_success();
    for rank in 0..2 {
        let lines = report.lines(rank);
        let off: Vec<_> = lines.iter().filter(|line| line.contains(": OFF,")).collect();
        assert!(off.len() == 1 && off[0].contains("foreign (rank 2)"), "{}", report.outcomes[rank]);
    }
}

const NONSENSE: [&str; 5] = ["maybe\nyes\u{1b}[2J", "-1e999", "\u{fe0f}\u{fe0f}", "%s%s%n", "99999999999999999999999"];

/// Every variable that the library reads, but for those that name a file.
fn nonsense(value: &str) -> impl Iterator<Item = (&'static str, String)> {
    let files = ["TWOSHOT_NCCL_LIBRARY", "TWOSHOT_STATS", "NCCL_DEBUG_FILE", "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS"];
    // A mode is no matter of a vote, see below.
    let named = |name: &&str| *name != "TWOSHOT_MODE";
    let names = VARIABLES.iter().map(|variable| variable.name).filter(move |name| !files.contains(name)).filter(named);
    names.map(move |name| (name, value.to_owned()))
}

#[test]
fn an_environment_full_of_nonsense_turns_twoshot_off_in_one_line_that_names_a_variable() {
    for value in NONSENSE {
        for everywhere in [true, false] {
            let mut job = Job::new(Topology::one_host(2), "allreduce count=1000 reps=2; destroy; release");
            for (name, value) in nonsense(value) {
                job = if everywhere { job.env(name, value) } else { job.rank_env(1, name, value) };
            }
            let report = job.run();
            report.expect_success().expect_nothing_live();
            for rank in 0..2 {
                assert_eq!(report.counters(rank), (0, 2), "{}", report.outcomes[rank]);
                let lines = report.lines(rank);
                let off = lines.iter().filter(|line| line.contains(": OFF,") && line.contains("invalid-config"));
                assert_eq!(off.count(), 1, "{value:?}: {}", report.outcomes[rank]);
            }
            let said = &report.outcomes[1].stdout;
            let lines: Vec<_> =
                said.lines().filter(|line| line.contains("TWOSHOT_") && line.contains("expected")).collect();
            assert!(!lines.is_empty(), "{value:?}: {}", report.outcomes[1]);
            assert!(lines.iter().all(|line| line.contains(" TWOSHOT ") && !line.contains('\u{1b}')), "{lines:?}");
        }
    }
}

#[test]
fn a_mode_that_does_not_exist_binds_nothing_and_is_named_in_one_line() {
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let job = Job::new(Topology::one_host(2), "allreduce count=1000 reps=2; destroy; release").door(door);
        let report = job.env("TWOSHOT_MODE", "colnet").run();
        report.expect_success().expect_nothing_live();
        for (rank, outcome) in report.outcomes.iter().enumerate() {
            assert_eq!((routed(outcome), stock_runs(outcome)), (0, 2), "{door:?}: {outcome}");
            let lines = report.lines(rank);
            let named = lines.iter().filter(|line| line.contains("TWOSHOT_MODE=colnet: expected one of")).count();
            assert_eq!(named, 1, "{door:?}: {outcome}");
            // It takes no part in anything: there is nothing that a peer in another mode would wait for.
            let bound = lines.iter().filter(|line| line.contains(": OFF,") || line.contains("direct door:")).count();
            assert_eq!(bound, 0, "{door:?}: {outcome}");
        }
    }
}

#[test]
fn files_that_are_something_else_change_nothing() {
    let folder = std::env::temp_dir().join(format!("twoshot-bad-input-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    // A pipe that nobody reads would hold a writer for ever.
    let pipe = folder.join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    for path in [folder.as_path(), &pipe, "/proc/self/mem".as_ref(), "/dev/full".as_ref()] {
        let job = Job::new(Topology::one_host(2), "allreduce count=1000 reps=2; destroy; release");
        let report = job.env("TWOSHOT_STATS", path.display()).timeout(Duration::from_secs(60)).run();
        report.expect_success().expect_on().expect_nothing_live();
        for rank in 0..2 {
            let said = report.lines(rank).iter().filter(|line| line.contains("TWOSHOT_STATS=")).count();
            assert!(said >= 1, "{}: {}", path.display(), report.outcomes[rank]);
        }
    }
    assert!(!std::fs::symlink_metadata(&pipe).expect("still there").is_file());
    std::fs::remove_dir_all(folder).expect("it was there");
}

#[test]
fn a_stock_library_that_is_none_is_one_line_and_an_error_code() {
    for bad in ["/nowhere/libnccl.so.2", "/etc/passwd", "/dev/null"] {
        let job = Job::new(Topology::one_host(1), "expect_error code=5; init; leave").door(Door::Path);
        let report = job.env("TWOSHOT_NCCL_LIBRARY", bad).run();
        report.expect_success();
        let outcome = &report.outcomes[0];
        let said: Vec<_> = outcome.stderr.lines().filter(|line| line.starts_with("twoshot: ")).collect();
        assert!(said.len() == 1 && said[0].contains(bad), "{outcome}");
        // The program asks what the code means, and is told.
        assert!(outcome.stdout.contains("there is no stock NCCL to ask"), "{outcome}");
    }
}

/// Root may become somebody else; others can only be refused the attempt.
#[test]
fn another_user_on_the_descriptor_socket_is_given_nothing_though_it_knows_the_token() {
    use std::os::fd::AsFd;
    use twoshot::handoff::Desk;
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: nobody else can be played here");
        return;
    }
    let desk = Desk::open(4).expect("a desk");
    let hex: String = desk.name.iter().map(|byte| format!("{byte:02x}")).collect();
    let token: String = desk.token.iter().map(|byte| format!("{byte:02x}")).collect();
    let script = format!(
        "import socket,sys\n\
         for i in range(40):\n\
         \x20 s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(10)\n\
         \x20 try:\n\
         \x20  s.connect(b'\\0twoshot-{hex}'); s.send(bytes.fromhex('{token}') + bytes([1,0,0,0,0]))\n\
         \x20  data, anc, _, _ = s.recvmsg(1, 64)\n\
         \x20 except OSError: data, anc = b'', []\n\
         \x20 if data or anc: sys.exit(7)\n"
    );
    let play = |user: u32| {
        let mut command = Command::new("python3");
        command.args(["-c", &script]).uid(user).gid(user).stdin(Stdio::null()).spawn().expect("python3")
    };
    let secret = rustix::fs::memfd_create("secret", rustix::fs::MemfdFlags::CLOEXEC).expect("an anonymous file");
    let give = || Some((secret.as_fd(), 1));
    let (served, refused) = (7, 0);
    // Our own user is served, so it is the user that makes the difference.
    let mut own = play(0);
    desk.trade(0, 0, give(), &[], Duration::from_secs(20)).expect("a peer came");
    assert_eq!(own.wait().expect("ends").code(), Some(served));
    let mut stranger = play(65534);
    // The rank that is waited for never comes: everybody who does is a stranger.
    let trade = desk.trade(0, 0, give(), &[], Duration::from_secs(3));
    assert!(trade.is_err(), "a stranger was served");
    drop(desk);
    assert_eq!(stranger.wait().expect("ends").code(), Some(refused));
}

#[test]
fn a_suspended_communicator_refuses_calls_as_stock_does_and_goes_on_when_resumed() {
    let program = "init; allreduce count=100; suspend; expect_error code=5; allreduce count=100; resume; \
        allreduce count=200 reps=2; destroy; release";
    let report = Job::new(Topology::one_host(2), program).run();
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (3, 1), "{}", report.outcomes[rank]);
        assert!(field(lines_of(&report.outcomes[rank], "suspend")[0], "ms") < 5000.0);
    }
}
