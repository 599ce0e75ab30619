//! What ncclAllReduce may be asked, cell by cell: type x operation x count x placement x mode. Every cell's result is that
//! of the CPU reference to the last bit, on every rank, or is shown to have gone to stock NCCL.
//!
//! A run takes a part of the cells that differs from world to world; `TWOSHOT_MATRIX=full` takes all of them.
mod common;
#[path = "common/script.rs"]
mod script;
#[path = "worlds/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

use common::{Door, Job};
use script::{field, one_process, summary};
use twoshot_sim::late_object;
use world::{Algo, Limits, digests, expect_nothing_left, expect_wire, hosts};

/// Every element type: the worker's name, bytes of an element, and bytes of lines that carry one byte.
const TYPES: [(&str, u64, u64); 12] = [
    ("i8", 1, 2),
    ("u8", 1, 2),
    ("i32", 4, 2),
    ("u32", 4, 2),
    ("i64", 8, 2),
    ("u64", 8, 2),
    ("f16", 2, 1),
    ("f32", 4, 1),
    ("f64", 8, 2),
    ("bf16", 2, 1),
    ("e4m3", 1, 2),
    ("e5m2", 1, 2),
];
const OPERATIONS: [&str; 5] = ["sum", "prod", "max", "min", "avg"];
/// Where the buffers lie; the last is another on every rank.
const PLACEMENTS: [&str; 4] = ["inplace=0", "inplace=1", "offset=1 out_offset=3", "mixed"];
const MODES: [Mode; 3] = [Mode::Eager, Mode::Grouped, Mode::Captured];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mode {
    Eager,
    Grouped,
    Captured,
}

fn full() -> bool {
    std::env::var_os("TWOSHOT_MATRIX").is_some_and(|value| value == "full")
}

/// The same numbers in every run: which cells are taken must not change.
fn lot(parts: [usize; 5]) -> usize {
    let mixed = parts
        .iter()
        .fold(0x9e37_79b9_u64, |hash, part| (hash ^ *part as u64).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29));
    (mixed >> 17) as usize
}

/// Which cells a run takes: of each statement `counts`, of the statements one in `stride`, beginning at `world`.
#[derive(Clone, Copy)]
struct Share {
    world: usize,
    stride: usize,
    counts: usize,
}

impl Share {
    /// All cells where they are asked for; else about two thousand.
    fn of(world: usize) -> Self {
        if full() {
            return Self { world, stride: 1, counts: usize::MAX };
        }
        Self { world, stride: 2, counts: 6 }
    }
}

/// A worker's program, what was asked in it, and the number of its cells.
struct Matrix {
    program: String,
    cells: usize,
    asked: BTreeSet<(&'static str, &'static str, usize)>,
}

fn matrix(limits: Limits, share: Share) -> Matrix {
    let mut matrix = Matrix { program: String::new(), cells: 0, asked: BTreeSet::new() };
    let mut statement = 0;
    for (t, (dtype, size, carried)) in TYPES.into_iter().enumerate() {
        for (o, op) in OPERATIONS.into_iter().enumerate() {
            for (m, mode) in MODES.into_iter().enumerate() {
                for (p, placement) in PLACEMENTS.into_iter().enumerate() {
                    statement += 1;
                    // Neighbouring statements differ in their placement, so that every world meets every mode of every
                    // type and operation.
                    if !(statement + t + o + m + share.world).is_multiple_of(share.stride) {
                        continue;
                    }
                    // Eight bytes of payload in a line of sixteen, or all of it.
                    let most = if carried == 2 { limits.most / 16 * 8 / size } else { limits.most / size };
                    let mut counts = limits.counts(size * carried);
                    counts.retain(|count| *count != most && *count != most + 1);
                    counts.extend([most, most + 1]);
                    let first = lot([t, o, m, p, share.world]) % counts.len();
                    counts.rotate_left(first);
                    counts.truncate(share.counts);
                    let (ours, stock): (Vec<_>, Vec<_>) = counts.into_iter().partition(|count| *count <= most);
                    let what = format!("dtype={dtype} op={op} {placement} seed={statement} exact=2");
                    for (path, mut counts) in [("routed", ours), ("stock", stock)] {
                        // Nothing to do, and stock NCCL's rules about arguments.
                        if path == "stock" && mode == Mode::Eager {
                            counts.push(0);
                        }
                        if counts.is_empty() {
                            continue;
                        }
                        matrix.cells += counts.len();
                        let counts = counts.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
                        // Another order of additions is stock NCCL's right.
                        let what = if path == "stock" { what.replace("exact=2", "exact=0") } else { what.clone() };
                        mode.write(&mut matrix.program, &format!("counts={counts} {what}"), path);
                    }
                    matrix.asked.insert((dtype, op, m));
                }
            }
        }
    }
    matrix.program.push_str("destroy");
    matrix
}

