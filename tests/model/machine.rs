//! The transition system: which steps a state allows; memory, set-up and launches. Threads: `kernel`.

use super::call::{Op, Shape, Style, program};
use super::config::{Config, Horizon, Mutant, Reduction, Variant};
use super::search::Machine;
use super::state::{
    Actor, Dimensions, MAX_ACTORS, MAX_LAUNCHES, MAX_LINES, MAX_THREADS, OLD, State, Thread, WORDS, Word,
};

/// A step, small enough to be made for every transition; `trace` turns it into words.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Fill { actor: u8 },
    Launch { actor: u8, call: u8, shape: u8 },
    Execute { actor: u8, thread: u8, op: Op },
    Consume { actor: u8, thread: u8, stage: u8, line: u8 },
    GiveUp { actor: u8, thread: u8 },
    Quiet { actor: u8, thread: u8 },
    Load { actor: u8, thread: u8, from: u8, stage: u8, line: u8 },
    Land { index: u8, word: u8, tag: u8, sender: u8 },
    Drain { index: u8, word: u8 },
    DrainEpoch { actor: u8, replica: u8 },
}

/// What must not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A poll was satisfied by something else than this launch's payload.
    WrongWord { actor: u8, launch: u8, stage: u8, line: u8, word: u8, found: u8 },
    /// A launch ended well on a rank that took something else than this launch's payload.
    WrongResult { actor: u8, launch: u8 },
    /// No step is possible although some rank has not finished.
    Deadlock,
    /// Everything is done and a word is neither a sentinel nor recorded as dirty, or a store is still under way.
    NotRearmed { window: u8, stage: u8, line: u8 },
    /// A word is written whose previous content has not been re-armed in a way ordered before this write.
    Unordered { window: u8, stage: u8, line: u8 },
    /// More stores of one word in flight than the model can hold: the ranks have drifted without bound.
    Drift,
}

pub struct Model {
    pub config: Config,
    pub size: Dimensions,
    /// `[call][shape][rank][thread]`
    programs: Vec<Vec<Vec<Vec<Vec<Op>>>>>,
}

pub type Outcome = Result<(), Violation>;

impl Model {
    pub fn new(config: Config) -> Self {
        let shared = config.has(Mutant::SharedStages);
        let extents = config.calls.iter().map(|c| c.extent(config.ranks) as usize);
        let actors = config.ranks as usize * config.communicators as usize;
        let size = Dimensions {
            windows: if shared { config.ranks as usize } else { actors },
            stages: config.stages as usize,
            lines_per_stage: extents.max().unwrap_or(0).max(1),
            actors,
        };
        assert!(size.lines() <= MAX_LINES && actors <= MAX_ACTORS && config.ranks <= 3);
        assert!(config.communicators == 1 || config.horizon != Horizon::Unbounded);
        assert!(
            config.may_give_up == 0
                || config.variant == Variant::Immediate && config.behind <= 4 && config.epoch_modulus < 15
        );
        let style = Style {
            ranks: config.ranks,
            lagged: config.variant == Variant::Lagged,
            interleaved: config.interleaved,
            barrier: !config.has(Mutant::NoBlockBarrier),
            arrival_release: !config.has(Mutant::ArrivalWithoutRelease),
            poll_own_copy: !config.has(Mutant::OwnCopyNotPolled),
            mutant: config.mutant,
        };
        let threads =
            |call, shape: Shape, rank| (0..shape.threads()).map(|t| program(call, shape, rank, t, style)).collect();
        let programs = config
            .calls
            .iter()
            .map(|&call| {
                let ranks = |&shape: &Shape| (0..config.ranks).map(|r| threads(call, shape, r)).collect();
                config.shapes.iter().map(ranks).collect()
            })
            .collect();
        Self { config, size, programs }
    }

