//! Groups: nothing of ours is launched before the outermost `ncclGroupEnd`, and a communicator whose first collective
//! is in a group is set up at that end.
//!
//! **Order.** Routed calls that come before anything stock NCCL got in this group are launched before stock's own end
//! of the group, all others behind it, so that what a stream sees is the order of the calls as far as a group has one.
//! NCCL wants the same collectives of a communicator in a group on every rank, so every rank arrives at the same order.
//! Send and receive are no part of that order: which of them a rank has, and where, is its own matter.
//!
//! **Set-up.** Where a communicator is new, its calls are held back: its first collective may come in this group.
//! At the end of the group every such communicator is set up, each on a thread of its own: a program whose one thread
//! drives all GPUs has all ranks in the group, and none of them can be set up alone. On those threads no group is open,
//! so the exchange through stock NCCL runs at once. Then the held calls are made. Those of non-blocking communicators are
//! made on another thread, in a group of their own (`deferred.rs`).

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

use super::collectives::{
    Arguments, Placement, before_stock, behind_stock, fault_or_launch, in_order, place, set_up_all,
};
use super::deferred::{self, First, defers, refused};
use super::operations::destroy_now;
use super::order::behind_earlier_stock_in_group;
use super::{Code, absent, code, guard, inside, stock, transparent};
use crate::call::ReduceOp;
use crate::comm::{Communicator, State};
use crate::driver::{RawStream, capturing};
use crate::intercept::{Comm, Functions, Stock};
use crate::route::Plan;

/// A routed call that waits for the end of the group.
struct Routed {
    communicator: Arc<Communicator>,
    plan: Plan,
    arguments: Arguments,
}

/// A call on a communicator that is set up at the end of the group.
struct Held {
    communicator: Arc<Communicator>,
    comm: Comm,
    stream: RawStream,
    /// Stock NCCL had nothing of this group before it.
    early: bool,
    collective: bool,
    /// It is made on a thread of its own: its communicator does not block.
    defers: bool,
    call: Box<dyn FnOnce() -> Code>,
}

/// A communicator that stock NCCL has calls of in this group, and a stream they are on.
struct Touched {
    communicator: Arc<Communicator>,
    comm: Comm,
    stream: RawStream,
    /// A collective is among them.
    collective: bool,
}

#[derive(Default)]
struct Group {
    /// To be launched before stock's end of the group.
    before: Vec<Routed>,
    /// To be launched behind it.
    behind: Vec<Routed>,
    held: Vec<Held>,
    /// The held call that is being made was early.
    early: bool,
    /// Operations that were destroyed while calls that use them are held.
    operations: Vec<(c_int, Comm)>,
    /// What stock NCCL has.
    touched: Vec<Touched>,
    /// Stock NCCL refused a call: it will run none of this group.
    refused: bool,
    /// What a call was refused with here.
    error: Option<Code>,
}

impl Group {
    fn touches(&self, comm: Comm) -> bool {
        self.touched.iter().any(|touched| touched.comm == comm)
    }

    /// Whether stock NCCL has a collective of this communicator, or of any.
    fn has_collective(&self, comm: Option<Comm>) -> bool {
        self.touched.iter().any(|touched| touched.collective && comm.is_none_or(|comm| comm == touched.comm))
    }
}

thread_local! {
    /// Open groups of this thread.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// This thread makes the calls that were held for non-blocking communicators.
    static OWN: Cell<bool> = const { Cell::new(false) };
    static GROUP: RefCell<Group> = RefCell::new(Group::default());
}

/// Whether this thread has a group open. A thread that is ending is left to stock NCCL.
pub(super) fn open() -> bool {
    DEPTH.try_with(|depth| depth.get() > 0).unwrap_or(false)
}

/// Works on this thread's group; `otherwise` where the thread is ending.
fn with<T>(otherwise: T, work: impl FnOnce(&mut Group) -> T) -> T {
    GROUP
        .try_with(|group| group.try_borrow_mut().map(|mut group| work(&mut group)).ok())
        .ok()
        .flatten()
        .unwrap_or(otherwise)
}

/// Whether a call on this communicator has to wait until the end of the group: something on it waits already, or it is
/// new and its set-up may come at this end. Stock NCCL must have nothing of it then: the exchange would start it.
fn waits(communicator: &Communicator, comm: Comm, stream: RawStream) -> bool {
    let (held, touched) =
        with((false, true), |group| (group.held.iter().any(|held| held.comm == comm), group.touches(comm)));
    held || (!touched && matches!(communicator.state(), State::New) && !capturing(stream))
}

