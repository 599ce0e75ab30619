//! One rank of a benchmark: a process that knows NCCL's public API and nothing of twoshot's insides.
//!
//! It makes one communicator through stock NCCL and one through libtwoshot.so, verifies both at every size, then
//! times them in turn. All ranks run the same plan, so only their rows travel to the parent.
#![forbid(unsafe_code)]

use std::io::{BufRead, Write};
use std::mem::ManuallyDrop;
use std::sync::Arc;

use twoshot::driver::{Context, Device, Entered, Stream};
use twoshot::layout::Algorithm;

use crate::cuda::{self, Event, Graph};
use crate::element::{Dtype, Op, Reduction};
use crate::nccl::{Buffer, Communicator, INT32, MIN, Nccl, SUM};
use crate::protocol::{Ids, Message, RankFacts, RankRow, Task};
use crate::{timing, verify};

/// Guard bytes on both sides of every buffer.
pub const GUARD: u64 = 4096;
/// What the guards hold.
pub const GUARD_BYTE: u8 = 0x5a;

/// The pipe to the parent: the standard output that the process was started with. Libraries print to what is now
/// standard output, which leads to standard error.
pub struct Parent(std::fs::File);

impl Parent {
    /// Takes the pipe away from whoever prints.
    fn take() -> std::io::Result<Self> {
        let own = rustix::io::dup(rustix::stdio::stdout())?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
        Ok(Self(own.into()))
    }

    /// Says something. A parent that is gone has ended us by now or will.
    pub fn say(&mut self, message: &Message) {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            let _ = self.0.write_all(&line);
        }
    }
}

/// Which library a call goes through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Path {
    Stock,
    Routed,
}

/// Everything a rank holds.
pub struct Rank {
    pub task: Task,
    pub parent: Parent,
    pub library: &'static Nccl,
    pub stock: Communicator,
    pub routed: Communicator,
    pub stream: Stream,
    pub input: Buffer,
    pub output: Buffer,
    /// One word in, one word out: barriers and agreements.
    words: Buffer,
    _context: Arc<Context>,
    _entered: Entered,
}

/// Runs a rank; returns the exit code of the process.
pub fn main() -> i32 {
    // A rank whose parent died must not spin on a GPU.
    let signal = rustix::process::Signal::KILL;
    let _ = rustix::process::set_parent_process_death_signal(Some(signal));
    let mut parent = match Parent::take() {
        Ok(parent) => parent,
        Err(error) => {
            eprintln!("twoshot bench-rank: {error}");
            return 2;
        }
    };
    let outcome = read_task().and_then(|task| {
        let own = rustix::io::dup(&parent.0).map_err(|error| error.to_string())?;
        run(task, Parent(own.into()))
    });
    match outcome {
        Ok(()) => {
            parent.say(&Message::Done);
            0
        }
        Err(message) => {
            parent.say(&Message::Failed { message });
            2
        }
    }
}

fn read_line<T: serde::de::DeserializeOwned>(what: &str) -> Result<T, String> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(|error| error.to_string())?;
    serde_json::from_str(&line).map_err(|error| format!("{what}: {error}"))
}

fn read_task() -> Result<Task, String> {
    read_line("the task on standard input")
}

fn run(task: Task, mut parent: Parent) -> Result<(), String> {
    let words = |error: twoshot::error::Error| error.to_string();
    step(&mut parent, "opening the libraries");
    let nccl = Nccl::open(&task.nccl)?;
    let library = Nccl::open(&task.library)?;
    let twoshot = library
        .twoshot_version()
        .ok_or_else(|| format!("{} is not libtwoshot.so: it has no twoshot_version", task.library.display()))?;
    step(&mut parent, "opening the GPU");
    let device = Device::new(task.device).map_err(words)?;
    let facts = device.facts().map_err(words)?;
    let context = Context::retain(device).map_err(words)?;
    let entered = context.enter().map_err(words)?;
    let stream = Stream::new(&context).map_err(words)?;
    if task.rank == 0 {
        parent.say(&Message::Ids(Ids { stock: nccl.unique_id()?, routed: library.unique_id()? }));
    }
    let ids: Ids = read_line("the communicator identifiers on standard input")?;
    step(&mut parent, "making the stock communicator");
    let stock = Communicator::join(nccl, task.ranks, &ids.stock, task.rank)?;
    step(&mut parent, "making the routed communicator");
    let routed = Communicator::join(library, task.ranks, &ids.routed, task.rank)?;
    let largest = task.plan.sizes.iter().copied().max().unwrap_or(0) + 16;
    let buffer = |bytes| Buffer::new(&context, bytes);
    let rank = Rank {
        input: buffer(largest + 2 * GUARD)?,
        output: buffer(largest + 2 * GUARD)?,
        words: buffer(512)?,
        parent,
        library,
        stock,
        routed,
        stream,
        _context: Arc::clone(&context),
        _entered: entered,
        task,
    };
    // A rank that gives up leaves everything to the end of its process: releasing could wait for its peers.
    let mut rank = ManuallyDrop::new(rank);
    rank.work(|rank| facts_of(rank, nccl, &facts.uuid, facts.arch, &twoshot))?;
    // Named, so that the context and the memory go after the communicators.
    let Rank {
        routed, stock, stream: _stream, input: _input, output: _output, words: _words, _context, _entered, ..
    } = ManuallyDrop::into_inner(rank);
    routed.destroy()?;
    stock.destroy()
}

