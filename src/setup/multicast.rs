//! Joining the ranks' windows by a part of a multicast object. Optional throughout: any failure on any rank means
//! unicast for all of them, never an error and never a refusal of the communicator, and nothing for the other
//! communicators that use the object.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::objects::{self, Place};
use super::{Ballot, number, peer};
use crate::domain::Domain;
use crate::driver::{
    AllAdded, BarrierPassed, Claim, Context, Created, Division, Imported, Kernels, Module, MulticastObject, Shareable,
    Slot, multicast_granularity,
};
use crate::error::{Error, Result};
use crate::exchange::vote;
use crate::handoff::{Desk, random};
use crate::steps::bounded;
use crate::trace;
use crate::wire::Step;
use crate::workspace::Workspace;

/// What stays the same through the steps.
pub struct Parts<'a> {
    /// Context of this rank's device.
    pub context: &'a Arc<Context>,
    /// The ranks.
    pub domain: &'a Domain,
    /// Where descriptors are passed, on one host.
    pub desk: Option<&'a Desk>,
    /// The loaded kernels.
    pub module: Arc<Module>,
    /// Alignment of windows.
    pub align: u64,
    /// Deadline of one step.
    pub deadline: Duration,
}

/// Where a communicator's part comes from.
enum Source {
    /// A new object, and its identity.
    New(MulticastObject<AllAdded>, u64),
    /// An object that other communicators use too.
    Shared(Claim),
}

impl Parts<'_> {
    fn note(&self, what: &str, error: &Error) {
        trace!(self.context.device().ordinal(), "multicast: {what}: {error}");
    }
}

/// Goes through the multicast steps, each behind a vote of its own. `Some` where all ranks joined: the kernels that
/// push through the multicast address, which the workspace then has.
pub fn join(ballot: &mut Ballot<'_>, parts: &Parts<'_>, workspace: &mut Workspace) -> Result<Option<Kernels>> {
    let (rank, ranks) = (ballot.exchange.rank(), ballot.exchange.ranks());
    let division = Division::into_parts_of(workspace.window_bytes());
    let place = Place::of(parts.domain, rank, workspace.window_bytes());

    // Every rank says which objects it has for these ranks, and that its driver can carry one. The granularity was
    // asked for before, to size the window; here it counts that there was no answer, or another one.
    let (context, handle) = (Arc::clone(parts.context), parts.domain.handle);
    let carried = bounded("asking for the granularity of multicast", parts.deadline, move || {
        let granularity = multicast_granularity(&context, ranks, division.bytes(), handle)?;
        let fits = division.part_bytes().is_multiple_of(granularity);
        if fits { Ok(()) } else { Err(Error::Protocol("the window is no multiple of the multicast granularity")) }
    });
    if let Err(error) = &carried {
        parts.note("asking for the granularity", error);
    }
    let known = objects::known(&place);
    let mut step = Step::new(number::MULTICAST_FIND, rank);
    (step.optional, step.offers) = (carried.is_ok(), objects::offers(&known));
    let Some(steps) = unanimous(ballot, step, "looking for a multicast object")? else { return Ok(None) };

    let source = match objects::agree(&steps) {
        Some((id, part)) => {
            let object = known.iter().find(|known| known.id == id);
            // Another communicator of this process, set up at the same time, may have been faster.
            let claim = object.and_then(|known| known.object.claim(part));
            claim.map(Source::Shared).ok_or(Error::Protocol("another communicator took the part"))
        }
        None => match create(ballot, parts, division)? {
            Some((object, id)) => Ok(Source::New(object, id)),
            None => return Ok(None),
        },
    };
    drop(known);
    bind(ballot, parts, workspace, place, source)
}

/// A new object with every rank's device: rank 0 creates it, the others open it, each adds its device.
fn create(
    ballot: &mut Ballot<'_>,
    parts: &Parts<'_>,
    division: Division,
) -> Result<Option<(MulticastObject<AllAdded>, u64)>> {
    let (rank, ranks) = (ballot.exchange.rank(), ballot.exchange.ranks());
    // Every rank must have a slot left for it.
    let mut slot = Slot::take(parts.context);
    let mut step = Step::new(number::MULTICAST_CREATE, rank);
    if let Some(desk) = parts.desk {
        (step.socket, step.token) = (desk.name, desk.token);
    }
    let mut created = None;
    if rank == 0
        && let Some(slot) = slot.take()
    {
        let (context, handle) = (Arc::clone(parts.context), parts.domain.handle);
        let result = bounded("creating a multicast object", parts.deadline, move || {
            let [a, b, c, d, e, f, g, h, ..] = random()?;
            let object = MulticastObject::create(&context, ranks, division, handle, slot)?;
            let shareable = object.export(handle)?;
            Ok((object, shareable, u64::from_le_bytes([a, b, c, d, e, f, g, h]).max(1)))
        });
        match result {
            Ok((object, shareable, id)) => {
                if let Shareable::Fabric(name) = &shareable {
                    step.fabric = *name;
                }
                step.offers[0].id = id;
                created = Some((object, shareable));
            }
            Err(error) => parts.note("creating the object", &error),
        }
    }
    step.optional = created.is_some() || slot.is_some();
    let Some(steps) = unanimous(ballot, step, "creating a multicast object")? else { return Ok(None) };
    let id = steps.first().map_or(0, |owner| owner.offers[0].id);

    let added = open_and_add(parts, rank, division, (created, slot), &steps);
    if let Err(error) = &added {
        parts.note("adding the device", error);
    }
    let step = Step { optional: added.is_ok(), ..Step::new(number::MULTICAST_ADD, rank) };
    let unanimously = unanimous(ballot, step, "adding devices to the multicast object")?;
    let (Some(_), Ok(object)) = (unanimously, added) else { return Ok(None) };
    Ok(Some((object.all_added(BarrierPassed::all_devices_added()), id)))
}

