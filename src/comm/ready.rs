//! A communicator whose calls are routed: launches in issue order, faults, and the end.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::budget::{Memory, blocks};
use crate::config::Config;
use crate::driver::{
    Args, Capture, Context, ControlPage, Event, Fault, Kernels, Launch, Multiply, RawStream, Remains, bury, capture_of,
    dependent_launch, nvtx, order_behind, reap, retain_for_graph, stream_number, with_relaxed_capture,
};
use crate::error::Result;
use crate::layout::{Algorithm, HEADER, SPARE};
use crate::route::{Agreement, Plan, grid, pass};
use crate::setup::Established;
use crate::table::World;
use crate::warning;
use crate::workspace::Workspace;

/// What a profiler shows a launch as.
fn range_name(algorithm: Algorithm) -> &'static CStr {
    match algorithm {
        Algorithm::OneShot => c"twoshot: AllReduce, one-shot",
        Algorithm::TwoShot => c"twoshot: AllReduce, two-shot",
        Algorithm::Switch => c"twoshot: AllReduce, two-shot in the switch",
        Algorithm::Bulk => c"twoshot: AllReduce, bulk",
    }
}

/// The addresses of one call, and where it is queued.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// Device address of the input.
    pub input: u64,
    /// Device address of the output.
    pub output: u64,
    /// Elements.
    pub count: u64,
    /// The caller's stream.
    pub stream: RawStream,
}

/// The last operation captured, by capture sequence.
#[derive(Clone, Copy)]
struct Captured {
    id: u64,
    stream: RawStream,
    node: Option<usize>,
    /// Stock NCCL captures it in its own time: its node is asked for when it is needed.
    late: bool,
}

/// A stream that work was queued on. A handle can come again for another stream once its own is destroyed, with work of
/// its own still to run; the driver's number for it cannot.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Lane {
    stream: RawStream,
    number: u64,
}

impl Lane {
    fn of(context: &Context, stream: RawStream) -> Self {
        Self { stream, number: stream_number(context, stream) }
    }

    /// Whether work on both is in order by itself. The per-thread stream is another one on every thread.
    fn same(self, other: Self) -> bool {
        self == other && self.stream != RawStream::PER_THREAD
    }
}

/// Programmatic dependent launch in a call. A launch may always become resident where its predecessor lets it, since it
/// waits there; stock NCCL never lets a successor in, so the program's kernels behind ours need not wait.
#[derive(Clone, Copy)]
struct Overlap {
    /// The first launch may start early.
    first: bool,
    /// The others may.
    others: bool,
    /// The launches of the call let each other in.
    within: bool,
    /// The last one lets in what comes behind the call.
    behind: bool,
}

/// Where the last operations went, ours and stock NCCL's, so that the next one is ordered behind them.
#[derive(Default)]
struct Order {
    eager: Option<Lane>,
    /// Operations have been on more than one stream: from then on stock NCCL's are marked too.
    several: bool,
    captured: Option<Captured>,
    retained: Option<u64>,
}

impl Order {
    /// The node of the last operation in this capture, where it is not on this stream.
    fn node_elsewhere(&self, context: &Context, capture: &Capture, stream: RawStream) -> Option<usize> {
        let last = self.captured.filter(|last| last.id == capture.id)?;
        let late = || capture_of(context, last.stream).filter(|now| now.id == last.id)?.node;
        let node = if last.late { late() } else { last.node };
        let elsewhere = last.stream != stream || (stream == RawStream::PER_THREAD && node != capture.node);
        node.filter(|_| elsewhere)
    }
}

/// Communicators that are ready, by device. With more than one, no launch lets its successor in any more: what waits
/// behind a launch holds multiprocessors that a kernel of the other communicator may be waiting for.
static READY: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];

fn ready_on(context: &Context) -> &'static AtomicU32 {
    &READY[context.device().ordinal().unsigned_abs() as usize % READY.len()]
}

/// Ready communicators of the process, graphs' and forgotten ones included, and those of them that were aborted.
static LIVING: AtomicU32 = AtomicU32::new(0);
static ABORTED: AtomicU32 = AtomicU32::new(0);

/// Whether no kernel of ours can wait for a peer any more: then what was laid aside can go at once.
pub fn only_aborted_are_left() -> bool {
    LIVING.load(Ordering::Acquire) == ABORTED.load(Ordering::Acquire)
}

/// Communicators that have ended while a kernel of theirs was still running.
static LINGERING: Mutex<Vec<Arc<Ready>>> = Mutex::new(Vec::new());
static SOME_LINGER: AtomicBool = AtomicBool::new(false);