fn hold(
    communicator: &Arc<Communicator>,
    (comm, stream): (Comm, RawStream),
    collective: bool,
    call: Box<dyn FnOnce() -> Code>,
) -> Code {
    let communicator = Arc::clone(communicator);
    with((), |group| {
        let early = !group.has_collective(None);
        let defers = defers(&communicator, stream);
        group.held.push(Held { communicator, comm, stream, early, collective, defers, call });
    });
    code::SUCCESS
}

/// Hands a call of this group to stock NCCL.
fn forward(
    stock: &Stock,
    communicator: &Arc<Communicator>,
    (comm, stream): (Comm, RawStream),
    collective: bool,
    call: impl FnOnce() -> Code,
) -> Code {
    // Later it could not be asked any more; and what it has of this group is on streams that live.
    if !with(false, |group| group.touches(comm))
        && let Err(code) = behind_earlier_stock_in_group(stock, communicator, comm, stream)
    {
        return code;
    }
    let result = call();
    with((), |group| {
        match group.touched.iter_mut().find(|touched| (touched.comm, touched.stream) == (comm, stream)) {
            Some(touched) => touched.collective |= collective,
            None => group.touched.push(Touched { communicator: Arc::clone(communicator), comm, stream, collective }),
        }
        group.refused |= result != code::SUCCESS && result != code::IN_PROGRESS;
    });
    result
}

/// A call on a communicator whose first call is under way: refused, and the group with it.
fn refuse(communicator: &Communicator) -> Option<Code> {
    // The thread of a first call makes it.
    if OWN.try_with(Cell::get).unwrap_or(false) {
        return None;
    }
    let refused = refused(communicator)?;
    with((), |group| (group.refused, group.error) = (true, Some(refused)));
    Some(refused)
}

/// A call inside a group that is stock NCCL's whatever happens.
pub(super) fn pass(
    stock: &'static Stock,
    communicator: &Arc<Communicator>,
    (comm, stream): (Comm, RawStream),
    collective: bool,
    call: impl FnOnce() -> Code + 'static,
) -> Code {
    if let Some(refused) = refuse(communicator) {
        return refused;
    }
    if waits(communicator, comm, stream) {
        let own = Arc::clone(communicator);
        let call = Box::new(move || forward(stock, &own, (comm, stream), collective, call));
        return hold(communicator, (comm, stream), collective, call);
    }
    forward(stock, communicator, (comm, stream), collective, call)
}

/// An AllReduce inside a group.
pub(super) fn all_reduce(stock: &'static Stock, communicator: Arc<Communicator>, arguments: Arguments) -> Code {
    let stream = RawStream(arguments.stream as usize);
    if let Some(refused) = refuse(&communicator) {
        return refused;
    }
    if waits(&communicator, arguments.comm, stream) {
        let own = Arc::clone(&communicator);
        let call = Box::new(move || queue(stock, own, arguments));
        return hold(&communicator, (arguments.comm, stream), true, call);
    }
    queue(stock, communicator, arguments)
}

fn queue(stock: &Stock, communicator: Arc<Communicator>, arguments: Arguments) -> Code {
    match place(&communicator, &arguments) {
        Placement::Routed(plan) => {
            let stream = RawStream(arguments.stream as usize);
            // What stock NCCL already has of the communicator would be started by its own mark; and is on a stream that lives.
            if !with(false, |group| group.touches(arguments.comm))
                && let Err(code) = behind_earlier_stock_in_group(stock, &communicator, arguments.comm, stream)
            {
                return code;
            }
            let behind_stock = !matches!(communicator.state(), State::Ready(ready) if ready.non_blocking_somewhere());
            let routed = Routed { communicator, plan, arguments };
            with((), |group| {
                // Stock NCCL starts a non-blocking communicator's group in its own time: nothing can be put behind it. On a
                // rank that blocks it could, but then the ranks' orders would differ.
                let early = !group.has_collective(None) || (group.early && !group.has_collective(Some(arguments.comm)));
                let behind = behind_stock && !early;
                if behind { &mut group.behind } else { &mut group.before }.push(routed);
            });
            code::SUCCESS
        }
        Placement::Stock(_) => {
            let stream = RawStream(arguments.stream as usize);
            forward(stock, &communicator, (arguments.comm, stream), true, || arguments.to_stock(stock))
        }
        Placement::Failed(failed) => failed,
    }
}

