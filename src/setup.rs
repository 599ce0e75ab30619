//! Setting a communicator up: probe, vote, allocate and export, vote, import and map, vote, multicast with votes of
//! its own, known-answer AllReduce, vote.
//!
//! Every rank takes part in every vote until the first refusal, whatever happened to it: work is done under
//! deadlines and its outcome stated, never returned early. The result is the same on all ranks.
#![forbid(unsafe_code)]

mod known_answer;
mod limits;
mod multicast;
mod objects;
mod probe;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::budget::Memory;
use crate::config::Config;
use crate::decline::Decline;
use crate::domain::{Declined, Domain, Tuned, merge};
use crate::driver::{Context, Device, Event, HandleType, Kernels, Module, Shareable, multicast_granularity};
use crate::error::{Error, Result};
use crate::exchange::{Exchange, vote};
use crate::handoff::{Desk, Peer};
use crate::layout::Layout;
use crate::route::Agreement;
use crate::steps::bounded;
use crate::table::{Row, World};
use crate::wire::Step;
use crate::workspace::{Own, PeerHandle, Workspace, allocate};
use crate::{trace, warning};

use known_answer::Checked;
pub use limits::payloads;
use limits::{Limits, limits, limits_in};
pub use probe::{HostIdentity, build, overridden};

/// A communicator ready for routed calls.
pub struct Established {
    /// What all ranks agreed on.
    pub agreement: Agreement,
    /// Kernels of this world.
    pub kernels: Kernels,
    /// Shared memory.
    pub workspace: Workspace,
    /// Marks the end of the last call.
    pub last: Event,
    /// Number of hosts.
    pub hosts: u32,
    /// Bytes of this rank's window.
    pub window_bytes: u64,
    /// What the cross-over table was asked.
    pub world: World,
    /// The cross-over row in force.
    pub row: Row,
    /// What the ranks made of their tuning files.
    pub tuned: Tuned,
    /// How handles travelled.
    pub handle: HandleType,
    /// Blocks of the largest size that the device holds at once.
    pub capacity: u32,
    /// What of the budget it holds.
    pub memory: Memory,
    /// Some rank's communicator does not block its caller.
    pub non_blocking: bool,
}

/// What is known of the communicator before its ranks have spoken.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// CUDA ordinal of its device.
    pub device: i32,
    /// The user's limit on blocks (`maxCTAs`), if any.
    pub max_blocks: Option<u32>,
    /// Minor release of stock NCCL.
    pub nccl: u32,
    /// What of the program's calls leads to us.
    pub bound: Binding,
}

/// What of the program's calls leads to us where the plugin door was opened; through the other doors all do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Binding {
    /// The same on two ranks where the same functions of the same objects are bound.
    pub digest: u64,
    /// A call could not be led here.
    pub incomplete: bool,
    /// Objects have come whose calls do not lead here: operations may have been made unseen.
    pub unseen: bool,
}

/// The common verdict.
pub type Verdict = std::result::Result<Established, Declined>;

/// A local failure on the way to a vote.
type Local<T> = std::result::Result<T, (Decline, Error)>;

fn reason<T>(reason: Decline) -> impl Fn(Error) -> std::result::Result<T, (Decline, Error)> {
    move |error| {
        let reason = if matches!(error, Error::Deadline(_)) { Decline::Deadline } else { reason };
        Err((reason, error))
    }
}

/// Numbers of the votes.
mod number {
    pub const PREPARE: u8 = 1;
    pub const SHARE: u8 = 2;
    pub const MAP: u8 = 3;
    pub const MULTICAST_FIND: u8 = 4;
    pub const MULTICAST_CREATE: u8 = 5;
    pub const MULTICAST_ADD: u8 = 6;
    pub const MULTICAST_BIND: u8 = 7;
    pub const KNOWN_ANSWER: u8 = 8;
}

struct Ballot<'a> {
    exchange: &'a mut dyn Exchange,
    device: i32,
    /// What failed on this rank.
    own: &'a mut Option<Error>,
}

impl Ballot<'_> {
    /// States this rank's outcome and gets the verdict, with the local value where all ranks succeeded.
    fn cast<T>(
        &mut self,
        mut step: Step,
        name: &'static str,
        local: Local<T>,
    ) -> Result<std::result::Result<(T, Vec<Step>), Declined>> {
        let kept = match local {
            Ok(value) => Some(value),
            Err((reason, error)) => {
                trace!(self.device, "{name}: {} on this rank: {error}", reason.name());
                step.declined = Some((reason, error.code()));
                *self.own = Some(error);
                None
            }
        };
        Ok(match (vote(self.exchange, step, name)?, kept) {
            (Ok(steps), Some(value)) => Ok((value, steps)),
            (Ok(_), None) => return Err(Error::Bug("a vote passed over a refusal")),
            (Err(declined), _) => Err(declined),
        })
    }
}

