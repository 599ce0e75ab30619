//! The known-answer AllReduce: every kernel the communicator can ever pick, on data whose result every rank can
//! compute, compared bit for bit. A mapping that "succeeded" but leads nowhere is found here, before any call.
//!
//! Payloads are a few KiB, so that nothing large has to be allocated for them: a thread has one line of its own at most,
//! and of each slot the first KiB or two are used. What lies behind in the same mapping is not tried.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use half::{bf16, f16};

use crate::call::{Call, Class, DataType, Factor, ReduceOp};
use crate::driver::{Args, Context, Event, Kernels, Launch, Multiply, RawStream, Scratch, Stream};
use crate::error::{Error, Result};
use crate::layout::Algorithm;
use crate::route::{Agreement, NEVER, Plan, Route, decide, pass};
use crate::steps::bounded;
use crate::workspace::Workspace;

/// Odd, so that the last line is a partial one in every type, and more than one line per rank up to 72 ranks.
const COUNT: u64 = 1021;
/// More than the number of stages, so that every stage is used again after its re-arm.
const ROUNDS: u32 = 2;

/// A communicator that computes.
pub struct Checked {
    /// Its memory.
    pub workspace: Workspace,
    /// Its kernels.
    pub kernels: Kernels,
    /// Marks the end of the last call.
    pub last: Event,
}

/// What comes back from a check: where a bit was wrong, or a step failed, the memory, which peers may still use.
pub type Outcome = std::result::Result<Checked, (Workspace, Error)>;

/// Runs all kernels. The outer error means that the step itself did not come back.
pub fn check(
    context: &Arc<Context>,
    workspace: Workspace,
    kernels: Kernels,
    agreement: Agreement,
    rank: u32,
    deadline: Duration,
) -> Result<Outcome> {
    let context = Arc::clone(context);
    bounded("the known-answer AllReduce", deadline, move || {
        // The last kernel starts in the first half of the step and gives up a quarter of it later: a step that was
        // left behind and comes back must not store into what its peers have released by then.
        let (last_start, patience) = (Instant::now() + deadline / 2, deadline / 4);
        let timeout_ns = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        let args = workspace.args(&agreement, rank, timeout_ns);
        let bench = match Bench::new(&context, args) {
            Ok(bench) => bench,
            Err(error) => return Ok(Err((workspace, error))),
        };
        let outcome = context.enter().and_then(|_entered| {
            let budget = Budget { last_start, patience };
            bench.all(&workspace, &kernels, &agreement, budget)
        });
        if let Err(error) = outcome {
            // Memory that a kernel may still use is never freed: one that has not left yet is told to, and if it stays
            // the step is left behind with all it owns.
            workspace.page.control().abort.store(1, Ordering::Release);
            let _ = bench.stream.wait_forever();
            return Ok(Err((workspace, error)));
        }
        drop(bench);
        match Event::new(&context) {
            Ok(last) => Ok(Ok(Checked { workspace, kernels, last })),
            Err(error) => Ok(Err((workspace, error))),
        }
    })
}

/// A plan for this algorithm as the router would make it, for the largest count up to [`COUNT`] that fits.
fn plan(algorithm: Algorithm, class: Class, agreement: &Agreement) -> Option<(Plan, u64)> {
    let (dtype, op) = sample(class);
    let size = dtype.size()?;
    let (oneshot_bytes, twoshot_bytes, switch_bytes, bulk_bytes) = match algorithm {
        Algorithm::OneShot => (agreement.oneshot_bytes, 0, NEVER, 0),
        Algorithm::TwoShot => (0, agreement.twoshot_bytes, NEVER, 0),
        Algorithm::Switch if agreement.switch_bytes == NEVER || !class.specialised() => return None,
        Algorithm::Switch => (0, agreement.twoshot_bytes, 0, 0),
        Algorithm::Bulk => (0, 0, NEVER, agreement.bulk_bytes),
    };
    let most = class.packing().payload(oneshot_bytes.max(twoshot_bytes)).max(bulk_bytes);
    let count = COUNT.min(most / size);
    let forced = Agreement { oneshot_bytes, twoshot_bytes, switch_bytes, bulk_bytes, min_bytes: 0, ..*agreement };
    match decide(&Call { count, dtype, op }, &forced) {
        Route::Routed(plan) => Some((plan, count)),
        Route::Stock(_) => None,
    }
}