impl Mode {
    fn write(self, program: &mut String, calls: &str, path: &str) {
        let _ = match self {
            Self::Eager => write!(program, "allreduce {calls} path={path}; "),
            // Stock NCCL gets a call when it is made, a kernel is launched at the end.
            Self::Grouped if path == "stock" => {
                write!(program, "group_start; allreduce {calls} path=stock; group_end; ")
            }
            Self::Grouped => write!(program, "group_start; allreduce {calls}; group_end path=routed; "),
            Self::Captured => write!(program, "capture {calls} path={path}; replay n=2; drop_graphs; "),
        };
    }
}

/// A program too long for an argument, in a file that goes with this.
struct Script(std::path::PathBuf);

impl Script {
    fn new(program: &str, world: usize) -> Self {
        let name = format!("matrix-{}-{world}", std::process::id());
        let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&path, program).expect("a file in the target's folder");
        Self(path)
    }

    fn name(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn run(gpus: &[u32], world: usize, multicast: bool) {
    let limits = Limits::of(gpus.iter().map(|gpus| u64::from(*gpus)).sum());
    let share = Share::of(world);
    let Matrix { program, cells, asked } = matrix(limits, share);
    assert_eq!(asked.len(), TYPES.len() * OPERATIONS.len() * MODES.len(), "a type, operation or mode was not asked");
    assert!(cells > if full() { 8000 } else { 2000 }, "{cells} cells");
    // Its first call sets the communicator up; a capture could not.
    let script = Script::new(&format!("allreduce count=1; {program}"), world);
    let job = Job::new(hosts(gpus), script.name()).env("TWOSHOT_MULTICAST", u8::from(multicast));
    let report = Algo::Auto.on(job, limits).args(&["--timeout", "1000"]).timeout(Duration::from_secs(1000)).run();
    report.expect_success();
    expect_wire(&report, if multicast { "multicast" } else { "unicast" });
    digests(&report);
    expect_nothing_left(&report);
    eprintln!("{gpus:?} multicast={multicast}: {cells} cells, every one as the reference or by stock NCCL");
}

#[test]
fn on_two_ranks_every_cell_equals_the_reference() {
    run(&[2], 0, false);
}

#[test]
fn on_three_ranks_over_multicast_every_cell_equals_the_reference() {
    run(&[3], 1, true);
}

#[test]
fn on_two_hosts_every_cell_equals_the_reference() {
    run(&[2, 2], 2, false);
}

#[test]
fn one_thread_with_all_gpus_gets_every_cell_right() {
    let limits = Limits::of(2);
    let Matrix { program, cells, .. } = matrix(limits, Share::of(3));
    let script = Script::new(&format!("allreduce count=1; {program}"), 3);
    let (oneshot, most) = (limits.oneshot.to_string(), limits.most.to_string());
    let env = [("TWOSHOT_ONESHOT_MAX_BYTES", oneshot.as_str()), ("TWOSHOT_MAX_BYTES", most.as_str())];
    let (_session, outcome) = one_process(2, "--gpus", script.name(), &env);
    outcome.expect_success();
    assert!(field(summary(&outcome), "calls") as usize >= cells, "{outcome}");
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
        for algo in [Algo::OneShot, Algo::TwoShot] {
            let limits = Limits { ranks: 0, oneshot: 0, most: 131_072 };
            let report = algo.on(Job::new(hosts(gpus), &program), limits).run();
            report.expect_success();
            let found = digests(&report);
            assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{gpus:?} {algo:?}");
        }
    }
}