    fn start(&self) -> State {
        let content = if self.config.initialise { OLD } else { 0 };
        let mut state = State {
            memory: [[Word(0); WORDS]; MAX_LINES],
            actors: [Actor::default(); MAX_ACTORS],
            threads: [[Thread::default(); MAX_THREADS]; MAX_ACTORS],
            calls: [[0; MAX_LAUNCHES]; 2],
            base: 0,
        };
        state.memory[..self.size.lines()].fill([Word(content); WORDS]);
        for (launch, &call) in self.config.sequence.iter().enumerate() {
            for calls in &mut state.calls {
                calls[launch] = call + 1;
            }
        }
        for actor in &mut state.actors {
            actor.filled = !self.config.initialise;
        }
        state
    }

    pub fn rank(&self, actor: usize) -> usize {
        actor % self.config.ranks as usize
    }

    pub fn communicator(&self, actor: usize) -> usize {
        actor / self.config.ranks as usize
    }

    pub fn window_of(&self, communicator: usize, rank: usize) -> usize {
        if self.config.has(Mutant::SharedStages) { rank } else { communicator * self.config.ranks as usize + rank }
    }

    pub fn window(&self, actor: usize) -> usize {
        self.window_of(self.communicator(actor), self.rank(actor))
    }

    /// What a word of this launch carries. With the word's address (which fixes source, line and word, because offsets of
    /// one call do not overlap) it stands for the payload (epoch, source, line, word).
    pub fn tag(&self, actor: usize, launch: u8) -> u32 {
        let tag = 1 + u32::from(launch) + 7 * self.communicator(actor) as u32;
        assert!(launch < 7 && tag < OLD);
        tag
    }

    pub fn reduced(&self) -> bool {
        self.config.reduction == Reduction::Ordered
    }

    pub fn stage(&self, epoch: u8) -> usize {
        (epoch % self.config.stages) as usize
    }

    pub fn program(&self, state: &State, actor: usize, thread: usize, launch: u8) -> &[Op] {
        let mut call = state.calls[self.communicator(actor)][launch as usize] as usize - 1;
        if self.config.has(Mutant::Disagreement) && self.rank(actor) == 1 {
            call ^= 1;
        }
        let shape = state.actors[actor].shape as usize - 1;
        &self.programs[call][shape][self.rank(actor)][thread]
    }

    fn all_done(&self, state: &State) -> bool {
        let mut threads = state.threads[..self.size.actors].iter().flatten();
        match self.config.horizon {
            Horizon::Launches(n) => threads.all(|t| t.pc == 0 && t.launch == n),
            Horizon::Unbounded => threads.all(|t| t.pc == 0 && t.launch == 0),
        }
    }

    fn steps(&self, state: &State, mut emit: impl FnMut(Step, Result<State, Violation>)) {
        if self.config.reduction == Reduction::Eager
            && let Some((step, next)) = self.early_landing(state)
        {
            emit(step, Ok(next));
            return;
        }
        if !self.reduced() {
            self.memory_steps(state, &mut emit);
        }
        for a in 0..self.size.actors {
            let actor = a as u8;
            if !state.actors[a].filled {
                let mut next = *state;
                self.fill(&mut next, a);
                emit(Step::Fill { actor }, Ok(next));
            }
            self.launches(state, a, &mut emit);
            for t in 0..MAX_THREADS {
                self.thread_steps(state, a, t, &mut emit);
            }
        }
    }

    pub fn finish(&self, mut next: State, outcome: Outcome) -> Result<State, Violation> {
        outcome?;
        if self.config.horizon == Horizon::Unbounded {
            while next.threads[..self.size.actors].iter().flatten().all(|t| t.launch > 0) {
                next.age(self.size, self.config.epoch_modulus);
            }
        }
        Ok(next)
    }

    /// Whether buffered stores drain by themselves, even where nobody but a faulty step can tell.
    fn every_drain(&self) -> bool {
        let timing = matches!(
            self.config.mutant,
            Some(
                Mutant::WrongStage
                    | Mutant::NoReleaseAtEnd
                    | Mutant::NoGridWait
                    | Mutant::NoBlockBarrier
                    | Mutant::ArrivalWithoutRelease
            )
        );
        match self.config.reduction {
            Reduction::None => true,
            Reduction::Eager => timing,
            Reduction::Drains | Reduction::Ordered => false,
        }
    }