/// When the last kernel may start, and how long one waits for its peers.
#[derive(Clone, Copy)]
struct Budget {
    last_start: Instant,
    patience: Duration,
}

struct Bench {
    input: Scratch,
    output: Scratch,
    stream: Stream,
    args: Args,
}

impl Bench {
    fn new(context: &Arc<Context>, args: Args) -> Result<Self> {
        // A factor fits behind the input.
        let (input, output) = (Scratch::new(context, (COUNT + 1) * 8)?, Scratch::new(context, COUNT * 8)?);
        Ok(Self { input, output, stream: Stream::new(context)?, args })
    }

    fn all(&self, workspace: &Workspace, kernels: &Kernels, agreement: &Agreement, budget: Budget) -> Result<()> {
        for round in 0..ROUNDS {
            for algorithm in Algorithm::ALL {
                // The other classes share the specialised ones' stages: once is enough for their code.
                for class in Class::ALL.into_iter().filter(|class| class.specialised() || round == 0) {
                    let Some((plan, count)) = plan(algorithm, class, agreement) else { continue };
                    self.run(workspace, kernels, plan, count, round, budget)?;
                }
            }
        }
        if agreement.scaled_bytes > 0 {
            for class in Class::ALL.into_iter().filter(|class| class.scales()) {
                self.multiply(kernels, class, budget)?;
            }
        }
        Ok(())
    }

    /// The pass before a pre-multiplied sum: every second class reads its factor from the device.
    fn multiply(&self, kernels: &Kernels, class: Class, budget: Budget) -> Result<()> {
        const TIMES: f32 = 2.0;
        let (dtype, _) = sample(class);
        let mine = payload(dtype, COUNT, |i| value(self.args.rank, 0, i, 30));
        let mut factor = payload(dtype, 1, |_| TIMES);
        factor.resize(8, 0);
        self.input.write(0, &mine, &self.stream)?;
        self.input.write(COUNT * 8, &factor, &self.stream)?;
        self.output.write(0, &vec![0xA5; mine.len()], &self.stream)?;
        let factor = if (class as u32).is_multiple_of(2) {
            Factor::Device(self.input.address() + COUNT * 8)
        } else {
            Factor::Value(factor.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte)))
        };
        let (input, output) = (self.input.address(), self.output.address());
        let pass = pass(input, output, COUNT, dtype.size().unwrap_or(0));
        Multiply { kernels, class, dtype, factor, pass, dependent: false, trigger: false }.on(
            self.stream.as_raw(),
            input,
            output,
            COUNT,
        )?;
        if !self.stream.wait(budget.patience)? {
            return Err(Error::Deadline("the known-answer AllReduce"));
        }
        let mut got = vec![0; mine.len()];
        self.output.read(0, &mut got, &self.stream)?;
        let expected = payload(dtype, COUNT, |i| value(self.args.rank, 0, i, 30) * TIMES);
        match got.iter().zip(&expected).position(|(got, expected)| got != expected) {
            None => Ok(()),
            Some(at) => Err(Error::WrongAnswer(format!("product {}, byte {at} of {}", class.name(), got.len()))),
        }
    }

    fn run(
        &self,
        workspace: &Workspace,
        kernels: &Kernels,
        plan: Plan,
        count: u64,
        round: u32,
        budget: Budget,
    ) -> Result<()> {
        let (rank, ranks) = (self.args.rank, self.args.ranks);
        let most = largest(plan.algorithm, ranks);
        let mine = payload(plan.dtype, count, |i| value(rank, round, i, most));
        self.input.write(0, &mine, &self.stream)?;
        self.output.write(0, &vec![0xA5; mine.len()], &self.stream)?;
        let args = Args { in_: self.input.address(), out: self.output.address(), count, ..self.args };
        let stream: RawStream = self.stream.as_raw();
        if Instant::now() > budget.last_start {
            return Err(Error::Deadline("the known-answer AllReduce"));
        }
        Launch { kernels, plan, dependent: false, trigger: false }.on(stream, &args)?;
        // The kernel leaves after `patience`; a little more for the last store to land.
        if !self.stream.wait(budget.patience + budget.patience / 2)? {
            return Err(Error::Deadline("the known-answer AllReduce"));
        }
        if let Some(fault) = workspace.page.fault() {
            return Err(Error::Kernel(fault.to_string()));
        }
        let mut got = vec![0; mine.len()];
        self.output.read(0, &mut got, &self.stream)?;
        let all = |i| (0..ranks).map(move |r| value(r, round, i, most));
        let expected = payload(plan.dtype, count, |i| match plan.op {
            ReduceOp::MAX => all(i).fold(f32::MIN, f32::max),
            _ => all(i).sum(),
        });
        if got == expected {
            return Ok(());
        }
        let at = got.iter().zip(&expected).position(|(got, expected)| got != expected).unwrap_or(0);
        let name = plan.class.name();
        Err(Error::WrongAnswer(format!("{} {name}, byte {at} of {}", plan.algorithm.name(), got.len())))
    }
}

