//! What a call costs the host, `cargo bench --bench host_path`: the decision, the look-up, the counters, and whole calls
//! of the shipped library over the simulated driver and NCCL.
//!
//! Of the whole calls the difference between `stock` and `through twoshot` is ours. A routed call includes what the
//! simulated driver does to queue a launch, which is not what a real one does; on GPUs the column `host us` of
//! `twoshot bench` says what it costs there.

use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use twoshot::call::{Call, DataType, ReduceOp};
use twoshot::comm::{self, Hints};
use twoshot::counters::Counters;
use twoshot::driver::{Context, Device, Scratch, Stream};
use twoshot::intercept::{Code, Comm, UniqueId};
use twoshot::layout::{Algorithm, Layout};
use twoshot::route::{Agreement, Reason, decide};
use twoshot_sim::{Session, Topology};

fn decisions(criterion: &mut Criterion) {
    let agreed = Agreement {
        ranks: 8,
        layout: Layout::for_payloads(8, 64 << 10, 4 << 20).expect("a layout"),
        min_bytes: 0,
        oneshot_bytes: 64 << 10,
        twoshot_bytes: 4 << 20,
        switch_bytes: twoshot::route::NEVER,
        switch_max_bytes: 0,
        piece_bytes: 4 << 20,
        bulk_bytes: 0,
        scaled_bytes: 2 << 20,
        blocks: 32,
        small_blocks: 64,
    };
    let mut group = criterion.benchmark_group("route::decide");
    for (name, count, dtype) in [
        ("one-shot", 2048, DataType::BF16),
        ("two-shot", 1 << 20, DataType::BF16),
        ("stock, too large", 1 << 24, DataType::BF16),
    ] {
        let call = Call { count, dtype, op: ReduceOp::SUM };
        group.bench_function(name, |b| b.iter(|| decide(black_box(&call), black_box(&agreed))));
    }
    group.finish();
}

fn look_ups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("comm::find");
    let mut made = 0;
    for known in [1, 16, 256] {
        while made < known {
            made += 1;
            comm::created(made * 64, Hints::default());
        }
        group.bench_function(BenchmarkId::from_parameter(known), |b| {
            let mut at = 0;
            b.iter(|| {
                at = at % known + 1;
                comm::find(black_box(at * 64))
            });
        });
    }
    group.finish();
    (1..=made).for_each(|at| drop(comm::remove(at * 64)));
}

fn counting(criterion: &mut Criterion) {
    let counters = Counters::new();
    let mut group = criterion.benchmark_group("counters");
    group.bench_function("routed", |b| b.iter(|| counters.routed(Algorithm::OneShot, black_box(4096))));
    group.bench_function("stock", |b| b.iter(|| counters.stock(Reason::Size, black_box(64 << 20))));
    group.finish();
}

type AllReduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> Code;

/// The few functions of an NCCL that are called here.
#[derive(Clone, Copy)]
struct Nccl {
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> Code,
    all_reduce: AllReduce,
    destroy: unsafe extern "C" fn(Comm) -> Code,
}

impl Nccl {
    fn open(path: &Path) -> Self {
        // SAFETY: the simulated NCCL or libtwoshot.so; never closed.
        let library = unsafe { libloading::Library::new(path) }.expect("the library opens");
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the type is that of the function of this name in `include/nccl_api.h`.
                *unsafe { library.get($name) }.expect("a function of NCCL")
            };
        }
        Self {
            unique_id: symbol!(b"ncclGetUniqueId\0"),
            init_rank: symbol!(b"ncclCommInitRank\0"),
            all_reduce: symbol!(b"ncclAllReduce\0"),
            destroy: symbol!(b"ncclCommDestroy\0"),
        }
    }

    fn id(&self) -> UniqueId {
        let mut id = UniqueId { internal: [0; 128] };
        // SAFETY: a valid out-pointer.
        assert_eq!(unsafe { (self.unique_id)(&raw mut id) }, 0);
        id
    }
}

/// One rank on a GPU of its own.
struct Rank {
    nccl: Nccl,
    comm: Comm,
    stream: Stream,
    buffer: Scratch,
    _entered: twoshot::driver::Entered,
}

impl Rank {
    fn join(nccl: Nccl, ranks: u32, id: UniqueId, rank: u32, bytes: u64) -> Self {
        let device = Device::new(rank as i32).expect("a simulated GPU");
        let context = Context::retain(device).expect("a context");
        let entered = context.enter().expect("a current context");
        let stream = Stream::new(&context).expect("a stream");
        let buffer = Scratch::new(&context, bytes).expect("memory");
        let mut comm = std::ptr::null_mut();
        // SAFETY: a valid out-pointer and an identifier from this NCCL.
        assert_eq!(unsafe { (nccl.init_rank)(&raw mut comm, ranks as c_int, id, rank as c_int) }, 0);
        Self { nccl, comm, stream, buffer, _entered: entered }
    }