/// Drops what could not be dropped when its communicator ended: what graphs and aborts laid aside, and what kernels have
/// left by now. Two loads where there is nothing.
pub fn collect() {
    reap();
    if !SOME_LINGER.load(Ordering::Relaxed) {
        return;
    }
    let ended: Vec<_> = {
        let mut lingering = LINGERING.lock();
        let ended =
            |ready: &mut Arc<Ready>| with_relaxed_capture(|| matches!(ready.last.wait(Duration::ZERO), Ok(true)));
        let ended = lingering.extract_if(.., ended).collect();
        SOME_LINGER.store(!lingering.is_empty(), Ordering::Release);
        ended
    };
    with_relaxed_capture(|| drop(ended));
}

/// A ready communicator. Dropped when the communicator and every graph that captured one of its calls are gone.
pub struct Ready {
    args: Args,
    agreement: Agreement,
    world: World,
    /// The driver has programmatic launches.
    programmatic: bool,
    /// What comes behind a call waits for it, says the user.
    open: bool,
    laid_aside: AtomicBool,
    order: Mutex<Order>,
    /// The last eager operation was stock NCCL's, and `last` was not recorded behind it. Changes under `order`.
    unmarked: AtomicBool,
    last: Event,
    // Dropped in this order: kernels before the memory they work on.
    kernels: Kernels,
    workspace: Arc<(Workspace, Memory)>,
    _remains: Remains,
    context: Arc<Context>,
    /// Blocks of the largest size that the device holds at once.
    capacity: u32,
    non_blocking: bool,
}

impl Ready {
    /// Takes over what set-up established.
    pub fn new(context: Arc<Context>, established: Established, remains: Remains, rank: u32, config: &Config) -> Self {
        let Established { agreement, world, kernels, workspace, last, capacity, memory, non_blocking, .. } =
            established;
        let timeout_ns = config.timeout_ms.saturating_mul(1_000_000);
        ready_on(&context).fetch_add(1, Ordering::Relaxed);
        LIVING.fetch_add(1, Ordering::AcqRel);
        Self {
            args: workspace.args(&agreement, rank, timeout_ns),
            agreement,
            world,
            programmatic: dependent_launch(),
            open: config.pdl,
            laid_aside: AtomicBool::new(false),
            order: Mutex::default(),
            unmarked: AtomicBool::new(false),
            last,
            kernels,
            workspace: Arc::new((workspace, memory)),
            _remains: remains,
            context,
            capacity,
            non_blocking,
        }
    }

    /// Whether some rank's communicator does not block its caller. The same on all ranks.
    pub fn non_blocking_somewhere(&self) -> bool {
        self.non_blocking
    }