/// Sets a communicator up. The outer error means that the ranks lost each other; the verdict is common. Where it is no
/// because of this rank, `own` says what failed.
pub fn establish(
    exchange: &mut dyn Exchange,
    context: Result<Arc<Context>>,
    request: Request,
    config: &Config,
    own: &mut Option<Error>,
) -> Result<Verdict> {
    let patience = Duration::from_millis(config.setup_timeout_ms);
    let (rank, ranks) = (exchange.rank(), exchange.ranks());
    // What is missing already is a fact like the others: it is said, so that nobody waits.
    let identity = HostIdentity::read(config);
    let grounds = identity.as_ref().and_then(|identity| context.as_ref().map(|_| identity));
    let facts = probe::facts(rank, ranks, request, config, grounds, patience);
    let mut domain = match merge(&exchange.allgather(&facts.encode(), "the first step of set-up")?) {
        Ok(domain) => domain,
        Err(declined) => return Ok(Err(declined)),
    };
    say_tuned(&domain, rank, config, request.device);
    let context = &context?;
    let deadline = domain.deadline;
    exchange.grant(deadline);
    let mut ballot = Ballot { exchange, device: request.device, own };

    let mut step = Step::new(number::PREPARE, rank);
    let local = prepare(context, &domain, rank, config, deadline);
    if let Ok(prepared) = &local {
        (step.granularity, step.optional) = (prepared.granularity, prepared.multicast);
        step.blocks = prepared.blocks;
        step.memory = prepared.memory.bytes();
    }
    let (mut prepared, steps) = match ballot.cast(step, "examining links and kernels", local)? {
        Ok(passed) => passed,
        Err(declined) => return Ok(Err(declined)),
    };
    domain.multicast &= steps.iter().all(|step| step.optional);
    let align = steps.iter().map(|step| step.granularity).max().unwrap_or(1).max(1);
    let blocks = steps.iter().map(|step| step.blocks).min().unwrap_or(1);
    let memory = steps.iter().map(|step| step.memory).min().unwrap_or(0);
    let Some(mut limits) = limits(&domain, config, blocks, memory) else {
        return Ok(Err(Declined { reason: Decline::TooManyRanks, rank: 0, code: 0 }));
    };
    let Some(window_bytes) = limits.agreement.layout.window_bytes().checked_next_multiple_of(align) else {
        return Ok(Err(Declined { reason: Decline::TooManyRanks, rank: 0, code: 0 }));
    };
    prepared.memory.settle(window_bytes);

    let mut step = Step::new(number::SHARE, rank);
    let local = share(context, window_bytes, domain.handle, ranks, deadline);
    if let Ok((own, desk)) = &local {
        if let Shareable::Fabric(name) = &own.handle {
            step.fabric = *name;
        }
        if let Some(desk) = desk {
            (step.socket, step.token) = (desk.name, desk.token);
        }
    }
    let ((shared, desk), steps) = match ballot.cast(step, "allocating shared memory", local)? {
        Ok(passed) => passed,
        Err(declined) => return Ok(Err(declined)),
    };

    // Peers may be opening it while this rank fails: it stays until all have spoken.
    let kept = Arc::clone(&shared.memory);
    let local = collect(&shared, desk.as_ref(), rank, &steps, deadline)
        .and_then(|peers| map(context, limits.agreement.layout, shared, rank, peers, align, deadline));
    let step = Step::new(number::MAP, rank);
    let mut workspace = match ballot.cast(step, "mapping shared memory", local)? {
        Ok((workspace, _)) => workspace,
        Err(declined) => return Ok(Err(declined)),
    };
    drop(kept);

    let mut kernels = prepared.kernels;
    if domain.multicast {
        let module = prepared.module;
        let parts = multicast::Parts { context, domain: &domain, desk: desk.as_ref(), module, align, deadline };
        match multicast::join(&mut ballot, &parts, &mut workspace)? {
            Some(joined) => {
                prepared.capacity = prepared.capacity.min(joined.resident_per_sm().saturating_mul(prepared.sms));
                kernels = joined;
            }
            None => {
                // What is worth a kernel is another matter now; the windows stay as they are.
                domain.multicast = false;
                let layout = limits.agreement.layout;
                limits = limits_in(&domain, config, blocks, layout);
            }
        }
    }
    drop(desk);

    let Limits { agreement, world, row } = limits;
    // A workspace that failed stays until all have spoken: peers' kernels may still store into it.
    let (local, failed) = match known_answer::check(context, workspace, kernels, agreement, rank, deadline) {
        Ok(Ok(checked)) => (Ok(checked), None),
        Ok(Err((workspace, error))) => (reason(Decline::KnownAnswer)(error), Some(workspace)),
        Err(error) => (reason(Decline::KnownAnswer)(error), None),
    };
    let step = Step { optional: ballot.exchange.non_blocking(), ..Step::new(number::KNOWN_ANSWER, rank) };
    let checked = ballot.cast(step, "the known-answer AllReduce", local)?;
    drop(failed);
    let (Checked { workspace, kernels, last }, steps) = match checked {
        Ok(passed) => passed,
        Err(declined) => return Ok(Err(declined)),
    };
    Ok(Ok(Established {
        agreement,
        kernels,
        workspace,
        last,
        hosts: domain.hosts,
        window_bytes,
        world,
        row,
        tuned: domain.tuned,
        handle: domain.handle,
        capacity: prepared.capacity,
        memory: prepared.memory,
        non_blocking: steps.iter().any(|step| step.optional),
    }))
}

