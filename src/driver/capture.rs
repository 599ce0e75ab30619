//! Stream capture: what is captured, order inside a graph, and what a graph keeps alive.

use std::any::Any;
use std::cell::Cell;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::api::{self, Api, call, sys};
use super::context::Context;
use super::stream::RawStream;
use crate::error::Result;
use crate::warning;

/// A capture in progress on a stream.
#[derive(Clone, Copy, Debug)]
pub struct Capture {
    /// Unique per capture sequence and process.
    pub id: u64,
    graph: usize,
    /// The node that the next captured operation would depend on, if it is a single one.
    pub node: Option<usize>,
}

/// The capture on a stream, if it captures. Errors count as "not capturing": the launch that follows meets the same
/// error and reports it.
pub fn capture_of(context: &Context, stream: RawStream) -> Option<Capture> {
    query(context.api(), stream)
}

/// Whether a stream captures, before any context of ours exists.
pub fn capturing(stream: RawStream) -> bool {
    api::api().is_ok_and(|api| query(api, stream).is_some())
}

fn query(api: &Api, stream: RawStream) -> Option<Capture> {
    let (mut status, mut id, mut count) = (0, 0, 0usize);
    let mut graph = std::ptr::null_mut();
    let mut nodes: *const sys::CUgraphNode = std::ptr::null();
    let (s, i, g, n, c) = (&raw mut status, &raw mut id, &raw mut graph, &raw mut nodes, &raw mut count);
    let code = if let Some(info) = api.cuStreamGetCaptureInfo_v3 {
        let mut edges = std::ptr::null();
        // SAFETY: all out-pointers are valid; the stream is the caller's, live for the duration of the call.
        unsafe { info(stream.raw(), s, i, g, n, &mut edges, c) }
    } else if let Some(info) = api.cuStreamGetCaptureInfo_v2 {
        // SAFETY: as above.
        unsafe { info(stream.raw(), s, i, g, n, c) }
    } else {
        return None;
    };
    if code != 0 || status != sys::CU_STREAM_CAPTURE_STATUS_ACTIVE as i32 {
        return None;
    }
    let node = if count == 1 && !nodes.is_null() {
        // SAFETY: the driver returned an array of `count` nodes, valid until the next call on this stream.
        Some(unsafe { *nodes } as usize)
    } else {
        None
    };
    Some(Capture { id, graph: graph as usize, node })
}

/// Makes the next operation captured on `stream` depend on `node` too.
pub fn order_behind(context: &Context, stream: RawStream, node: usize) -> Result<()> {
    let api = context.api();
    let mut node = node as sys::CUgraphNode;
    let add = sys::CU_STREAM_ADD_CAPTURE_DEPENDENCIES;
    if let Some(update) = api.cuStreamUpdateCaptureDependencies_v2 {
        // SAFETY: one node of the same capture, recorded by `capture_of`; no edge data means full dependencies.
        let code = unsafe { update(stream.raw(), &mut node, std::ptr::null(), 1, add) };
        return api::check("cuStreamUpdateCaptureDependencies_v2", code);
    }
    match api.cuStreamUpdateCaptureDependencies {
        Some(update) => {
            // SAFETY: as above.
            let code = unsafe { update(stream.raw(), &mut node, 1, add) };
            api::check("cuStreamUpdateCaptureDependencies", code)
        }
        None => Ok(()),
    }
}

type Kept = Arc<dyn Any + Send + Sync>;

static GRAVEYARD: Mutex<Vec<Kept>> = Mutex::new(Vec::new());
static BURIED: AtomicBool = AtomicBool::new(false);

/// Runs when the last graph that holds the object is gone, on a thread that may not call the driver: the object is
/// laid aside and dropped by the next [`reap`].
unsafe extern "C" fn released(kept: *mut c_void) {
    // SAFETY: the pointer that `retain_for_graph` made of a box, handed back exactly once.
    let kept = unsafe { Box::from_raw(kept.cast::<Kept>()) };
    bury(*kept);
}

/// Lays something aside that may not be dropped now; the next [`reap`] drops it.
pub fn bury(kept: Kept) {
    GRAVEYARD.lock().push(kept);
    BURIED.store(true, Ordering::Release);
}

/// Drops what graphs released since the last call. One load where there is nothing.
pub fn reap() {
    if BURIED.load(Ordering::Relaxed) && BURIED.swap(false, Ordering::AcqRel) {
        let dead = std::mem::take(&mut *GRAVEYARD.lock());
        with_relaxed_capture(|| drop(dead));
    }
}

/// Keeps `kept` alive as long as the captured graph and everything instantiated from it.
pub fn retain_for_graph(context: &Context, capture: &Capture, kept: Kept) -> Result<()> {
    let api: &Api = context.api();
    let pointer = Box::into_raw(Box::new(kept));
    let mut object = std::ptr::null_mut();
    let no_sync = sys::CU_USER_OBJECT_NO_DESTRUCTOR_SYNC;
    // SAFETY: valid out-pointer; `released` takes back exactly this pointer.
    let created = unsafe { call!(api, cuUserObjectCreate(&mut object, pointer.cast(), Some(released), 1, no_sync)) };
    if let Err(error) = created {
        // SAFETY: the driver did not take the pointer.
        drop(unsafe { Box::from_raw(pointer) });
        return Err(error);
    }
    let graph = capture.graph as sys::CUgraph;
    let give = sys::CU_GRAPH_USER_OBJECT_MOVE;
    // SAFETY: the graph is the one being captured; it takes over our only reference.
    unsafe { call!(api, cuGraphRetainUserObject(graph, object, 1, give)) }
}

/// Relaxes the capture mode of this thread for good, once: NCCL's progress thread asks events and queues copies while
/// the program captures on another thread, whose capture must not suffer.
pub fn relax_thread() {
    thread_local! {
        static RELAXED: Cell<bool> = const { Cell::new(false) };
    }
    if RELAXED.try_with(|relaxed| relaxed.replace(true)).unwrap_or(true) {
        return;
    }
    let Ok(api) = api::api() else { return };
    let mut mode = sys::CU_STREAM_CAPTURE_MODE_RELAXED as i32;
    // SAFETY: valid in-out pointer.
    if let Err(error) = unsafe { call!(api, cuThreadExchangeStreamCaptureMode(&mut mode)) } {
        warning!(-1, "{error}");
    }
}

/// Runs `work` with this thread's capture mode relaxed, so that allocations of a set-up do not invalidate a capture
/// that some other thread has in progress.
pub fn with_relaxed_capture<T>(work: impl FnOnce() -> T) -> T {
    let Ok(api) = api::api() else { return work() };
    let mut mode = sys::CU_STREAM_CAPTURE_MODE_RELAXED as i32;
    // SAFETY: valid in-out pointer.
    let exchanged = unsafe { call!(api, cuThreadExchangeStreamCaptureMode(&mut mode)) };
    let result = work();
    if exchanged.is_ok() {
        // SAFETY: as above; puts back what was there.
        if let Err(error) = unsafe { call!(api, cuThreadExchangeStreamCaptureMode(&mut mode)) } {
            warning!(-1, "{error}");
        }
    }
    result
}
