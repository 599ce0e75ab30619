//! What is explored: variant, number of ranks and stages, calls, shapes, and at most one deliberate fault.

use super::call::{Call, Shape};
pub use super::search::Horizon;

/// How a stage becomes all sentinels again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Shipped: the thread that polled a line stores the sentinel back at once; one epoch replica per block.
    Immediate,
    /// Classical: epoch e clears stage (e + 2) % 3 by the recorded dirty size; one epoch word, advanced by the last
    /// of the threads that arrive at a counter.
    Lagged,
}

/// A deliberate fault. The search must find a run that shows its harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Both variants: sentinels go to the stage after the right one (lagged: (e + 1) % 3).
    WrongStage,
    /// Immediate: only lines below this number are re-armed, whatever was polled.
    FixedSize(u8),
    /// Immediate: the lines of the broadcast are polled but not re-armed.
    OwnShardOnly,
    /// Lagged: clears the extent of the current call instead of the recorded one.
    ThisCallsSize,
    /// Both: a line counts as arrived when its first word has.
    OneWord,
    /// Both: the end of a launch does not wait until its sentinel stores have reached memory.
    NoReleaseAtEnd,
    /// Immediate: a block starts the next launch although other blocks of this launch still run.
    NoGridWait,
    /// Immediate: the epoch is advanced although other threads of the block have not read it.
    NoBlockBarrier,
    /// Immediate: a block advances its own replica only.
    OwnReplicaOnly,
    /// Lagged: the arrival overtakes the thread's reads of epoch and dirty size.
    ArrivalWithoutRelease,
    /// Both: a rank fills its window after peers can reach it, with no barrier before the first launch.
    NoInitBarrier,
    /// Both: two communicators of the same ranks use one set of stages.
    SharedStages,
    /// Multicast: the sender's own copy is not polled (and so not re-armed).
    OwnCopyNotPolled,
    /// Rank 1 takes the other call of the pair (2k, 2k + 1) of the alphabet: ranks disagree on the algorithm.
    Disagreement,
    /// Switch: an arrival may overtake the inputs it speaks of.
    ArrivalWithoutInputs,
    /// Switch: the load through the switch may be made before the arrivals were seen.
    LoadWithoutAcquire,
    /// Switch: a block announces before all its threads have laid out their input.
    AnnouncedBeforeBarrier,
    /// Switch: arrivals are known by the block that sends them, not by the lines they speak of.
    ArrivalsByBlock,
    /// Switch: a rank neither announces to itself nor waits for that.
    OwnArrivalSkipped,
    /// Switch: arrivals are not re-armed.
    ArrivalsNotRearmed,
    /// Switch: arrivals are re-armed while other threads of the block still poll them.
    ArrivalsRearmedEarly,
    /// Switch: inputs are re-armed behind the own load, not behind everybody's.
    InputsRearmedEarly,
    /// Switch: inputs are not re-armed.
    InputsNotRearmed,
    /// Giving up: this many launches behind one that gave up do their work (no limit: as before the rule was known).
    LaunchesBehind(u8),
    /// Giving up, two-shot: the thread goes on to publish, with whatever it has.
    PublishesUnfinished,
    /// Every step is as shipped; the configuration is the fault (stages, epoch modulus, a launch without lines).
    Configuration,
}

/// How much the search may leave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Every landing of every word and every drain of every store buffer entry is a step of its own.
    None,
    /// Landings are steps of their own; a buffered store drains at the end of the launch, or before that only while a
    /// store to the same word is in flight: nothing else can tell when it drained.
    Drains,
    /// Only part of the interleavings, for counterexamples: a word lands at once where memory holds the sentinel, and
    /// buffers drain as with `Drains` unless the fault is about their timing.
    Eager,
    /// Ordered accesses are merged; the search proves that they are ordered (see `docs/protocol-model.md`).
    Ordered,
}

/// One exploration.
#[derive(Clone, Debug)]
pub struct Config {
    pub variant: Variant,
    pub ranks: u8,
    pub stages: u8,
    pub communicators: u8,
    pub calls: Vec<Call>,
    /// Calls of the first launches, as indices of `calls`; free choice beyond.
    pub sequence: Vec<u8>,
    pub shapes: Vec<Shape>,
    pub interleaved: bool,
    pub horizon: Horizon,
    pub reduction: Reduction,
    pub mutant: Option<Mutant>,
    /// Windows start as garbage and are filled by a step of their own.
    pub initialise: bool,
    /// The epoch counter counts modulo this (a multiple of the number of stages, or it is a fault).
    pub epoch_modulus: u8,
    /// The ranks of which any thread may give up while it polls, a bit each.
    pub may_give_up: u8,
    /// Who finds that its rank gave up is quiet even in that same launch, and may advance the epoch.
    pub quiet_at_once: bool,
    /// Where runs never end: how many launches a rank still begins behind one that gave up.
    pub behind: u8,
}

impl Config {
    /// The shipped variant, any number of launches, free choice of calls at every launch.
    pub fn shipped(ranks: u8, calls: &[Call]) -> Self {
        Self {
            variant: Variant::Immediate,
            ranks,
            stages: 3,
            communicators: 1,
            calls: calls.to_vec(),
            sequence: Vec::new(),
            shapes: vec![Shape::SINGLE],
            interleaved: false,
            horizon: Horizon::Unbounded,
            reduction: Reduction::Ordered,
            mutant: None,
            initialise: false,
            epoch_modulus: 12,
            may_give_up: 0,
            quiet_at_once: false,
            behind: 3,
        }
    }

    pub fn lagged(ranks: u8, calls: &[Call]) -> Self {
        Self { variant: Variant::Lagged, ..Self::shipped(ranks, calls) }
    }

    pub fn shapes(self, shapes: &[Shape]) -> Self {
        Self { shapes: shapes.to_vec(), ..self }
    }

    pub fn stages(self, stages: u8) -> Self {
        Self { stages, ..self }
    }

    /// Every interleaving of every word, without reduction.
    pub fn every_step(self) -> Self {
        Self { reduction: Reduction::None, ..self }
    }

    /// Every landing of every word, store buffers drained when somebody can tell.
    pub fn every_landing(self) -> Self {
        Self { reduction: Reduction::Drains, ..self }
    }

    pub fn launches(self, launches: u8) -> Self {
        Self { horizon: Horizon::Launches(launches), ..self }
    }

    /// Explores only the part of the interleavings in which words land early: enough when a counterexample is sought.
    pub fn eager(self) -> Self {
        Self { reduction: Reduction::Eager, ..self }
    }

    pub fn sequence(self, sequence: &[u8]) -> Self {
        Self { sequence: sequence.to_vec(), ..self }
    }

    /// The fault, explored without reduction over a bounded number of launches.
    pub fn mutant(self, mutant: Mutant, launches: u8) -> Self {
        Self { mutant: Some(mutant), ..self.every_step().launches(launches) }
    }

    /// Any thread of this rank may give up.
    pub fn gives_up(self, rank: u8) -> Self {
        Self { may_give_up: self.may_give_up | 1 << rank, ..self }
    }

    /// Any thread of any rank may.
    pub fn all_give_up(self) -> Self {
        Self { may_give_up: u8::MAX, ..self }
    }

    pub fn quiet_at_once(self) -> Self {
        Self { quiet_at_once: true, ..self }
    }

    pub fn has(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }
}
