//! The device time between two points of a stream.

use std::sync::Arc;

use super::api::{call, sys};
use super::context::Context;
use super::stream::RawStream;
use crate::error::Result;
use crate::warning;

/// Two events with time stamps.
pub struct Stopwatch {
    context: Arc<Context>,
    begin: sys::CUevent,
    end: sys::CUevent,
}

// SAFETY: event handles may be used from any thread.
unsafe impl Send for Stopwatch {}
// SAFETY: as above.
unsafe impl Sync for Stopwatch {}

impl Stopwatch {
    /// Creates it.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let mut watch = Self { context: Arc::clone(context), begin: std::ptr::null_mut(), end: std::ptr::null_mut() };
        for event in [&mut watch.begin, &mut watch.end] {
            // SAFETY: valid out-pointer, the right context is current.
            unsafe { call!(context.api(), cuEventCreate(event, sys::CU_EVENT_DEFAULT)) }?;
        }
        Ok(watch)
    }

    /// Starts it behind what is queued on a stream.
    pub fn start(&self, stream: RawStream) -> Result<()> {
        self.record(self.begin, stream)
    }

    /// Stops it behind what is queued on the same stream.
    pub fn stop(&self, stream: RawStream) -> Result<()> {
        self.record(self.end, stream)
    }

    fn record(&self, event: sys::CUevent, stream: RawStream) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: the event is alive; the stream is the caller's, live for the duration of the call.
        unsafe { call!(self.context.api(), cuEventRecord(event, stream.raw())) }
    }

    /// Nanoseconds between the two points, once the second one was reached.
    pub fn read(&self) -> Result<Option<u64>> {
        let api = self.context.api();
        // SAFETY: the event is alive.
        match unsafe { (api.cuEventQuery)(self.end) } {
            code if code == sys::CUDA_ERROR_NOT_READY as i32 => return Ok(None),
            code => super::api::check("cuEventQuery", code)?,
        }
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive and were recorded; valid out-pointer.
        unsafe { call!(api, cuEventElapsedTime(&mut milliseconds, self.begin, self.end)) }?;
        Ok(Some((f64::from(milliseconds).max(0.0) * 1e6) as u64))
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        for event in [self.begin, self.end] {
            if event.is_null() {
                continue;
            }
            // SAFETY: created once, destroyed once.
            if let Err(error) = unsafe { call!(self.context.api(), cuEventDestroy_v2(event)) } {
                warning!(self.context.device().ordinal(), "{error}");
            }
        }
    }
}
