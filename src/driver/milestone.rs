//! Points of a stream that the host sees passed by one load: behind the work before it the GPU stores a point's number
//! into pinned memory. The driver is asked now and then, so that what it has to say of a stream that broke is heard.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::api::sys;
use super::context::Context;
use super::host::HostMemory;
use super::stream::Stream;
use crate::error::{Error, Result};

/// Questions that found a point not passed, for one to the driver.
const ASK: u32 = 256;

/// The points of one stream. Kept until the stream's work is done: the owner's promise.
pub struct Milestones {
    word: HostMemory,
    asked: AtomicU32,
}

impl Milestones {
    /// For one stream; `None`: the driver has no such stores.
    pub fn new(context: &Arc<Context>) -> Result<Option<Self>> {
        if context.api().cuStreamWriteValue32_v2.is_none() {
            return Ok(None);
        }
        Ok(Some(Self { word: HostMemory::new(context, 64)?, asked: AtomicU32::new(0) }))
    }

    /// Puts a point behind the stream's work so far. Numbers go up by at most 2^31 from one to the next, from 0, and wrap.
    pub fn put(&self, number: u32, stream: &Stream) -> Result<()> {
        let write = stream.context().api().cuStreamWriteValue32_v2;
        let write = write.ok_or(Error::Bug("a driver without stores behind a stream's work"))?;
        let flags = sys::CU_STREAM_WRITE_VALUE_DEFAULT;
        // SAFETY: a live stream, and a word of pinned memory that the device maps.
        let code = unsafe { write(stream.raw(), self.word.device_address(), number, flags) };
        super::api::check("cuStreamWriteValue32", code)
    }

    /// Whether the stream has come past the point of this number.
    pub fn passed(&self, number: u32, stream: &Stream) -> Result<bool> {
        // SAFETY: aligned, inside pinned memory that lives as long as `self`; the GPU stores whole words.
        let word = unsafe { AtomicU32::from_ptr(self.word.pointer().cast()) };
        // Not behind it, on a circle.
        if word.load(Ordering::Acquire).wrapping_sub(number) <= u32::MAX / 2 {
            return Ok(true);
        }
        let asked = self.asked.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if asked.is_multiple_of(ASK) { stream.idle() } else { Ok(false) }
    }
}
