//! The exchange of the direct door: stock NCCL's own AllGather, on the communicator that is being set up.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Code, code};
use crate::comm::Communicator;
use crate::driver::{Context, HostMemory, RawStream, Scratch, Stream, wait_for, with_relaxed_capture};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::intercept::{Comm, Stock};
use crate::steps::bounded;
use crate::warning;
use crate::wire::{BLOB, Blob};

/// `ncclUint8`.
const UINT8: i32 = 1;
/// How often a rank says that it still waits.
const REMINDER: Duration = Duration::from_secs(5);
/// How often it looks for other reasons to stop.
const TURN: Duration = Duration::from_millis(200);

/// How long ranks that are all in set-up wait for each other, where a step has this deadline: what they do between two
/// blobs takes a few of them at most.
fn patience(deadline: Duration) -> Duration {
    deadline * 3 + Duration::from_secs(10)
}

/// Memory that stock NCCL can read and write: pinned on the host, where speaking needs no copy that could fail, or,
/// where there is none, on the device.
enum Buffer {
    Host(HostMemory),
    Device(Scratch, Stream),
}

/// One communicator's exchange.
pub struct StockExchange<'a> {
    stock: &'a Stock,
    communicator: &'a Communicator,
    comm: Comm,
    device: i32,
    rank: u32,
    ranks: u32,
    stream: RawStream,
    // Left behind, not freed, while stock NCCL's kernel may still use it: see `drop`. Dropped in this order.
    buffer: ManuallyDrop<Buffer>,
    own: ManuallyDrop<Option<Stream>>,
    in_flight: bool,
    context: Arc<Context>,
    patience: Duration,
    first: bool,
}

/// Gets something under a deadline, twice if need be: a rank that cannot speak leaves its peers waiting.
fn tried<T: Send + 'static>(
    name: &'static str,
    deadline: Duration,
    get: impl Fn() -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    match bounded(name, deadline, get.clone()) {
        Err(Error::Deadline(name)) => Err(Error::Deadline(name)),
        Err(_) => with_relaxed_capture(get),
        got => got,
    }
}

/// The context of a communicator's device, retained for it.
pub fn retain(device: i32, deadline: Duration) -> Result<Arc<Context>> {
    tried("retaining the primary context", deadline, move || crate::setup::context(device))
}

impl<'a> StockExchange<'a> {
    /// Prepares an exchange over `comm`, in `context` or, without one, in the caller's own. Memory or a stream that
    /// cannot be had is replaced by the next best.
    pub fn new(
        stock: &'a Stock,
        (communicator, comm): (&'a Communicator, Comm),
        device: i32,
        (rank, ranks): (u32, u32),
        context: Option<Arc<Context>>,
        callers: RawStream,
        deadline: Duration,
    ) -> Result<Self> {
        let context = context.map_or_else(|| Context::current(device), Ok)?;
        let (of_stream, of_host, of_device) = (Arc::clone(&context), Arc::clone(&context), Arc::clone(&context));
        let own = tried("creating a stream", deadline, move || Stream::new(&of_stream)).ok();
        let stream = own.as_ref().map_or(callers, Stream::as_raw);
        let bytes = BLOB * (ranks as usize + 1);
        let on_host = tried("allocating host memory", deadline, move || HostMemory::new(&of_host, bytes));
        let buffer = on_host.map(Buffer::Host).or_else(|_| {
            let both = move || Ok((Scratch::new(&of_device, bytes as u64)?, Stream::new(&of_device)?));
            tried("allocating device memory", deadline, both).map(|(memory, stream)| Buffer::Device(memory, stream))
        })?;
        let patience = patience(deadline);
        let (buffer, own) = (ManuallyDrop::new(buffer), ManuallyDrop::new(own));
        let first = true;
        let in_flight = false;
        Ok(Self {
            stock,
            communicator,
            comm,
            device,
            rank,
            ranks,
            stream,
            buffer,
            own,
            in_flight,
            context,
            patience,
            first,
        })
    }

    fn address(&self) -> u64 {
        match &*self.buffer {
            Buffer::Device(scratch, _) => scratch.address(),
            Buffer::Host(memory) => memory.device_address(),
        }
    }

    fn put(&self, bytes: &[u8]) -> Result<()> {
        match &*self.buffer {
            Buffer::Device(scratch, stream) => scratch.write(0, bytes, stream),
            Buffer::Host(memory) => memory.write(0, bytes),
        }
    }

    fn take(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        match &*self.buffer {
            Buffer::Device(scratch, stream) => scratch.read(offset as u64, bytes, stream),
            Buffer::Host(memory) => memory.read(offset, bytes),
        }
    }

    /// What stock NCCL says of the communicator meanwhile. Not asked once the communicator is being aborted.
    fn async_error(&self) -> Code {
        if self.communicator.cancelled() {
            return code::REMOTE;
        }
        let mut error = code::SUCCESS;
        // SAFETY: a live communicator, by NCCL's contract with our caller, and a valid out-pointer.
        let asked = unsafe { (self.stock.nccl.comm_get_async_error)(self.comm, &mut error) };
        if asked == code::SUCCESS { error } else { asked }
    }

    fn wait(&self, step: &'static str) -> Result<()> {
        let mut waited = Duration::ZERO;
        let mut said = 0;
        loop {
            let turn = Instant::now();
            let done = wait_for(&self.context, self.stream, Some(TURN))?;
            // Asked in either case: a collective that failed ends its stream's work too.
            match self.async_error() {
                code::SUCCESS | code::IN_PROGRESS => {}
                failed => return Err(Error::Stock { call: "ncclAllGather", code: failed }),
            }
            if done {
                return Ok(());
            }
            // While this process was stopped, it did not wait.
            waited += turn.elapsed().min(TURN * 2);
            if waited > REMINDER * (said + 1) {
                said += 1;
                warning!(
                    self.device,
                    "rank {}/{}: waiting for its peers since {} s: {step}. Is twoshot loaded on every rank?",
                    self.rank,
                    self.ranks,
                    waited.as_secs()
                );
            }
            // The first step waits as long as stock NCCL would: peers may come to their first call late. Behind it
            // every rank is in set-up, and each of its steps has a deadline of its own.
            if !self.first && waited > self.patience {
                return Err(Error::Peer { rank: u32::MAX, step });
            }
        }
    }
}

/// What an exchange that broke off has left on its own stream, until stock NCCL's kernel is gone.
struct Left {
    // Dropped in this order.
    buffer: Buffer,
    own: Stream,
    context: Arc<Context>,
}

static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());