struct Prepared {
    granularity: u64,
    /// The granularity is one of multicast too.
    multicast: bool,
    blocks: u32,
    /// Multiprocessors of the device.
    sms: u32,
    capacity: u32,
    memory: Memory,
    module: Arc<Module>,
    kernels: Kernels,
}

/// Looks at links, fabric and kernels: everything that can say no before memory is taken.
fn prepare(context: &Arc<Context>, domain: &Domain, rank: u32, config: &Config, deadline: Duration) -> Local<Prepared> {
    probe::links(domain, rank, config, deadline)?;
    let device = context.device().ordinal();
    if domain.handle == HandleType::Fabric {
        let context = Arc::clone(context);
        bounded("probing a fabric handle", deadline, move || crate::workspace::probe_fabric(&context))
            .or_else(reason(Decline::FabricHandle))?;
    }
    let ranks = domain.facts.len() as u32;
    let sms = domain.facts[rank as usize].blocks;
    let handle = domain.handle;
    let of_kernels = Arc::clone(context);
    let of_config = config.clone();
    let (granularity, blocks, all_sms, module, kernels) = bounded("loading the kernels", deadline, move || {
        let module = load_all(&of_kernels, &of_config)?;
        let kernels = module.kernels(ranks, false, false)?;
        let resident = kernels.resident_per_sm().saturating_mul(sms);
        if resident == 0 {
            return Err(Error::Bug("no block of a kernel fits a multiprocessor"));
        }
        let granularity = crate::driver::granularity(&of_kernels, handle)?;
        Ok((granularity, sms.min(resident), of_kernels.device().sms()?, module, kernels))
    })
    .or_else(reason(Decline::Module))?;
    let whole = limits(domain, config, u32::MAX, u64::MAX)
        .ok_or((Decline::TooManyRanks, Error::Protocol("a window has no address range")))?;
    let full = whole.agreement.layout.window_bytes().next_multiple_of(granularity);
    let budget = config.memory.unwrap_or_else(|| MEMORY.max(full.saturating_mul(16)));
    let memory = Memory::take(device, full, granularity, budget)
        .ok_or((Decline::Memory, Error::Protocol("the budget of memory is used up")))?;
    let capacity = kernels.resident_per_sm().saturating_mul(all_sms);
    let (multicast, sms) = (false, all_sms);
    let mut prepared = Prepared { granularity, multicast, blocks, sms, capacity, memory, module, kernels };
    if domain.multicast {
        // A step of its own: what fails or blocks here is lost for multicast only.
        let (context, bytes) = (Arc::clone(context), prepared.granularity);
        let asked = bounded("asking for the granularity of multicast", deadline, move || {
            multicast_granularity(&context, ranks, bytes, handle)
        });
        match asked {
            Ok(granularity) => {
                prepared.granularity = prepared.granularity.max(granularity);
                prepared.multicast = true;
            }
            Err(error) => trace!(device, "multicast: {error}"),
        }
    }
    Ok(prepared)
}