    /// Queues a bf16 sum in place.
    fn call(&self, count: usize) {
        let at = self.buffer.address();
        let stream = self.stream.as_raw().0 as *mut c_void;
        // SAFETY: a live communicator and stream; the buffer holds every count used here.
        let code =
            unsafe { (self.nccl.all_reduce)(at as *const c_void, at as *mut c_void, count, 9, 0, self.comm, stream) };
        assert_eq!(code, 0);
    }

    fn wait(&self) {
        assert!(self.stream.wait(Duration::from_secs(60)).expect("the stream"), "the calls end");
    }

    fn leave(self) {
        self.wait();
        // SAFETY: made once, destroyed once.
        assert_eq!(unsafe { (self.nccl.destroy)(self.comm) }, 0);
    }
}

/// A call that stock NCCL gets, by a communicator that is declined: one rank.
fn left_to_stock(criterion: &mut Criterion, stock: Nccl, ours: Nccl) {
    let mut group = criterion.benchmark_group("a call of no elements");
    for (name, nccl) in [("stock", stock), ("through twoshot", ours)] {
        let rank = Rank::join(nccl, 1, nccl.id(), 0, 4096);
        rank.call(1);
        group.bench_function(name, |b| b.iter(|| rank.call(black_box(0))));
        rank.leave();
    }
    group.finish();
}

/// The second rank: makes as many calls as it is told to, on a thread of its own.
fn second(nccl: Nccl, id: UniqueId, bytes: u64, orders: &Receiver<(u64, usize)>, done: &Sender<()>) {
    let rank = Rank::join(nccl, 2, id, 1, bytes);
    for (calls, count) in orders {
        (0..calls).for_each(|_| rank.call(count));
        rank.wait();
        done.send(()).expect("somebody listens");
    }
    rank.leave();
}

/// Calls of two ranks in this process; rank 0's time to make one is measured, in batches that a stream can hold.
fn of_two(criterion: &mut Criterion, stock: Nccl, ours: Nccl) {
    const BYTES: u64 = 128 << 10;
    const BATCH: u64 = 64;
    for (name, nccl) in [("stock", stock), ("through twoshot", ours)] {
        let mut group = criterion.benchmark_group("a call of two ranks");
        let ((to, orders), (done, finished), id) = (channel(), channel(), nccl.id());
        let other = std::thread::spawn(move || second(nccl, id, BYTES, &orders, &done));
        let rank = Rank::join(nccl, 2, id, 0, BYTES);
        for (size, count) in [("1 KiB", 512), ("128 KiB", 64 << 10)] {
            group.bench_function(format!("{size}, {name}"), |b| {
                b.iter_custom(|calls| {
                    let mut spent = Duration::ZERO;
                    let mut left = calls;
                    while left > 0 {
                        let batch = left.min(BATCH);
                        left -= batch;
                        to.send((batch, count)).expect("the second rank lives");
                        let start = Instant::now();
                        (0..batch).for_each(|_| rank.call(black_box(count)));
                        spent += start.elapsed();
                        rank.wait();
                        finished.recv().expect("the second rank lives");
                    }
                    spent
                });
            });
        }
        drop(to);
        rank.leave();
        other.join().expect("the second rank ended well");
        group.finish();
    }
}

/// The dynamic linker reads its path at the start of a process only: this one starts itself again.
fn in_simulator() {
    const SIGN: &str = "TWOSHOT_SIM_DIR";
    if std::env::var_os(SIGN).is_some() {
        return;
    }
    let session = Session::new(&Topology::one_host(2)).expect("a session");
    let program = std::env::current_exe().expect("this program");
    let mut again = Command::new(program);
    again
        .args(std::env::args_os().skip(1))
        .env(SIGN, session.dir())
        .env("TWOSHOT_SIM_HOST", "0")
        .env("TWOSHOT_SIM_RANK", "0")
        .env("CUDA_VISIBLE_DEVICES", "0,1")
        .env("LD_LIBRARY_PATH", session.libraries())
        .env("TWOSHOT_NCCL_LIBRARY", twoshot_sim::nccl())
        .env("TWOSHOT_MULTICAST", "0")
        .env("TWOSHOT_MAX_BLOCKS", "1")
        .env("TWOSHOT_MAX_BYTES", "64K");
    let status = again.status().expect("this program starts");
    drop(session);
    std::process::exit(status.code().unwrap_or(2));
}

fn main() {
    in_simulator();
    let mut criterion = Criterion::default().configure_from_args().sample_size(30);
    decisions(&mut criterion);
    look_ups(&mut criterion);
    counting(&mut criterion);
    let (stock, ours) = (Nccl::open(&twoshot_sim::nccl()), Nccl::open(&twoshot_sim::twoshot_library()));
    left_to_stock(&mut criterion, stock, ours);
    of_two(&mut criterion, stock, ours);
    criterion.final_summary();
}
