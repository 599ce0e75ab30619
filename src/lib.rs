//! twoshot: AllReduce for NVLink domains, as a library that NCCL loads.
//!
//! ```text
//! doors     abi/        exported C symbols: nccl.h functions, network plugin tables
//!           intercept/  call slots, the stock library, pass-through of all other nccl* functions
//!           official/   what NCCL's plugin interface is offered: a collective network, a network, a tuner
//! policy    route       (call, agreement) -> plan | stock: pure
//!           comm        the state of a communicator, its launches, the registry
//!           setup       probe, vote, allocate, vote, map, vote, known answer, vote
//!           domain      merge of all ranks' facts: pure      decline   why not
//!           exchange    votes                                wire      the blobs: pure
//!           layout      where every byte lies: pure          table     cross-over: pure
//!           budget      what communicators of one device share
//!           config      the environment, parsed once         call      one call as a value
//!           counters    calls by route and size              stats     what they mean: pure
//!           report      a host's GPUs as text: pure
//!           tuning      measured cross-overs: pure           model     predicted ones: pure
//!           record      the counters as a file               log       lines in NCCL's shape
//!           error       what went wrong, as an NCCL code
//! machine   workspace   allocate, export, import, map, fill: the only place that knows the order
//!           handoff     descriptors between processes        steps     work under a deadline
//!           driver/     the CUDA driver and NVML behind owner types
//!           kernels/    CUDA sources, embedded as a fat binary
//! ```
//! Calls go downward only. `unsafe` exists in `abi`, `intercept` and `driver`; every other module forbids it.

#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod abi;
pub mod budget;
pub mod call;
pub mod comm;
pub mod config;
pub mod counters;
pub mod decline;
pub mod domain;
pub mod driver;
pub mod error;
pub mod exchange;
pub mod handoff;
pub mod intercept;
pub mod layout;
pub mod log;
pub mod model;
pub mod official;
pub mod record;
pub mod report;
pub mod route;
pub mod setup;
pub mod stats;
pub mod steps;
pub mod table;
pub mod tuning;
pub mod wire;
pub mod workspace;