/// What a class is tried with: its sum, or the largest value, which every type holds exactly.
fn sample(class: Class) -> (DataType, ReduceOp) {
    match class {
        Class::F32 => (DataType::F32, ReduceOp::SUM),
        Class::F16 => (DataType::F16, ReduceOp::SUM),
        Class::Bf16 => (DataType::BF16, ReduceOp::SUM),
        Class::F32Op => (DataType::F32, ReduceOp::MAX),
        Class::F16Op => (DataType::F16, ReduceOp::MAX),
        Class::Bf16Op => (DataType::BF16, ReduceOp::MAX),
        Class::I8 => (DataType::I8, ReduceOp::MAX),
        Class::I32 => (DataType::I32, ReduceOp::MAX),
        Class::I64 => (DataType::I64, ReduceOp::MAX),
        Class::F64 => (DataType::F64, ReduceOp::MAX),
        Class::Fp8 => (DataType::E5M2, ReduceOp::MAX),
    }
}

/// Integers up to `most`: their sum over any number of ranks is exact in f32, so the order of addition cannot matter and
/// only the last rounding counts.
fn value(rank: u32, round: u32, i: u64, most: u32) -> f32 {
    ((i * 7 + u64::from(rank) * 13 + u64::from(round) * 29) % u64::from(2 * most + 1)) as f32 - most as f32
}

/// The switch's last rounding is not ours to know: no sum, nor part of one, is beyond 256, to which bf16 holds integers.
fn largest(algorithm: Algorithm, ranks: u32) -> u32 {
    match algorithm {
        Algorithm::Switch => (256 / ranks.max(1)).clamp(1, 30),
        _ => 30,
    }
}

fn payload(dtype: DataType, count: u64, value: impl Fn(u64) -> f32) -> Vec<u8> {
    let values = (0..count).map(value);
    match dtype {
        DataType::BF16 => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        DataType::F16 => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        DataType::I8 => values.flat_map(|x| (x as i8).to_le_bytes()).collect(),
        DataType::I32 => values.flat_map(|x| (x as i32).to_le_bytes()).collect(),
        DataType::I64 => values.flat_map(|x| (x as i64).to_le_bytes()).collect(),
        DataType::F64 => values.flat_map(|x| f64::from(x).to_le_bytes()).collect(),
        // The upper half of an f16. Cutting the lower one off keeps the order, so the largest stays the largest.
        DataType::E5M2 => values.map(|x| f16::from_f32(x).to_le_bytes()[1]).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
    }
}
