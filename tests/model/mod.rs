//! An explicit-state model of the sentinel protocol, searched exhaustively.
//!
//! `call` says what each thread of a launch does, `config` what is explored, `state` packs a global state, `machine`
//! has the steps, `kernel` those of a thread and `quit` those of one that gives up, `search` visits every reachable state (known by `fingerprint`),
//! `trace` prints a counterexample. Prose: `docs/protocol-model.md`. The ring of large payloads has a model of its own,
//! `ring`.

pub mod call;
pub mod config;
pub mod fingerprint;
pub mod kernel;
pub mod machine;
pub mod quit;
pub mod search;
pub mod state;
pub mod trace;
