//! An explicit-state model of the ring that large payloads go through (`kernels/ring.cuh`, `kernels/bulk.cuh`).
//!
//! `config` says what is explored, `layout` where parts, chunks, flags and slots are (ring.cuh: Parts, Ring, Writers),
//! `state` packs a global state, `machine` has launches and memory, `block` the warps of a block that wait and announce
//! (Roles, Release, Acquire, Bound), `workers` those that move payload (Reuse), `trace` prints a counterexample. Prose:
//! `docs/ring-model.md`.
//!
//! # The memory that it assumes
//!
//! - A chunk is of several words. Every word of a store to a peer, and every flag, travels by itself for any length of
//!   time and lands in any order, also behind the end of the launch that stored it. Stores of one rank to one word land
//!   in the order in which they were issued (each word has one writer). Memory is one for all ranks: who loads sees
//!   what has landed.
//! - A fence makes a flag wait: it is stored when every word of its chunk has landed at every peer. Of the fence's
//!   other effects none is used: one fence for a batch of chunks and both phases orders more than that.
//! - A load is made at its place in the program or, where nothing acquired stands before it, at any earlier moment of
//!   the launch. As shipped every load of payload is behind an acquire.
//! - The words by which the warps of a block tell each other what is complete grow and are awaited as "at least", so an
//!   older value only makes somebody wait longer: they are read as they are. A release covers what the warp did before
//!   it; of the other lanes' loads and stores only what stands before the warp's barrier.
//! - A store is not made before the condition it hangs on was seen; a loop that waits for ever is no step.
//! - The end of a launch is known to the next launch of the same rank, and to nobody else.
//!
//! # What stands for what
//!
//! A word carries launch and chunk. Its address fixes writer, phase, channel, slot and which word it is, so this is the
//! payload (launch, rank, chunk, word). A result is right if every word in it was; a fold of anything else is `BAD`. A
//! tile is stored and loaded in one step, for a role that waits once, touches many words and then tells once does not
//! become able to do more by being interrupted; what the peers see of its stores is a matter of landing.

pub mod block;
pub mod config;
pub mod layout;
pub mod machine;
pub mod state;
pub mod trace;
pub mod workers;