/// Drops what exchanges have left and nothing uses any more. Where what it calls may wait for other kernels, so may this.
pub fn collect() {
    let done = |left: &mut Left| matches!(wait_for(&left.context, left.own.as_raw(), Some(Duration::ZERO)), Ok(true));
    let gone: Vec<_> = with_relaxed_capture(|| LEFT.lock().extract_if(.., done).collect());
    if !gone.is_empty() {
        with_relaxed_capture(|| {
            gone.into_iter().for_each(|Left { buffer, own, context }| drop((buffer, own, context)))
        });
    }
}

impl Drop for StockExchange<'_> {
    fn drop(&mut self) {
        // Freeing would wait for a kernel that waits for a peer that may be gone, or take memory from under one that stock
        // NCCL has yet to start; a few hundred bytes are the better loss.
        if self.in_flight {
            // Once its communicator is being aborted, stock NCCL starts nothing more.
            if !self.communicator.cancelled() {
                return;
            }
            // SAFETY: taken once, here; nothing uses the fields afterwards.
            let (buffer, own) = unsafe { (ManuallyDrop::take(&mut self.buffer), ManuallyDrop::take(&mut self.own)) };
            match own {
                Some(own) => LEFT.lock().push(Left { buffer, own, context: Arc::clone(&self.context) }),
                // On the caller's stream nobody can tell when it is over.
                None => std::mem::forget(buffer),
            }
            return;
        }
        // SAFETY: dropped once, here; nothing uses the fields afterwards.
        unsafe {
            ManuallyDrop::drop(&mut self.buffer);
            ManuallyDrop::drop(&mut self.own);
        }
    }
}

impl Exchange for StockExchange<'_> {
    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn allgather(&mut self, mine: &Blob, step: &'static str) -> Result<Vec<Blob>> {
        // Helps a caller's stream that means "the current context's"; every other handle knows its own.
        let _entered = self.context.enter();
        // A copy that fails is tried once more: what cannot be said cannot be voted on.
        self.put(mine).or_else(|_| self.put(mine))?;
        let send = self.address() as *const c_void;
        let receive = (self.address() + BLOB as u64) as *mut c_void;
        let stream = self.stream.0 as *mut c_void;
        let all_gather = self.stock.nccl.all_gather;
        if self.communicator.cancelled() {
            return Err(Error::Peer { rank: self.rank, step: "the communicator is being aborted" });
        }
        self.in_flight = true;
        // SAFETY: buffers of one and of `ranks` blobs, alive until the wait below is over, and left behind where it
        // fails; a live communicator.
        let started = unsafe { all_gather(send, receive, BLOB, UINT8, self.comm, stream) };
        if started != code::SUCCESS && started != code::IN_PROGRESS {
            return Err(Error::Stock { call: "ncclAllGather", code: started });
        }
        if started == code::IN_PROGRESS {
            self.communicator.found_in_progress();
        }
        while self.async_error() == code::IN_PROGRESS {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.wait(step)?;
        self.first = false;
        let mut bytes = vec![0; BLOB * self.ranks as usize];
        self.take(BLOB, &mut bytes).or_else(|_| self.take(BLOB, &mut bytes))?;
        let blobs: Vec<Blob> = bytes.chunks_exact(BLOB).filter_map(|chunk| chunk.try_into().ok()).collect();
        // A stream without work does not say that the AllGather ran: in a group that nobody told this library of, stock
        // NCCL has only queued it.
        self.in_flight = blobs.get(self.rank as usize) != Some(mine);
        Ok(blobs)
    }

    fn non_blocking(&self) -> bool {
        self.communicator.hints().non_blocking
    }

    fn grant(&mut self, deadline: Duration) {
        self.patience = patience(deadline);
    }
}