/// The communicators that collectives are held for.
fn firsts(held: &[Held]) -> Vec<First> {
    let mut firsts: Vec<First> = Vec::new();
    for Held { communicator, comm, stream, .. } in held.iter().filter(|held| held.collective) {
        if !firsts.iter().any(|first| first.comm == *comm) {
            firsts.push(First { communicator: Arc::clone(communicator), comm: *comm, stream: *stream });
        }
    }
    firsts
}

/// Makes held calls. The first code that is no success is the group's.
fn make_held(held: Vec<Held>) -> Code {
    let mut result = code::SUCCESS;
    for one in held {
        with((), |group| group.early = one.early);
        let made = (one.call)();
        if result == code::SUCCESS && made != code::IN_PROGRESS {
            result = made;
        }
    }
    result
}

/// Lets the calls that are held for non-blocking communicators be made later, in a group of their own.
fn defer(stock: &'static Stock, held: Vec<Held>, operations: &[(c_int, Comm)]) -> Code {
    let firsts = firsts(&held);
    for First { communicator, comm, .. } in &firsts {
        communicator.deferral.begin();
        for (op, _) in operations.iter().filter(|(_, of)| of == comm) {
            communicator.deferral.lay_aside(ReduceOp(*op));
        }
    }
    let calls = move || {
        // SAFETY: takes nothing.
        let started = unsafe { (stock.nccl.group_start)() };
        if started != code::SUCCESS {
            return started;
        }
        let _ = DEPTH.try_with(|depth| depth.set(1));
        let _ = OWN.try_with(|own| own.set(true));
        let made = make_held(held);
        let ended = end(stock);
        let _ = OWN.try_with(|own| own.set(false));
        if made == code::SUCCESS { ended } else { made }
    };
    deferred::start(stock, firsts, Box::new(calls))
}

fn launch(routed: &mut Vec<Routed>, result: &mut Code) {
    for Routed { communicator, plan, arguments } in routed.drain(..) {
        let launched = fault_or_launch(&communicator, plan, &arguments);
        if *result == code::SUCCESS {
            *result = launched;
        }
    }
}

/// The outermost end of a group.
fn end(stock: &'static Stock) -> Code {
    let mut ours = with(None, |group| group.error).unwrap_or(code::SUCCESS);
    let held = with(Vec::new(), |group| std::mem::take(&mut group.held));
    let mut later = None;
    if !held.is_empty() {
        let operations = with(Vec::new(), |group| std::mem::take(&mut group.operations));
        let later_on: Vec<Comm> =
            held.iter().filter(|held| held.collective && held.defers).map(|held| held.comm).collect();
        let (deferring, now): (Vec<_>, Vec<_>) = held.into_iter().partition(|held| later_on.contains(&held.comm));
        if !now.is_empty() {
            let ready = set_up_all(stock, &firsts(&now));
            let made = make_held(now);
            for result in [ready, made] {
                ours = if ours == code::SUCCESS { result } else { ours };
            }
        }
        let (after, now): (Vec<_>, Vec<_>) =
            operations.into_iter().partition(|(_, comm)| deferring.iter().any(|held| held.comm == *comm));
        for (op, comm) in now {
            destroy_now(stock, op, comm);
        }
        later = Some((deferring, after));
    }
    let mut group = with(Group::default(), std::mem::take);
    // On their own thread these are under way before anything here may wait.
    let mut deferred = false;
    if let Some((held, operations)) = later {
        if held.is_empty() || group.refused {
            for (op, comm) in operations {
                destroy_now(stock, op, comm);
            }
        } else {
            deferred = defer(stock, held, &operations) == code::IN_PROGRESS;
        }
    }
    let result = run(stock, &mut group, ours);
    // Its memory serves the next group.
    group.touched.clear();
    (group.early, group.refused, group.error) = (false, false, None);
    with((), |idle| *idle = group);
    if deferred && result == code::SUCCESS { code::IN_PROGRESS } else { result }
}

/// What the group has: ours, stock NCCL's, and ours behind it.
fn run(stock: &'static Stock, group: &mut Group, mut ours: Code) -> Code {
    let Group { before, behind, touched, refused, .. } = group;
    // What stock NCCL refuses as a whole is refused as a whole.
    if *refused {
        before.clear();
        behind.clear();
    }
    launch(before, &mut ours);
    for Touched { communicator, stream, .. } in touched.iter() {
        if let (code::SUCCESS, Err(failed)) = (ours, before_stock(communicator, *stream)) {
            ours = failed;
        }
    }
    let _ = DEPTH.try_with(|depth| depth.set(0));
    // SAFETY: takes nothing.
    let result = inside(|nccl| unsafe { (nccl.group_end)() }, stock);
    if result != code::SUCCESS && result != code::IN_PROGRESS {
        behind.clear();
        return result;
    }
    let late = result == code::IN_PROGRESS;
    for Touched { communicator, stream, .. } in touched.iter() {
        if let (code::SUCCESS, Err(failed)) = (ours, behind_stock(communicator, *stream, late)) {
            ours = failed;
        }
    }
    launch(behind, &mut ours);
    if ours == code::SUCCESS { result } else { ours }
}

