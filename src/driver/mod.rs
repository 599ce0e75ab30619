//! The CUDA driver and NVML behind owner types: one type per handle, released when dropped, in the reverse order
//! of acquisition. All driver `unsafe` of the crate lives here, and the memory that `twoshot stats` reads.

pub mod api;
mod capture;
mod context;
mod copy;
mod host;
mod kernel;
mod later;
mod memory;
mod multicast;
mod nvml;
pub mod nvtx;
mod page;
mod retained;
mod stopwatch;
mod stream;

pub use capture::{
    Capture, bury, capture_of, capturing, order_behind, reap, relax_thread, retain_for_graph, with_relaxed_capture,
};
pub use context::{Context, Device, DeviceFacts, Entered};
pub use copy::{Place, copy, current_ordinal, device_address, fill, ordinal_at};
pub use host::HostMemory;
pub use kernel::{Args, Control, ControlPage, Fault, Kernels, Launch, Module, Multiply, SENTINEL, dependent_launch};
pub use later::{Remains, Scope, let_go};
pub use memory::{Allocation, HandleType, Imported, Mapping, Reservation, Scratch, Shareable, granularity};
pub use multicast::{
    AllAdded, BarrierPassed, Claim, Created, Divided, Division, MOST_OBJECTS, MulticastObject, Part, Slot,
    multicast_granularity,
};
pub use nvml::{FabricFacts, FabricState, fabric_facts, fabric_state, gpus, nvlink_between};
pub use page::{SharedWords, link_of, published};
pub use retained::Retained;
pub use stopwatch::Stopwatch;
pub use stream::{Event, RawStream, Stream, stream_number, wait_for};