fn facts_of(rank: &Rank, nccl: &Nccl, uuid: &[u8; 16], arch: u32, twoshot: &str) -> Result<RankFacts, String> {
    Ok(RankFacts {
        gpu: cuda::device_name(rank.task.device)?,
        gpu_uuid: crate::report::uuid(uuid),
        arch,
        host: host(),
        driver: driver_version(),
        cuda: cuda::driver()?.0,
        nccl: nccl.version()?,
        twoshot: twoshot.to_owned(),
        agreed: rank.routed.agreed(),
    })
}

fn step(parent: &mut Parent, step: &str) {
    parent.say(&Message::Step { step: step.to_owned() });
}

/// The kernel module's version, where the system shows it.
pub fn driver_version() -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let dotted = |word: &&str| word.split('.').count() >= 2 && word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.split_whitespace().find(dotted).unwrap_or_default().to_owned()
}

impl Rank {
    /// All of the plan.
    fn work(&mut self, facts: impl FnOnce(&Self) -> Result<RankFacts, String>) -> Result<(), String> {
        self.step("the first stock call");
        self.agree(1)?;
        self.step("the set-up of the routed communicator (its first call)");
        // Its first call sets it up.
        self.word_call(&self.routed, SUM)?;
        self.finish()?;
        let facts = facts(self)?;
        self.parent.say(&Message::Ready(facts));
        for what in self.task.plan.reductions() {
            for bytes in self.task.plan.sizes.clone() {
                let row = self.row(what, bytes)?;
                self.parent.say(&Message::Row(row));
            }
        }
        self.step("destroying the communicators");
        self.agree(1).map(|_| ())
    }

    /// Tells the parent what comes next, so that it can name it when it never ends.
    pub fn step(&mut self, what: &str) {
        step(&mut self.parent, what);
    }

    /// The stream's handle.
    pub fn raw_stream(&self) -> cuda::Stream {
        self.stream.as_raw().0 as cuda::Stream
    }

    /// The communicator of a path.
    pub fn communicator(&self, path: Path) -> &Communicator {
        match path {
            Path::Stock => &self.stock,
            Path::Routed => &self.routed,
        }
    }

    /// Waits for the stream and looks after both communicators meanwhile.
    pub fn finish(&self) -> Result<(), String> {
        let end = Event::new()?;
        end.record(self.raw_stream())?;
        end.wait(|| self.stock.async_error().and_then(|()| self.routed.async_error()))
    }

    /// Queues a tiny AllReduce: no GPU passes before all have come.
    pub fn device_barrier(&self) -> Result<(), String> {
        self.word_call(&self.stock, MIN)
    }

    fn word_call(&self, communicator: &Communicator, op: i32) -> Result<(), String> {
        let spans = (self.words.from(0)?, self.words.from(256)?);
        communicator.all_reduce(spans, (1, 4), (INT32, op), &self.stream)
    }

    /// Whether routed calls of this size are sums that the NVLink switch makes: their last bits are its secret.
    pub fn in_switch(&self, what: Reduction, count: u64) -> bool {
        let bytes = count * what.size() as u64;
        let summed = what.op == Op::Sum && [Dtype::Bf16, Dtype::F16, Dtype::F32].contains(&what.dtype);
        summed && self.routed.agreed().is_some_and(|agreed| agreed.algorithm(bytes) == Algorithm::Switch)
    }

    /// The smallest of all ranks' numbers. A barrier, too.
    pub fn agree(&self, mine: u32) -> Result<u32, String> {
        self.words.write(0, &mine.to_le_bytes(), &self.stream)?;
        self.device_barrier()?;
        self.finish()?;
        let mut bytes = [0; 4];
        self.words.read(256, &mut bytes, &self.stream)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Queues one AllReduce of `count` elements behind the guards.
    pub fn call(&self, path: Path, what: Reduction, count: u64, place: Place) -> Result<(), String> {
        let input = self.input.from(GUARD + place.input_shift)?;
        let output = if place.in_place { input } else { self.output.from(GUARD + place.output_shift)? };
        let (size, kind) = ((count, what.size() as u64), (what.dtype.nccl(), what.op.nccl()));
        self.communicator(path).all_reduce((input, output), size, kind, &self.stream)
    }

    /// Verifies and times one line of the table.
    fn row(&mut self, what: Reduction, bytes: u64) -> Result<RankRow, String> {
        let count = crate::sizes::elements(bytes, what.size() as u64);
        let bytes = count * what.size() as u64;
        let mut row = verify::row(self, what, count)?;
        row.bytes = bytes;
        if self.task.plan.repetitions > 0 {
            (row.stock, row.routed) = timing::both(self, what, count)?;
        }
        Ok(row)
    }

    /// Captures calls of a path into a graph.
    pub fn graph(&self, path: Path, what: Reduction, count: u64, place: Place, calls: u32) -> Result<Graph, String> {
        Graph::capture(self.raw_stream(), || (0..calls).try_for_each(|_| self.call(path, what, count, place)))
    }
}

/// Where a call's data lies.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    pub in_place: bool,
    /// Bytes by which the data is moved from its aligned place.
    pub input_shift: u64,
    pub output_shift: u64,
}

/// The host as twoshot tells hosts apart, by name.
fn host() -> String {
    let own = std::env::var("TWOSHOT_HOST_ID").ok().filter(|id| !id.is_empty());
    own.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
}
