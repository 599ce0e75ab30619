//! The official door: what NCCL is offered by its plugin interface alone, where nothing may be bound.
//!
//! ```text
//! nics       one network device per GPU                     address    what a handle says: pure
//! bootstrap  blobs between the ranks over TCP               collnet    AllReduce by the kernels, for NCCL's proxy
//! clock      where a request's time goes
//! net        point to point, through windows on the GPUs  tuner      which costs NCCL is told: pure
//! ```
//! The tables that NCCL reads are in `abi`; nothing here knows their versions.
#![forbid(unsafe_code)]

pub mod address;
pub mod bootstrap;
pub mod clock;
pub mod collnet;
pub mod net;
pub mod nics;
pub mod tuner;