/// Every rank binds its window to the part and loads the kernels that use it.
fn bind(
    ballot: &mut Ballot<'_>,
    parts: &Parts<'_>,
    workspace: &mut Workspace,
    place: Place,
    source: Result<Source>,
) -> Result<Option<Kernels>> {
    let (rank, ranks) = (ballot.exchange.rank(), ballot.exchange.ranks());
    let new = source.as_ref().ok().and_then(|source| match source {
        Source::New(_, id) => Some(*id),
        Source::Shared(_) => None,
    });
    let (memory, module, align) = (workspace.own_memory(), Arc::clone(&parts.module), parts.align);
    let switch = parts.domain.switch_reduce;
    let bound = source.and_then(|source| {
        bounded("binding memory to the multicast object", parts.deadline, move || {
            let claim = match source {
                Source::New(object, _) => object.map(align)?.claim(0).ok_or(Error::Bug("a new object has no part"))?,
                Source::Shared(claim) => claim,
            };
            let part = claim.bind(&memory)?;
            let kernels = module.kernels(ranks, true, switch)?;
            // The block budget stands: at most one block on each multiprocessor, if one fits.
            if kernels.resident_per_sm() == 0 {
                return Err(Error::Bug("no block of a multicast kernel fits a multiprocessor"));
            }
            Ok((part, kernels))
        })
    });
    if let Err(error) = &bound {
        parts.note("binding", error);
    }
    let step = Step { optional: bound.is_ok(), ..Step::new(number::MULTICAST_BIND, rank) };
    match (unanimous(ballot, step, "binding memory to the multicast object")?, bound) {
        (Some(_), Ok((part, kernels))) => {
            if let Some(id) = new {
                objects::keep(place, id, part.object());
            }
            workspace.join_multicast(part);
            Ok(Some(kernels))
        }
        _ => Ok(None),
    }
}

/// A vote on an optional part: the steps where every rank managed it, `None` where one did not.
fn unanimous(ballot: &mut Ballot<'_>, step: Step, name: &'static str) -> Result<Option<Vec<Step>>> {
    let steps = vote(ballot.exchange, step, name)?;
    // Nobody refuses in these votes; a foreign blob would be the only reason and ends multicast too.
    Ok(steps.ok().filter(|steps| steps.iter().all(|step| step.optional)))
}

/// What a rank brings: the object it created, or a slot for the one it opens.
type Brought = (Option<(MulticastObject<Created>, Shareable)>, Option<Slot>);

fn open_and_add(
    parts: &Parts<'_>,
    rank: u32,
    division: Division,
    (created, slot): Brought,
    steps: &[Step],
) -> Result<MulticastObject<Created>> {
    let owner = steps.first().ok_or(Error::Bug("a vote without ranks"))?;
    let (own, given) = created.unzip();
    let received = match (parts.desk, &given) {
        (None, _) => None,
        (Some(desk), Some(Shareable::Fd(fd))) => {
            desk.trade(rank, 1, Some((fd.as_fd(), steps.len() - 1)), &[], parts.deadline)?;
            None
        }
        (Some(desk), _) => desk.trade(rank, 1, None, &[peer(owner)], parts.deadline)?.pop(),
    };
    let (context, name) = (Arc::clone(parts.context), owner.fabric);
    bounded("adding a device to the multicast object", parts.deadline, move || {
        let object = match (own, slot) {
            (Some(own), _) => own,
            (None, Some(slot)) => {
                let from = received.as_ref().map_or(Imported::Fabric(&name), |fd| Imported::Fd(fd.as_fd()));
                MulticastObject::import(&context, division, from, slot)?
            }
            (None, None) => return Err(Error::Bug("a rank without a slot passed the vote")),
        };
        object.add_device()?;
        Ok(object)
    })
}
