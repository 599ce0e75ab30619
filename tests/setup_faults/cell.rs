//! One cell of the sweep: one fault at one use of one call on one rank, and what must hold whatever it is.

use std::fmt;

use crate::common::Report;
use crate::world::World;

/// What happens to the call.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Effect {
    /// It returns this code.
    Code(u32),
    /// It blocks for longer than a step of set-up may take, then fails.
    Block,
    /// It blocks for as long, then succeeds: the step that was left behind goes on.
    Late,
}

impl Effect {
    pub fn blocks(self) -> bool {
        matches!(self, Self::Block | Self::Late)
    }
}

/// The codes that installations have met, and a call that blocks.
pub const EFFECTS: [Effect; 11] = [
    Effect::Code(1),
    Effect::Code(2),
    Effect::Code(101),
    Effect::Code(201),
    Effect::Code(401),
    Effect::Code(800),
    Effect::Code(801),
    Effect::Code(802),
    Effect::Code(999),
    Effect::Block,
    Effect::Late,
];

/// Deadline of a step where a call blocks, and how long it blocks, in milliseconds.
const PATIENCE_MS: u32 = 600;
const BLOCKED_MS: u32 = 1000;

/// One fault.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Cell {
    pub world: World,
    pub rank: usize,
    pub call: String,
    /// Which use of the call, from 1; 0 means every one.
    pub nth: u64,
    pub effect: Effect,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.world, self.rule())
    }
}

/// What stays behind when releasing it is refused: the driver keeps it, and what it holds.
fn lost_by(call: &str) -> &'static [&'static str] {
    match call {
        "cuMemUnmap" | "cuMulticastUnbind" | "cuMemRelease" => &[
            "allocations",
            "imports",
            "mappings",
            "mapped_bytes",
            "reservations",
            "reserved_bytes",
            "fds",
            "multicast_objects",
            "multicast_imports",
            "multicast_bindings",
            "device_bytes",
        ],
        "cuMemAddressFree" => &["reservations", "reserved_bytes"],
        "cuMemFree_v2" => &["device_allocations", "device_bytes"],
        "cuMemFreeHost" => &["host_allocations"],
        "cuStreamDestroy_v2" => &["streams"],
        "cuEventDestroy_v2" => &["events"],
        "cuModuleUnload" => &["modules"],
        "cuDevicePrimaryCtxRelease_v2" => &["contexts"],
        "nvmlShutdown" => &["nvml_inits"],
        _ => &[],
    }
}

impl Cell {
    fn rule(&self) -> String {
        let Self { rank, call, nth, .. } = self;
        match self.effect {
            Effect::Late => format!("rank={rank},call={call},nth={nth},delay={BLOCKED_MS}"),
            Effect::Code(code) => format!("rank={rank},call={call},nth={nth},code={code}"),
            Effect::Block => format!("rank={rank},call={call},nth={nth},delay={BLOCKED_MS},code=999"),
        }
    }

    /// Runs the job and says what is wrong with it, and whether it came out on.
    pub fn run(&self) -> Result<bool, String> {
        let blocks = self.effect.blocks();
        let nap = if blocks { BLOCKED_MS + 300 } else { 0 };
        // A step that was left behind comes back after the end of the communicator and still cleans up.
        let program = format!(
            "collective name=allgather count=64; random calls=3 seed=7 max=3000; destroy; release; sleep ms={nap}"
        );
        let patience = if blocks { PATIENCE_MS } else { 8000 };
        let job = self.world.job(&program).env("TWOSHOT_SETUP_TIMEOUT_MS", patience);
        let report = job.env("TWOSHOT_SIM_FAULTS", self.rule()).run();
        self.judge(&report).map_err(|wrong| {
            let all: String = report.outcomes.iter().map(|outcome| format!("{outcome}\n")).collect();
            format!("{self}\n{wrong}\n{all}")
        })
    }

    fn judge(&self, report: &Report) -> Result<bool, String> {
        let mut verdicts = Vec::new();
        for (rank, outcome) in report.outcomes.iter().enumerate() {
            // The worker compares every result with its own sum.
            if !outcome.succeeded() {
                return Err(format!("rank {rank} failed"));
            }
            let lines = report.lines(rank);
            let verdict: Vec<_> = lines.iter().filter_map(|line| verdict(line)).collect();
            let [verdict] = verdict[..] else { return Err(format!("rank {rank} has {} verdicts", verdict.len())) };
            verdicts.push(verdict);
            let stats = report.session.stats(outcome.pid).map_err(|e| e.to_string())?;
            let allowed = if rank == self.rank { lost_by(&self.call) } else { &[] };
            let left: Vec<_> = stats.left_behind().into_iter().filter(|(kind, _)| !allowed.contains(kind)).collect();
            if !left.is_empty() {
                return Err(format!("rank {rank} left {left:?} behind"));
            }
            if stats.total("calls_after_exit") > 0 {
                return Err(format!("rank {rank} called a driver that was gone"));
            }
        }
        if verdicts.iter().any(|verdict| *verdict != verdicts[0]) {
            return Err(format!("the ranks disagree: {verdicts:?}"));
        }
        if let (Effect::Code(code), Some(said)) = (self.effect, code_of(verdicts[0]))
            && said != code
        {
            return Err(format!("the line names code {said}"));
        }
        Ok(verdicts[0].starts_with("ON"))
    }
}

/// What all ranks must say alike: the line without host, process and rank, and without what the one adds on which it
/// failed.
fn verdict(line: &str) -> Option<&str> {
    let at = line.find(": ON, ").or_else(|| line.find(": OFF, "))?;
    line[at + 2..].split(" [").next()
}

fn code_of(verdict: &str) -> Option<u32> {
    let rest = &verdict[verdict.find(", code ")? + 7..];
    rest.split(')').next()?.parse().ok()
}
