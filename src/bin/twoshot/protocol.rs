//! What the parent and its ranks say to each other: one JSON value a line, over pipes.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use twoshot::layout::Algorithm;

use crate::element::{Dtype, Op, Reduction};

/// One rank's work, the first line on its standard input.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Task {
    /// This rank and the number of ranks.
    pub rank: u32,
    pub ranks: u32,
    /// CUDA ordinal in this process.
    pub device: i32,
    /// Stock NCCL and libtwoshot.so.
    pub nccl: PathBuf,
    pub library: PathBuf,
    pub plan: Plan,
}

/// What all ranks do alike.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Plan {
    pub sizes: Vec<u64>,
    pub dtypes: Vec<Dtype>,
    pub ops: Vec<Op>,
    /// Timed repetitions; 0 verifies only.
    pub repetitions: u32,
    /// Calls of one timed repetition, or by size.
    pub calls: Option<u32>,
    /// Verified calls for each of eager and graph, at each size.
    pub checks: u32,
    pub seed: u64,
    /// Whether timed calls work on buffers that begin some elements behind a multiple of 16 bytes, on each rank others.
    #[serde(default)]
    pub unaligned: bool,
}

impl Plan {
    /// Every type with every operation.
    pub fn reductions(&self) -> Vec<Reduction> {
        let of = |dtype: &Dtype| self.ops.iter().map(|op| Reduction { dtype: *dtype, op: *op }).collect::<Vec<_>>();
        self.dtypes.iter().flat_map(of).collect()
    }
}

/// The identifiers of the two communicators, the second line on every rank's standard input.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Ids {
    pub stock: String,
    pub routed: String,
}

/// What a rank says.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Message {
    /// Rank 0 only: the identifiers for all.
    Ids(Ids),
    /// Both communicators exist.
    Ready(RankFacts),
    /// What the rank is about to do: named when it never comes back.
    Step { step: String },
    /// One line of the table.
    Row(RankRow),
    /// Nothing more comes.
    Done,
    /// The rank gives up.
    Failed { message: String },
}

/// What a rank knows of its place.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct RankFacts {
    pub gpu: String,
    pub gpu_uuid: String,
    pub arch: u32,
    pub host: String,
    pub driver: String,
    pub cuda: i32,
    pub nccl: i32,
    pub twoshot: String,
    pub agreed: Option<Agreed>,
}

/// What the ranks of the routed communicator agreed on (`twoshot_describe`).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Agreed {
    pub ranks: u32,
    pub hosts: u32,
    pub arch: u32,
    /// Minor release of stock NCCL, 228 for 2.28.
    pub nccl: u32,
    pub multicast: bool,
    pub blocks: u32,
    pub oneshot_bytes: u64,
    pub twoshot_bytes: u64,
    /// Smallest payload above one-shot's whose sum the switch makes, if it makes any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch_bytes: Option<u64>,
    /// Largest payload above two-shot's that goes through the ring, where one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bulk_bytes: Option<u64>,
}

impl Agreed {
    /// What a sum of f32, f16 or bf16 of so many bytes ran as, if it was routed.
    pub fn algorithm(&self, bytes: u64) -> Algorithm {
        match self.switch_bytes {
            _ if bytes <= self.oneshot_bytes => Algorithm::OneShot,
            Some(from) if bytes >= from => Algorithm::Switch,
            _ if bytes > self.twoshot_bytes && self.bulk_bytes.is_some() => Algorithm::Bulk,
            _ => Algorithm::TwoShot,
        }
    }
}

/// Samples of one path on one rank, in microseconds per call.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Samples {
    pub eager: Vec<f64>,
    pub graph: Vec<f64>,
    /// Time the host spent in the calls.
    pub host: Vec<f64>,
}

/// One size and type on one rank.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct RankRow {
    pub dtype: Dtype,
    pub op: Op,
    pub bytes: u64,
    pub count: u64,
    /// Verified calls that ran in twoshot's kernels, and in stock NCCL, of those made through libtwoshot.so.
    pub routed_calls: u64,
    pub stock_calls: u64,
    /// Elements compared, and those that were wrong, by path.
    pub compared: u64,
    pub wrong_routed: u64,
    pub wrong_stock: u64,
    pub note: Option<String>,
    pub stock: Samples,
    pub routed: Samples,
}

impl RankRow {
    /// Its type and operation.
    pub fn what(&self) -> Reduction {
        Reduction { dtype: self.dtype, op: self.op }
    }
}
