//! Joining the ranks' windows by a multicast object. Optional throughout: any failure on any rank means unicast for
//! all of them, never an error and never a refusal of the communicator.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::{Ballot, number, peer};
use crate::domain::Domain;
use crate::driver::{
    BarrierPassed, Context, Created, Imported, Kernels, Mapping, Module, MulticastObject, Reservation, Shareable, Slot,
    multicast_granularity,
};
use crate::error::{Error, Result};
use crate::exchange::vote;
use crate::handoff::Desk;
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

/// Goes through the multicast steps, each behind a vote of its own. `Some` where all ranks joined: the kernels that
/// push through the multicast address, which the workspace then has.
pub fn join(ballot: &mut Ballot<'_>, parts: &Parts<'_>, workspace: &mut Workspace) -> Result<Option<Kernels>> {
    let (rank, ranks) = (ballot.exchange.rank(), ballot.exchange.ranks());
    let device = ballot.device;
    let note = |what: &str, error: &Error| trace!(device, "multicast: {what}: {error}");
    let bytes = workspace.window_bytes();
    let handle = parts.domain.handle;

    // Rank 0 creates the object; every rank must have a slot left for it and a driver that can carry it. The
    // granularity was asked for before, to size the window; here it counts that there was no answer, or another one.
    let slot = Slot::take();
    let context = Arc::clone(parts.context);
    let carried = bounded("asking for the granularity of multicast", parts.deadline, move || {
        let granularity = multicast_granularity(&context, ranks, bytes, handle)?;
        let fits = bytes.is_multiple_of(granularity);
        if fits { Ok(()) } else { Err(Error::Protocol("the window is no multiple of the multicast granularity")) }
    });
    if let Err(error) = &carried {
        note("asking for the granularity", error);
    }
    let able = slot.is_some() && carried.is_ok();
    let mut step = Step::new(number::MULTICAST_CREATE, rank);
    if let Some(desk) = parts.desk {
        (step.socket, step.token) = (desk.name, desk.token);
    }
    let mut created = None;
    if rank == 0 && able {
        let context = Arc::clone(parts.context);
        let result = bounded("creating a multicast object", parts.deadline, move || {
            let object = MulticastObject::create(&context, ranks, bytes, handle)?;
            let shareable = object.export(handle)?;
            Ok((object, shareable))
        });
        match result {
            Ok((object, shareable)) => {
                if let Shareable::Fabric(name) = &shareable {
                    step.fabric = *name;
                }
                created = Some((object, shareable));
            }
            Err(error) => note("creating the object", &error),
        }
    }
    step.optional = able && (rank != 0 || created.is_some());
    let Some(steps) = unanimous(ballot, step, "creating a multicast object")? else { return Ok(None) };
    let Some(slot) = slot else { return Ok(None) };

    // Every rank opens it and adds its device.
    let added = open_and_add(parts, rank, bytes, created, &steps);
    if let Err(error) = &added {
        note("adding the device", error);
    }
    let step = Step { optional: added.is_ok(), ..Step::new(number::MULTICAST_ADD, rank) };
    let unanimously = unanimous(ballot, step, "adding devices to the multicast object")?;
    let (Some(_), Ok(object)) = (unanimously, added) else { return Ok(None) };
    let object = object.all_added(BarrierPassed::all_devices_added());

    // Every rank binds its window, maps the object and loads the kernels that use it.
    let (context, memory, align) = (Arc::clone(parts.context), workspace.own_memory(), parts.align);
    let module = Arc::clone(&parts.module);
    let bound = bounded("binding memory to the multicast object", parts.deadline, move || {
        let bound = Arc::new(object.bind(&memory)?);
        let reservation = Reservation::new(&context, bytes, align)?;
        let mapping: Mapping = bound.map(&reservation, 0)?;
        let kernels = module.kernels(ranks, true)?;
        // The block budget stands: at most one block on each multiprocessor, if one fits.
        if kernels.resident_per_sm() == 0 {
            return Err(Error::Bug("no block of a multicast kernel fits a multiprocessor"));
        }
        Ok((mapping, kernels))
    });
    if let Err(error) = &bound {
        note("binding", error);
    }
    let step = Step { optional: bound.is_ok(), ..Step::new(number::MULTICAST_BIND, rank) };
    match (unanimous(ballot, step, "binding memory to the multicast object")?, bound) {
        (Some(_), Ok((mapping, kernels))) => {
            workspace.join_multicast(mapping, slot);
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

fn open_and_add(
    parts: &Parts<'_>,
    rank: u32,
    bytes: u64,
    created: Option<(MulticastObject<Created>, Shareable)>,
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
        let object = match (own, received) {
            (Some(own), _) => own,
            (None, Some(fd)) => import(&context, bytes, &fd)?,
            (None, None) => MulticastObject::import(&context, bytes, Imported::Fabric(&name))?,
        };
        object.add_device()?;
        Ok(object)
    })
}

fn import(context: &Arc<Context>, bytes: u64, fd: &OwnedFd) -> Result<MulticastObject<Created>> {
    MulticastObject::import(context, bytes, Imported::Fd(fd.as_fd()))
}