    fn early_landing(&self, state: &State) -> Option<(Step, State)> {
        let words = (0..self.size.lines()).flat_map(|index| (0..WORDS).map(move |word| (index, word)));
        for (index, word) in words {
            let before = state.memory[index][word];
            if before.content() == 0 && !before.pending() && before.in_flight() {
                let (tag, sender) = before.entry(0)?;
                let mut next = *state;
                next.memory[index][word] = before.land(0)?;
                return Some((land(index, word, tag, sender), next));
            }
        }
        None
    }

    fn memory_steps(&self, state: &State, emit: &mut impl FnMut(Step, Result<State, Violation>)) {
        let strict = self.config.mutant.is_none();
        let every_drain = self.every_drain();
        for index in 0..self.size.lines() {
            for word in 0..WORDS {
                let before = state.memory[index][word];
                if before.pending() && (every_drain || before.in_flight()) {
                    let mut next = *state;
                    next.memory[index][word] = before.drained();
                    emit(Step::Drain { index: index as u8, word: word as u8 }, Ok(next));
                }
                for k in 0..Word::SLOTS {
                    let Some((tag, sender)) = before.entry(k) else {
                        break;
                    };
                    let Some(after) = before.land(k) else {
                        continue;
                    };
                    let step = land(index, word, tag, sender);
                    if strict && before.content() != 0 {
                        emit(step, Err(self.unordered(index)));
                        continue;
                    }
                    let mut next = *state;
                    next.memory[index][word] = after;
                    emit(step, Ok(next));
                }
            }
        }
        for a in (0..self.size.actors).filter(|_| every_drain) {
            for replica in 0..MAX_THREADS {
                if state.actors[a].replica_store[replica] != 0 {
                    let mut next = *state;
                    drain_epoch(&mut next.actors[a], replica);
                    emit(Step::DrainEpoch { actor: a as u8, replica: replica as u8 }, Ok(next));
                }
            }
        }
    }

    pub fn unordered(&self, index: usize) -> Violation {
        let (window, stage, line) = self.size.place(index);
        Violation::Unordered { window: window as u8, stage: stage as u8, line: line as u8 }
    }

    fn own_lines(&self, actor: usize) -> std::ops::Range<usize> {
        let lines = self.size.stages * self.size.lines_per_stage;
        let start = self.window(actor) * lines;
        start..start + lines
    }

    fn fill(&self, state: &mut State, actor: usize) {
        for index in self.own_lines(actor) {
            for word in &mut state.memory[index] {
                *word = word.with_content(0);
            }
        }
        state.actors[actor].filled = true;
    }

    pub fn drain_window(&self, state: &mut State, actor: usize) {
        for index in self.own_lines(actor) {
            for word in &mut state.memory[index] {
                *word = word.drained();
            }
        }
    }

    fn launches(&self, state: &State, a: usize, emit: &mut impl FnMut(Step, Result<State, Violation>)) {
        let threads = &state.threads[a];
        let loose = self.config.has(Mutant::NoGridWait);
        let launch = threads[0].launch;
        let ready = threads[0].pc == 0 && (loose || threads.iter().all(|t| t.pc == 0 && t.launch == launch));
        let over = match self.config.horizon {
            Horizon::Launches(n) => launch >= n,
            Horizon::Unbounded => state.actors[a].claim != 0 && state.actors[a].behind >= self.config.behind,
        };
        if !ready || over || launch as usize >= MAX_LAUNCHES {
            return;
        }
        if launch == 0 && self.config.initialise {
            let own = self.config.has(Mutant::NoInitBarrier);
            let waits = |(other, actor): (usize, &Actor)| !actor.filled && (other == a || !own);
            if state.actors[..self.size.actors].iter().enumerate().any(waits) {
                return;
            }
        }
        let chosen = state.calls[self.communicator(a)][launch as usize];
        for call in 1..=self.config.calls.len() as u8 {
            if chosen != 0 && chosen != call {
                continue;
            }
            for shape in 1..=self.config.shapes.len() as u8 {
                let mut next = *state;
                next.calls[self.communicator(a)][launch as usize] = call;
                let outcome = self.launch(&mut next, a, shape);
                let step = Step::Launch { actor: a as u8, call: call - 1, shape: shape - 1 };
                emit(step, self.finish(next, outcome));
            }
        }
    }