/// Closes one group by what `last` does at the outermost one, else by `close`.
fn close(stock: &'static Stock, close: impl FnOnce(&Functions) -> Code, last: impl FnOnce() -> Option<Code>) -> Code {
    if !transparent() {
        match DEPTH.try_with(Cell::get).unwrap_or(0) {
            0 => {}
            1 => {
                if let Some(result) = last() {
                    return result;
                }
                let _ = DEPTH.try_with(|depth| depth.set(0));
            }
            more => {
                let _ = DEPTH.try_with(|depth| depth.set(more - 1));
            }
        }
    }
    inside(close, stock)
}

/// # Safety
/// None; `unsafe` only because it is called from C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupStart() -> Code {
    guard(|| match stock() {
        Ok(stock) => {
            // SAFETY: takes nothing.
            let result = unsafe { (stock.nccl.group_start)() };
            if result == code::SUCCESS && !transparent() {
                let _ = DEPTH.try_with(|depth| depth.set(depth.get() + 1));
            }
            result
        }
        Err(code) => code,
    })
}

/// # Safety
/// None; `unsafe` only because it is called from C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupEnd() -> Code {
    guard(|| match stock() {
        // SAFETY: takes nothing.
        Ok(stock) => close(stock, |nccl| unsafe { (nccl.group_end)() }, || Some(end(stock))),
        Err(code) => code,
    })
}

/// # Safety
/// As for this function in NCCL. It closes a group without running it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupSimulateEnd(info: *mut c_void) -> Code {
    guard(|| match stock() {
        Ok(stock) => {
            let simulate = |nccl: &Functions| {
                // SAFETY: the caller's own argument.
                let result = nccl.group_simulate_end.map(|end| unsafe { end(info) });
                result.unwrap_or_else(|| absent("ncclGroupSimulateEnd"))
            };
            close(stock, simulate, || {
                for (op, comm) in with(Group::default(), std::mem::take).operations {
                    destroy_now(stock, op, comm);
                }
                None
            })
        }
        Err(code) => code,
    })
}

/// Whether an operation has to outlive the end of this thread's group: stock NCCL has forgotten it by then, held calls
/// still need it.
pub(super) fn destroys_later(op: c_int, comm: Comm) -> bool {
    open()
        && with(false, |group| {
            let used = group.held.iter().any(|held| held.comm == comm);
            if used {
                group.operations.push((op, comm));
            }
            used
        })
}

macro_rules! point_to_point {
    ($($name:ident = $field:ident ($buffer:ty);)*) => {
        $(
            /// # Safety
            /// As for the function of this name in NCCL: every argument is passed on untouched.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(
                buffer: $buffer,
                count: usize,
                dtype: c_int,
                peer: c_int,
                comm: Comm,
                stream: *mut c_void,
            ) -> Code {
                guard(|| match stock() {
                    Ok(stock) => {
                        // SAFETY: the caller's own arguments.
                        let call = move || unsafe { (stock.nccl.$field)(buffer, count, dtype, peer, comm, stream) };
                        if comm.is_null() || transparent() {
                            return call();
                        }
                        let stream = RawStream(stream as usize);
                        if open() {
                            return pass(stock, &crate::comm::find(comm as usize), (comm, stream), false, call);
                        }
                        match crate::comm::known(comm as usize) {
                            Some(communicator) if refused(&communicator).is_some() => code::ARGUMENT,
                            Some(communicator) => in_order(&communicator, stream, call),
                            None => call(),
                        }
                    }
                    Err(code) => code,
                })
            }
        )*
    };
}

point_to_point! {
    ncclSend = send(*const c_void);
    ncclRecv = recv(*mut c_void);
}

/// Names and addresses for the call slots.
pub(super) fn targets() -> Vec<(&'static CStr, *const c_void)> {
    vec![
        (c"ncclGroupStart", ncclGroupStart as *const c_void),
        (c"ncclGroupEnd", ncclGroupEnd as *const c_void),
        (c"ncclGroupSimulateEnd", ncclGroupSimulateEnd as *const c_void),
        (c"ncclSend", ncclSend as *const c_void),
        (c"ncclRecv", ncclRecv as *const c_void),
    ]
}
