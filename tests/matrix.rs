//! What ncclAllReduce may be asked, cell by cell: type x operation x count x placement x mode. Every cell's result is that
//! of the CPU reference to the last bit, on every rank, or is shown to have gone to stock NCCL. The cells are those that
//! `scripts/gpu/matrix_check` runs on GPUs.
//!
//! A run takes a part of the cells that differs from world to world; `TWOSHOT_MATRIX=full` takes all of them.
mod common;
#[path = "worlds/world.rs"]
mod world;

use std::fmt::Write;
use std::process::Command;

use common::{Door, Job};
use twoshot_sim::{late_object, lib_dir, twoshot_library, worker};
use world::{Algo, Limits, digests, expect_nothing_left, hosts};

const OPERATIONS: [&str; 5] = ["sum", "prod", "max", "min", "avg"];

/// Runs `scripts/matrix.py` with small limits, so that every edge is near. The seed differs from world to world, and stays.
fn matrix(ranks: u64, seed: u32, options: &[&str]) {
    // Through the ring a payload should go through several channels, the last chunk of one of them not a whole one.
    let most = |limits: Limits| if options.contains(&"bulk") { 50_000 } else { limits.most };
    let full = std::env::var_os("TWOSHOT_MATRIX").is_some_and(|value| value == "full");
    let limits = Limits::of(ranks);
    let mut command = Command::new("python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/matrix.py")).args(options);
    command.arg("--library").arg(twoshot_library()).arg("--worker").arg(worker()).arg("--libs").arg(lib_dir());
    for (name, value) in [("--oneshot", limits.oneshot), ("--most", most(limits)), ("--seed", seed.into())] {
        command.arg(name).arg(value.to_string());
    }
    let output = command.args(["--limit", "1000", "--share", if full { "1" } else { "2" }]).output().expect("python3");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let cells = said.lines().find_map(|line| line.split_once(" cells ran")).expect("a line of cells").0;
    let words: Vec<&str> = cells.rsplit(' ').take(3).collect();
    let (all, ran): (u32, u32) = (words[0].parse().expect("a number"), words[2].parse().expect("a number"));
    assert!(ran == all && all > if full { 14_000 } else { 2_000 }, "{said}");
    eprintln!("{said}");
}

#[test]
fn on_two_ranks_every_cell_equals_the_reference() {
    matrix(2, 0, &["--sim", "2", "--how", "processes"]);
}

#[test]
fn on_three_ranks_over_multicast_every_cell_equals_the_reference() {
    matrix(3, 1, &["--sim", "3", "--how", "processes", "--multicast", "1"]);
}

#[test]
fn on_two_hosts_every_cell_equals_the_reference() {
    matrix(4, 2, &["--sim", "2x2", "--how", "processes"]);
}

#[test]
fn through_the_ring_every_cell_equals_the_reference() {
    matrix(2, 4, &["--sim", "2", "--how", "processes", "--algo", "bulk"]);
    matrix(3, 5, &["--sim", "3x1", "--how", "processes", "--algo", "bulk"]);
}

#[test]
fn one_thread_with_all_gpus_gets_every_cell_right() {
    matrix(2, 3, &["--sim", "2", "--how", "thread"]);
}

#[test]
fn every_pair_of_bytes_gives_the_reference_in_every_operation() {
    let mut program = String::new();
    for dtype in ["i8", "u8", "e4m3", "e5m2"] {
        for op in OPERATIONS {
            let _ = write!(program, "allreduce dtype={dtype} op={op} pairs count=65536 exact=2 path=routed; ");
        }
    }
    program.push_str("destroy");
    for gpus in [&[2][..], &[3]] {
        let mut first = None;
        for algo in [Algo::OneShot, Algo::TwoShot, Algo::Bulk] {
            let limits = Limits { ranks: 0, oneshot: 0, most: 131_072 };
            let report = algo.on(Job::new(hosts(gpus), &program), limits).run();
            report.expect_success();
            let found = digests(&report);
            assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{gpus:?} {algo:?}");
        }
    }
}

#[test]
fn a_pre_multiplied_sum_of_many_launches_and_streams_keeps_its_order() {
    let program = "allreduce count=1; allreduce count=40000 op=premulsum reps=3 mixed path=routed; \
                   random calls=60 seed=3 max=60000 streams=3 dtypes=f32,bf16,i8 ops=sum,premulsum; \
                   capture counts=30000,7,20000 op=premulsum scalar=device streams=2 path=routed; replay n=3; \
                   drop_graphs; allreduce count=9; destroy";
    let job = Job::new(hosts(&[3]), program).env("TWOSHOT_MAX_BYTES", "1M").env("TWOSHOT_MEMORY", "2M");
    let report = job.run();
    report.expect_success().expect_on();
    digests(&report);
    expect_nothing_left(&report);
}

#[test]
fn every_fp8_value_times_every_factor_gives_the_reference() {
    let mut program = "allreduce count=1; ".to_owned();
    for dtype in ["e4m3", "e5m2"] {
        let _ = write!(
            program,
            "allreduce dtype={dtype} op=premulsum pairs count=256 exact=2 factor=each reps=256 path=routed; "
        );
    }
    program.push_str("destroy");
    let report = Job::new(hosts(&[2]), &program).run();
    report.expect_success();
    digests(&report);
}

#[test]
fn an_operation_is_seen_by_both_names_of_the_function_and_through_every_door() {
    let program = "allreduce count=1; allreduce count=300 op=premulsum path=routed; \
                   allreduce count=300 op=premulsum maker=second path=routed; \
                   allreduce count=300 op=premulsum maker=second,name path=routed; destroy";
    for door in [Door::Plugin, Door::Preload, Door::Path] {
        let report = Job::new(hosts(&[2]), program).door(door).run();
        report.expect_success().expect_on();
        expect_nothing_left(&report);
    }
}

/// A rank that has not seen an operation cannot route it, so no rank may: what a rank may have missed is said in the vote.
#[test]
fn where_a_rank_may_have_missed_operations_all_leave_them_to_stock_and_route_the_rest() {
    let program = "init; allreduce count=300 op=premulsum maker=late,name path=stock; allreduce count=300 path=routed; \
                   allreduce count=300 op=premulsum path=stock; \
                   init; allreduce count=300 op=premulsum path=stock; allreduce count=9 path=routed; \
                   destroy; use comm=0; destroy";
    let job = Job::new(hosts(&[2]), program).env("SIM_LATE_OBJECT", late_object().display());
    let report = job.run();
    report.expect_success().expect_on();
    expect_nothing_left(&report);
}

#[test]
fn an_operation_made_behind_our_back_on_every_rank_is_stocks() {
    let program = "allreduce count=1; allreduce count=300 op=premulsum maker=stock path=stock; \
                   allreduce count=300 op=premulsum path=routed; destroy";
    let job = Job::new(hosts(&[2]), program);
    let report = job.run();
    report.expect_success().expect_on();
    expect_nothing_left(&report);
}
