//! Streams and events. Waiting is polling with a pause: nothing here blocks inside the driver, so every wait can
//! have a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::{call, sys};
use super::context::Context;
use crate::error::Result;
use crate::warning;

/// The caller's stream, as it came through NCCL's API. Never dereferenced here; only the driver looks into it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RawStream(pub usize);

impl RawStream {
    /// `cudaStreamPerThread`: one value that means another stream on every thread.
    pub const PER_THREAD: Self = Self(2);

    /// Whether it is the default stream, under either of its names: that one cannot be destroyed.
    pub fn is_default(self) -> bool {
        self.0 <= 1
    }

    pub(super) fn raw(self) -> sys::CUstream {
        self.0 as sys::CUstream
    }
}

/// What tells a stream from a later one with its handle; 0 before CUDA 12, where nothing does.
pub fn stream_number(context: &Context, stream: RawStream) -> u64 {
    let Some(get) = context.api().cuStreamGetId else { return 0 };
    let mut number = 0;
    // SAFETY: the stream is the caller's, live for the duration of the call, and the out-pointer is valid.
    match unsafe { get(stream.raw(), &mut number) } {
        0 => number,
        _ => 0,
    }
}

const NOT_READY: i32 = sys::CUDA_ERROR_NOT_READY as i32;

/// Polls until `query` is done: spinning first, for waits of microseconds, then with growing pauses.
fn poll(deadline: Option<Duration>, mut query: impl FnMut() -> Result<bool>) -> Result<bool> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(1);
    loop {
        if query()? {
            return Ok(true);
        }
        let waited = start.elapsed();
        if deadline.is_some_and(|deadline| waited >= deadline) {
            return Ok(false);
        }
        if waited < Duration::from_micros(50) {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }
}

/// Lower than any priority that a device has: the driver takes the highest there is.
const FIRST: i32 = -1000;

/// A non-blocking stream of our own.
pub struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: stream handles may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Creates it.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: valid out-pointer, the right context is current.
        unsafe { call!(context.api(), cuStreamCreate(&mut raw, sys::CU_STREAM_NON_BLOCKING)) }?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Creates one whose work goes before everybody else's: NCCL's kernels wait for it.
    pub fn first(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CU_STREAM_NON_BLOCKING;
        // SAFETY: valid out-pointer, the right context is current.
        unsafe { call!(context.api(), cuStreamCreateWithPriority(&mut raw, flags, FIRST)) }?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Whether all work is done.
    pub fn idle(&self) -> Result<bool> {
        // SAFETY: a live stream.
        match unsafe { (self.context.api().cuStreamQuery)(self.raw) } {
            NOT_READY => Ok(false),
            code => super::api::check("cuStreamQuery", code).map(|()| true),
        }
    }

    /// As a value for calls that take a caller's stream.
    pub fn as_raw(&self) -> RawStream {
        RawStream(self.raw as usize)
    }

    /// Waits for all work, at most `deadline`; says whether it was done.
    pub fn wait(&self, deadline: Duration) -> Result<bool> {
        wait_for(&self.context, self.as_raw(), Some(deadline))
    }

    /// Waits for our own copies and fills, which depend on nobody.
    pub fn wait_forever(&self) -> Result<()> {
        wait_for(&self.context, self.as_raw(), None).map(|_| ())
    }
}

/// Waits for all work on a stream, a caller's or our own; says whether it was done in time.
pub fn wait_for(context: &Context, stream: RawStream, deadline: Option<Duration>) -> Result<bool> {
    let api = context.api();
    let polled = poll(deadline, || {
        // SAFETY: the stream is alive: ours, or the caller's during its call.
        match unsafe { (api.cuStreamQuery)(stream.raw()) } {
            NOT_READY => Ok(false),
            code => super::api::check("cuStreamQuery", code).map(|()| true),
        }
    });
    polled.or_else(|_| {
        // The second opinion decides: a wait that fails must not leave work behind that writes into freed memory.
        // SAFETY: as above.
        unsafe { call!(api, cuStreamSynchronize(stream.raw())) }.map(|()| true)
    })
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        if let Err(error) = unsafe { call!(self.context.api(), cuStreamDestroy_v2(self.raw)) } {
            warning!(self.context.device().ordinal(), "{error}");
        }
    }
}

/// An event without timing.
pub struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: event handles may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Creates it. An event that was never recorded counts as done.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: valid out-pointer, the right context is current.
        unsafe { call!(context.api(), cuEventCreate(&mut raw, sys::CU_EVENT_DISABLE_TIMING)) }?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Records it behind the work queued on a stream so far.
    pub fn record(&self, stream: RawStream) -> Result<()> {
        // SAFETY: the event is alive; the stream is the caller's, live for the duration of the call.
        unsafe { call!(self.context.api(), cuEventRecord(self.raw, stream.raw())) }
    }

    /// Lets a stream wait for the last recorded point.
    pub fn hold(&self, stream: RawStream) -> Result<()> {
        // SAFETY: as above.
        unsafe { call!(self.context.api(), cuStreamWaitEvent(stream.raw(), self.raw, 0)) }
    }

    /// Whether the last recorded point was reached.
    pub fn done(&self) -> Result<bool> {
        // SAFETY: the event is alive.
        match unsafe { (self.context.api().cuEventQuery)(self.raw) } {
            NOT_READY => Ok(false),
            code => super::api::check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Waits on the host, at most `deadline`; says whether the point was reached.
    pub fn wait(&self, deadline: Duration) -> Result<bool> {
        poll(Some(deadline), || self.done())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        if let Err(error) = unsafe { call!(self.context.api(), cuEventDestroy_v2(self.raw)) } {
            warning!(self.context.device().ordinal(), "{error}");
        }
    }
}