    fn launch(&self, state: &mut State, a: usize, shape: u8) -> Outcome {
        let loose = self.config.has(Mutant::NoGridWait);
        if !self.config.has(Mutant::NoReleaseAtEnd) {
            self.drain_window(state, a);
        }
        for replica in 0..MAX_THREADS {
            drain_epoch(&mut state.actors[a], replica);
        }
        state.actors[a].shape = shape;
        state.actors[a].behind += u8::from(state.actors[a].claim != 0);
        let started = self.config.shapes[shape as usize - 1].threads() as usize;
        for t in 0..MAX_THREADS {
            let thread = &mut state.threads[a][t];
            if loose && t > 0 {
                continue; // the fault: this block starts when it likes, see `thread_steps`
            }
            if t < started {
                thread.pc = 1;
            } else {
                thread.launch += 1;
            }
        }
        if self.reduced() {
            for t in 0..started {
                self.run(state, a, t)?;
            }
        }
        Ok(())
    }

    /// The state at rest: with all buffers drained, only sentinels, or only recorded dirt.
    fn rearmed(&self, state: &State) -> Outcome {
        let mut state = *state;
        for a in 0..self.size.actors {
            self.drain_window(&mut state, a);
            drain_epoch(&mut state.actors[a], 0);
        }
        for a in 0..self.size.actors {
            for index in self.own_lines(a) {
                let (window, stage, line) = self.size.place(index);
                let recorded = line < state.actors[a].dirty[stage] as usize;
                let stale = |w: &Word| w.in_flight() || (w.content() != 0 && !recorded);
                if state.memory[index].iter().any(stale) {
                    return Err(Violation::NotRearmed { window: window as u8, stage: stage as u8, line: line as u8 });
                }
            }
        }
        Ok(())
    }
}

impl Machine for Model {
    type State = State;
    type Step = Step;
    type Violation = Violation;

    fn initial(&self) -> State {
        self.start()
    }

    fn fingerprint(&self, state: &State) -> u128 {
        state.fingerprint(self.size)
    }

    fn successors(&self, state: &State, emit: impl FnMut(Step, Result<State, Violation>)) {
        self.steps(state, emit);
    }

    fn at_rest(&self, state: &State) -> bool {
        self.all_done(state)
    }

    /// A fault has to show harm to a result or to progress, not only an untidy end.
    fn check_rest(&self, state: &State) -> Outcome {
        if self.config.mutant.is_none() && !self.anyone_gave_up(state) { self.rearmed(state) } else { Ok(()) }
    }

    fn check_stuck(&self, state: &State) -> Outcome {
        let finished = self.all_done(state) && self.config.horizon != Horizon::Unbounded;
        // Who waits for a rank that gave up waits for ever, or gives up too.
        if finished || self.anyone_gave_up(state) { Ok(()) } else { Err(Violation::Deadlock) }
    }

    fn base(&self, state: &State) -> u32 {
        state.base
    }
}

fn land(index: usize, word: usize, tag: u32, sender: u32) -> Step {
    Step::Land { index: index as u8, word: word as u8, tag: tag as u8, sender: sender as u8 }
}

pub fn drain_epoch(actor: &mut Actor, replica: usize) {
    if actor.replica_store[replica] == 0 {
        return;
    }
    actor.replica[replica] = actor.replica_store[replica] - 1;
    actor.replica_store[replica] = 0;
    if actor.dirty_store != [0; 3] {
        actor.dirty = actor.dirty_store;
        actor.dirty_store = [0; 3];
    }
}