/// The rank whose tuning file keeps all ranks from using theirs says so, once in a process.
fn say_tuned(domain: &Domain, rank: u32, config: &Config, device: i32) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if domain.tuned != (Tuned::Ignored { rank }) || SAID.swap(true, Ordering::Relaxed) {
        return;
    }
    match &config.tuning {
        Some(Err(why)) => warning!(device, "{why}: no rank uses a tuning file"),
        Some(Ok(_)) => warning!(device, "TWOSHOT_TUNING_FILE differs from rank 0's: no rank uses a tuning file"),
        None => warning!(device, "TWOSHOT_TUNING_FILE is not set on rank {rank}: no rank uses a tuning file"),
    }
}

/// Most memory of the windows of all communicators of a process on one device, unless 16 windows are more.
const MEMORY: u64 = 512 << 20;

fn share(
    context: &Arc<Context>,
    bytes: u64,
    handle: HandleType,
    ranks: u32,
    deadline: Duration,
) -> Local<(Own, Option<Desk>)> {
    let context = Arc::clone(context);
    let own =
        bounded("allocating shared memory", deadline, move || allocate(&context, bytes, handle)).or_else(|error| {
            let export = matches!(&error, Error::Driver { call, .. } if call.contains("Export"));
            reason(if export { Decline::Export } else { Decline::Allocate })(error)
        })?;
    let desk = match handle {
        HandleType::Fd => Some(Desk::open(ranks).or_else(reason(Decline::Handoff))?),
        HandleType::Fabric => None,
    };
    Ok((own, desk))
}

/// Gets every peer's handle, `None` at this rank.
fn collect(
    own: &Own,
    desk: Option<&Desk>,
    rank: u32,
    steps: &[Step],
    deadline: Duration,
) -> Local<Vec<Option<PeerHandle>>> {
    let Some(desk) = desk else {
        let name = |step: &Step| (step.rank != rank).then_some(PeerHandle::Fabric(step.fabric));
        return Ok(steps.iter().map(name).collect());
    };
    let Shareable::Fd(fd) = &own.handle else {
        return Err((Decline::Export, Error::Bug("a descriptor domain without a descriptor")));
    };
    let peers: Vec<_> = steps.iter().filter(|step| step.rank != rank).map(peer).collect();
    let fds =
        desk.trade(rank, 0, Some((fd.as_fd(), peers.len())), &peers, deadline).or_else(reason(Decline::Handoff))?;
    let mut fds = fds.into_iter();
    Ok(steps.iter().map(|step| if step.rank == rank { None } else { fds.next().map(PeerHandle::Fd) }).collect())
}

fn peer(step: &Step) -> Peer {
    Peer { rank: step.rank, name: step.socket, token: step.token }
}

fn map(
    context: &Arc<Context>,
    layout: Layout,
    own: Own,
    rank: u32,
    peers: Vec<Option<PeerHandle>>,
    align: u64,
    deadline: Duration,
) -> Local<Workspace> {
    let context = Arc::clone(context);
    bounded("mapping shared memory", deadline, move || {
        Workspace::map(&context, &layout, own, rank as usize, peers, align)
    })
    .or_else(|error| {
        let import = matches!(&error, Error::Driver { call, .. } if call.contains("Import"));
        let fill = matches!(&error, Error::Driver { call, .. } if call.contains("Memset") || call.contains("Stream"));
        reason(if import {
            Decline::Import
        } else if fill {
            Decline::Prepare
        } else {
            Decline::Map
        })(error)
    })
}

/// Loads the code of every kernel that a communicator of this device could pick, once in the life of its context. A
/// device of another architecture than those the kernels were compiled for is left alone: compiling for it takes long,
/// and its GPUs may not even be connected.
pub fn preload(device: i32, config: &Config) {
    if !config.enable {
        return;
    }
    let load = || {
        let device = Device::new(device)?;
        if Module::compiled_for(device.arch()?) {
            load_all(&Context::retain(device)?, config)?;
        }
        Ok::<(), Error>(())
    };
    if let Err(error) = load() {
        trace!(device, "loading the kernels early: {error}");
    }
}

/// The kernels, every one of them loaded: those of communicators to come as well, since nothing is to be loaded once
/// kernels wait for peers.
fn load_all(context: &Arc<Context>, config: &Config) -> Result<Arc<Module>> {
    let module = Module::load(context)?;
    module.complete(config.multicast && context.device().multicast(), config.switch_reduce)?;
    Ok(module)
}

/// The context of a communicator's device.
pub fn context(device: i32) -> Result<Arc<Context>> {
    Context::retain(Device::new(device)?)
}