/// The cells of pre-multiplied sums: type x where the factor is x placement x mode x count, each with a factor of its own
/// on every rank and a handle of its own. In a replay a factor on the device is another one, one on the host is not.
fn multiplied(limits: Limits, world: usize) -> (String, usize) {
    let stride = if full() { 1 } else { 4 };
    let (mut program, mut cells) = (String::new(), 0);
    for (t, (dtype, size, carried)) in TYPES.into_iter().enumerate() {
        for (s, scalar) in ["host", "device"].into_iter().enumerate() {
            for (m, mode) in MODES.into_iter().enumerate() {
                for (p, placement) in PLACEMENTS.into_iter().enumerate() {
                    if !(t + s + m + p + world).is_multiple_of(stride) {
                        continue;
                    }
                    let most = if carried == 2 { limits.most / 16 * 8 / size } else { limits.most / size };
                    let counts = [1, 16 / size - 1, 16 / size, 64 / size + 1, most / 2 + 1, most];
                    let first = lot([t, s, m, p, 7]) % counts.len();
                    let taken: Vec<_> = (0..2).map(|i| counts[(first + i) % counts.len()].max(1).to_string()).collect();
                    let what =
                        format!("dtype={dtype} op=premulsum scalar={scalar} {placement} seed={t}{s}{m}{p} exact=2");
                    mode.write(&mut program, &format!("counts={} {what}", taken.join(",")), "routed");
                    cells += taken.len();
                }
            }
            // Beyond the limit, and beside routed calls on either side, whose order must not change.
            let beyond = limits.most / size + 1;
            let _ = write!(program, "allreduce count={beyond} dtype={dtype} op=premulsum scalar={scalar} path=stock; ");
            let _ = write!(program, "allreduce count=50 dtype={dtype} path=routed; ");
        }
    }
    program.push_str("destroy");
    (program, cells)
}

#[test]
fn a_pre_multiplied_sum_is_the_sum_of_the_products_as_nccl_rounds_them() {
    for (world, (gpus, multicast)) in [(&[2][..], false), (&[3], true), (&[2, 2], false)].into_iter().enumerate() {
        let limits = Limits::of(gpus.iter().map(|gpus| u64::from(*gpus)).sum());
        let (program, cells) = multiplied(limits, world);
        let script = Script::new(&format!("allreduce count=1; {program}"), 10 + world);
        let job = Job::new(hosts(gpus), script.name()).env("TWOSHOT_MULTICAST", u8::from(multicast));
        let report = Algo::Auto.on(job, limits).run();
        report.expect_success();
        digests(&report);
        expect_nothing_left(&report);
        assert_eq!(cells, 12 * 2 * 3 * 2 * if full() { 4 } else { 1 });
    }
}

#[test]
fn one_thread_with_all_gpus_gets_pre_multiplied_sums_right() {
    let limits = Limits::of(2);
    let (program, cells) = multiplied(limits, 3);
    let script = Script::new(&format!("allreduce count=1; {program}"), 20);
    let (oneshot, most) = (limits.oneshot.to_string(), limits.most.to_string());
    let env = [("TWOSHOT_ONESHOT_MAX_BYTES", oneshot.as_str()), ("TWOSHOT_MAX_BYTES", most.as_str())];
    let (_session, outcome) = one_process(2, "--gpus", script.name(), &env);
    outcome.expect_success();
    assert!(field(summary(&outcome), "calls") as usize >= cells, "{outcome}");
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