    /// What the ranks agreed on.
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// What the cross-over table was asked.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.args.rank
    }

    /// The context of its device.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// CUDA ordinal of its device.
    pub fn device(&self) -> i32 {
        self.context.device().ordinal()
    }

    /// What a kernel reported, if one did.
    pub fn fault(&self) -> Option<Fault> {
        self.page().fault()
    }

    fn page(&self) -> &ControlPage {
        &self.workspace.0.page
    }

    /// Queues one call. The operations of a communicator run in issue order: on another stream than the last one's,
    /// eagerly behind its event, captured behind its node. Where that fails the peers may have queued theirs, and what
    /// this rank queued next would be taken for it: it is a fault of the communicator.
    pub fn launch(self: &Arc<Self>, plan: Plan, buffers: Buffers) -> Result<()> {
        self.launch_or_fail(plan, buffers).inspect_err(|_| self.page().refused(buffers.count))
    }

    /// Queues one call of a communicator whose calls are all on one stream of our own, which nobody captures: there is no
    /// order to keep, and nothing behind the call but what the caller puts there. [`Self::mark`] goes before the end.
    pub fn launch_alone(&self, plan: Plan, buffers: Buffers) -> Result<()> {
        let _range = nvtx::range(range_name(plan.algorithm));
        let (share, overlap) = self.room();
        let overlap = Overlap { behind: false, ..overlap };
        let entered = self.context.enter();
        let queued = entered.and_then(|_entered| self.queue(shared(plan, share), share, overlap, buffers));
        queued.inspect_err(|_| self.page().refused(buffers.count))
    }

    /// What the end of the communicator waits for: the work queued on this stream so far.
    pub fn mark(&self, stream: RawStream) -> Result<()> {
        let _entered = self.context.enter()?;
        self.last.record(stream)
    }

    fn launch_or_fail(self: &Arc<Self>, plan: Plan, buffers: Buffers) -> Result<()> {
        let stream = buffers.stream;
        let _range = nvtx::range(range_name(plan.algorithm));
        let _entered = self.context.enter()?;
        let (share, mut overlap) = self.room();
        let plan = shared(plan, share);
        let mut order = self.order.lock();
        let Some(capture) = capture_of(&self.context, stream) else {
            let lane = Lane::of(&self.context, stream);
            self.behind_last(&mut order, lane)?;
            self.queue(plan, share, overlap, buffers)?;
            order.eager = Some(lane);
            self.unmarked.store(false, Ordering::Relaxed);
            // Recorded now, not when the stream changes: by then the caller may have destroyed this one.
            return self.last.record(stream);
        };
        if let Some(node) = order.node_elsewhere(&self.context, &capture, stream) {
            order_behind(&self.context, stream, node)?;
            // Programmatic edges exist between two kernels only; this one now has two predecessors.
            overlap.first = false;
        }
        // First: a graph that cannot keep the memory must not have the kernel.
        if order.retained != Some(capture.id) {
            retain_for_graph(&self.context, &capture, Arc::clone(self) as _)?;
            order.retained = Some(capture.id);
        }
        self.queue(plan, share, overlap, buffers)?;
        let node = capture_of(&self.context, stream).and_then(|capture| capture.node);
        order.captured = Some(Captured { id: capture.id, stream, node, late: false });
        Ok(())
    }

    /// The blocks that a launch may take beside those of the device's other communicators, and what it may overlap with.
    fn room(&self) -> (u32, Overlap) {
        let communicators = ready_on(&self.context).load(Ordering::Relaxed);
        let within = self.programmatic && communicators <= 1;
        let (first, others, behind) = (self.programmatic, self.programmatic, within && self.open);
        (blocks(self.capacity, communicators), Overlap { first, others, within, behind })
    }

    /// The launches of one call: for a pre-multiplied sum the products into the output first, which is then summed in
    /// place.
    fn queue(&self, plan: Plan, share: u32, mut overlap: Overlap, buffers: Buffers) -> Result<()> {
        let Buffers { mut input, output, count, stream } = buffers;
        let element = plan.dtype.size().unwrap_or(0);
        if let Some(factor) = plan.factor {
            let pass = pass(input, output, count, element);
            // Waiting beside the kernel before it, a larger one could take the room of another communicator's kernel.
            let dependent = overlap.first && pass.blocks <= share;
            let (kernels, class, dtype, trigger) = (&self.kernels, plan.class, plan.dtype, overlap.within);
            Multiply { kernels, class, dtype, factor, pass, dependent, trigger }.on(stream, input, output, count)?;
            (input, overlap.first) = (output, overlap.others);
        }
        let mut done = 0;
        while done < count {
            let next = plan.piece.min(count - done);
            let moved = done * element;
            let args = Args { in_: input + moved, out: output + moved, count: next, ..self.args };
            let dependent = if done == 0 { overlap.first } else { overlap.others };
            done += next;
            let trigger = if done == count { overlap.behind } else { overlap.within };
            Launch { kernels: &self.kernels, plan, dependent, trigger }.on(stream, &args)?;
        }
        Ok(())
    }

    /// Lets a stream wait for the last eager operation, if that was on another one.
    fn behind_last(&self, order: &mut Order, lane: Lane) -> Result<()> {
        let Some(last) = order.eager.filter(|last| !last.same(lane)) else { return Ok(()) };
        order.several = true;
        if self.unmarked.swap(false, Ordering::Relaxed) {
            // A default stream, or one of the group that is ending: both live.
            self.last.record(last.stream)?;
        }
        self.last.hold(lane.stream)
    }

    /// Before stock NCCL queues an operation of this communicator: it runs behind ours that were issued before it.
    pub fn before_stock(&self, stream: RawStream) -> Result<()> {
        let mut order = self.order.lock();
        // Stock NCCL keeps its own operations in order; where none of ours was captured, no question is needed.
        let own = self.unmarked.load(Ordering::Relaxed);
        if own && order.captured.is_none() {
            return Ok(());
        }
        if let Some(capture) = capture_of(&self.context, stream) {
            let Some(node) = order.node_elsewhere(&self.context, &capture, stream) else { return Ok(()) };
            let _entered = self.context.enter()?;
            return order_behind(&self.context, stream, node);
        }
        if own {
            return Ok(());
        }
        let lane = Lane::of(&self.context, stream);
        if order.eager.is_none_or(|last| last.same(lane)) {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        self.behind_last(&mut order, lane)
    }

    /// Whether the last operation was stock NCCL's, on another stream, and left no mark: before a routed call, stock NCCL
    /// has to set one on this stream then (`abi::order`). From now on all are marked.
    pub fn behind_unmarked(&self, stream: RawStream) -> bool {
        if !self.unmarked.load(Ordering::Relaxed) || capture_of(&self.context, stream).is_some() {
            return false;
        }
        let mut order = self.order.lock();
        let lane = Lane::of(&self.context, stream);
        let elsewhere = order.eager.is_some_and(|last| !last.same(lane) && !last.stream.is_default());
        order.several |= elsewhere;
        elsewhere
    }

    /// Bytes of each of the two places of [`Self::spare`].
    pub const SPARE: usize = SPARE as usize / 2;

    /// Two places in this rank's memory that no kernel of ours uses.
    pub fn spare(&self) -> (u64, u64) {
        let first = self.args.windows + u64::from(self.args.rank) * self.args.window_stride + HEADER - SPARE;
        (first, first + SPARE / 2)
    }

    /// Behind it: ours that are issued later run behind it. An event marks it only where streams have changed before.
    /// `late`: stock NCCL queues it in its own time, so that it cannot be marked here.
    pub fn behind_stock(&self, stream: RawStream, late: bool) -> Result<()> {
        let mut order = self.order.lock();
        if let Some(capture) = capture_of(&self.context, stream) {
            let node = if late { None } else { capture.node };
            order.captured = Some(Captured { id: capture.id, stream, node, late });
            return Ok(());
        }
        order.eager = Some(Lane::of(&self.context, stream));
        // The per-thread stream is another one on every thread: it can only be marked here.
        let unmarked = (late || !order.several) && stream != RawStream::PER_THREAD;
        self.unmarked.store(unmarked, Ordering::Relaxed);
        if unmarked {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        self.last.record(stream)
    }

    /// Tells every kernel of this communicator, running or to come, to leave.
    pub fn abort(&self) {
        self.page().control().abort.store(1, Ordering::Release);
    }

    /// Whether the communicator was aborted.
    pub fn aborted(&self) -> bool {
        self.page().control().abort.load(Ordering::Relaxed) != 0
    }

    /// Lets go of a communicator that is being destroyed: waits a bounded time for its last eager call, then drops it.
    /// Graphs that captured its calls keep it alive. `later` leaves the dropping to the next set-up or destroy: an
    /// abort must not call what may wait for some other communicator's stuck kernel.
    pub fn release(self: Arc<Self>, patience: Duration, later: bool) {
        let device = self.context.device().ordinal();
        // Another thread's capture must not suffer from the questions asked here.
        with_relaxed_capture(|| match self.last.wait(patience).or_else(|_| self.last.wait(patience)) {
            Ok(true) if later => {
                if self.aborted() && !self.laid_aside.swap(true, Ordering::AcqRel) {
                    ABORTED.fetch_add(1, Ordering::AcqRel);
                }
                bury(self);
            }
            Ok(true) => drop(self),
            Ok(false) => {
                warning!(
                    device,
                    "a kernel still runs while its communicator is destroyed: its memory stays until it ends"
                );
                LINGERING.lock().push(self);
                SOME_LINGER.store(true, Ordering::Release);
            }
            // Whether a kernel still runs cannot be known any more.
            Err(error) => {
                warning!(device, "{error} while a communicator is destroyed: its memory is kept");
                std::mem::forget(self);
            }
        });
    }
}

/// The plan with at most so many blocks. How many a launch has is a rank's own matter: lines are addressed by the
/// payload, not by who stores them.
fn shared(plan: Plan, most: u32) -> Plan {
    if plan.blocks <= most {
        return plan;
    }
    if plan.algorithm == Algorithm::Bulk {
        // Its blocks do one channel after the other then.
        return Plan { blocks: most, ..plan };
    }
    let (blocks, threads) = grid(u64::from(plan.blocks) * u64::from(plan.threads), most);
    Plan { blocks, threads, ..plan }
}

/// How long the end of a communicator waits for a kernel that was queued meanwhile.
const LEAVING: Duration = Duration::from_secs(3);

impl Drop for Ready {
    fn drop(&mut self) {
        // Another thread may have been launching while the communicator was aborted; its kernel leaves by itself then.
        if !matches!(with_relaxed_capture(|| self.last.wait(LEAVING)), Ok(true)) {
            warning!(self.device(), "a kernel does not leave its communicator, whose memory is kept");
            std::mem::forget(Arc::clone(&self.workspace));
        }
        ready_on(&self.context).fetch_sub(1, Ordering::Relaxed);
        if *self.laid_aside.get_mut() {
            ABORTED.fetch_sub(1, Ordering::AcqRel);
        }
        LIVING.fetch_sub(1, Ordering::AcqRel);
    }
}
