//! The shared memory of one communicator: the only place that knows the order of allocate, export, import, map,
//! fill and bind. Released in the reverse order by the order of the fields.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::driver::{
    Allocation, Args, Context, ControlPage, HandleType, Imported, Mapping, Part, Reservation, Shareable, Stream,
    granularity,
};
use crate::error::{Error, Result};
use crate::layout::{HEADER, Layout};
use crate::route::Agreement;

/// The word that means "nothing has arrived here yet".
pub const SENTINEL: u32 = crate::driver::SENTINEL;

/// This rank's own window before anybody else knows it.
pub struct Own {
    /// The allocation.
    pub memory: Arc<Allocation>,
    /// What peers are given.
    pub handle: Shareable,
}

/// Proves by doing that a fabric handle can be created, exported and imported on this rank, with one granule.
pub fn probe_fabric(context: &Arc<Context>) -> Result<()> {
    let bytes = granularity(context, HandleType::Fabric)?;
    let memory = Allocation::create(context, bytes, HandleType::Fabric)?;
    let Shareable::Fabric(name) = memory.export(HandleType::Fabric)? else {
        return Err(Error::Bug("a fabric export gave a descriptor"));
    };
    Allocation::import(context, bytes, Imported::Fabric(&name)).map(drop)
}

/// Allocates and exports this rank's window of `bytes`.
pub fn allocate(context: &Arc<Context>, bytes: u64, handle: HandleType) -> Result<Own> {
    let memory = Allocation::create(context, bytes, handle)?;
    let handle = memory.export(handle)?;
    Ok(Own { memory, handle })
}

/// A peer's handle as it arrived.
pub enum PeerHandle {
    /// By SCM_RIGHTS.
    Fd(OwnedFd),
    /// Through the exchange.
    Fabric([u8; 64]),
}

/// All ranks' windows, mapped side by side: rank r's window begins at `address + r * stride`.
pub struct Workspace {
    multicast: Option<Part>,
    _windows: Vec<Mapping>,
    /// The page shared with the kernels.
    pub page: ControlPage,
    context: Arc<Context>,
    own: Arc<Allocation>,
    address: u64,
    stride: u64,
}

impl Workspace {
    /// Imports and maps every peer's window (`peers` by rank, `None` at this rank), then arms the own one: the header
    /// zero, all stages filled with the sentinel, and the ring too: no flag has that value. The caller votes before any kernel may run.
    pub fn map(
        context: &Arc<Context>,
        layout: &Layout,
        own: Own,
        rank: usize,
        peers: Vec<Option<PeerHandle>>,
        align: u64,
    ) -> Result<Self> {
        let bytes = own.memory.bytes();
        let total = bytes.checked_mul(peers.len() as u64).ok_or(Error::Bug("windows beyond 64 bits"))?;
        let reservation = Reservation::new(context, total, align)?;
        let mut windows = Vec::with_capacity(peers.len());
        for (at, peer) in (0u64..).zip(&peers) {
            let memory = match peer {
                None => Arc::clone(&own.memory),
                Some(PeerHandle::Fd(fd)) => Allocation::import(context, bytes, Imported::Fd(fd.as_fd()))?,
                Some(PeerHandle::Fabric(name)) => Allocation::import(context, bytes, Imported::Fabric(name))?,
            };
            windows.push(Mapping::new(&reservation, at * bytes, &memory)?);
        }
        let page = ControlPage::new(context)?;
        let workspace = Self {
            multicast: None,
            address: reservation.address(),
            _windows: windows,
            page,
            context: Arc::clone(context),
            own: own.memory,
            stride: bytes,
        };
        workspace.arm(layout, rank)?;
        Ok(workspace)
    }

    fn arm(&self, layout: &Layout, rank: usize) -> Result<()> {
        let _entered = self.context.enter()?;
        let window = self._windows.get(rank).ok_or(Error::Bug("no own window"))?;
        let stream = Stream::new(&self.context)?;
        let filled = window
            .fill(0, HEADER, 0, &stream)
            .and_then(|()| window.fill(HEADER, layout.window_bytes() - HEADER, SENTINEL, &stream));
        // Waited for in any case: after an error the mapping goes, and no fill may still run on it.
        stream.wait_forever().and(filled)
    }

    /// The memory to bind to a multicast object.
    pub fn own_memory(&self) -> Arc<Allocation> {
        Arc::clone(&self.own)
    }

    /// Takes over the part of a multicast object to which the own window is bound.
    pub fn join_multicast(&mut self, part: Part) {
        self.multicast = Some(part);
    }

    /// Bytes of one window.
    pub fn window_bytes(&self) -> u64 {
        self.stride
    }

    /// Whether the windows are bound to a multicast object.
    pub fn has_multicast(&self) -> bool {
        self.multicast.is_some()
    }

    /// The kernel arguments that are the same for every call of the communicator.
    pub fn args(&self, agreement: &Agreement, rank: u32, timeout_ns: u64) -> Args {
        let ring = agreement.layout.ring();
        Args {
            in_: 0,
            out: 0,
            count: 0,
            windows: self.address,
            window_stride: self.stride,
            multicast: self.multicast.as_ref().map_or(0, Part::address),
            control: self.page.device_address(),
            stage_bytes: agreement.layout.stage_bytes(),
            timeout_ns,
            rank,
            ranks: agreement.ranks,
            op: 0,
            type_: 0,
            trigger: 0,
            channels: ring.map_or(0, |ring| ring.channels),
            ring_log2: ring.map_or(0, |ring| ring.ring_log2),
            chunk_log2: ring.map_or(0, |ring| ring.chunk_log2),
        }
    }
}
