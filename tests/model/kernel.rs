//! What one thread of a launch does: the kernel's side of the transition system.

use super::call::{Inputs, Op, PollSet, Polled, Shape, Target};
use super::config::{Mutant, Reduction, Variant};
use super::machine::{Model, Outcome, Step, Violation, drain_epoch};
use super::state::{MAX_THREADS, OLD, State, Thread, WORDS, Word};

/// Takes each step that is possible, with the state it leads to.
pub trait Emit: FnMut(Step, Result<State, Violation>) {}
impl<F: FnMut(Step, Result<State, Violation>)> Emit for F {}

impl Model {
    pub fn thread_steps(&self, state: &State, a: usize, t: usize, emit: &mut impl Emit) {
        let thread = state.threads[a][t];
        if thread.pc == 0 {
            // Only the fault lets a second block start by itself, as soon as the launch exists.
            let behind = t > 0 && (thread.launch < state.threads[a][0].launch || state.threads[a][0].pc > 0);
            if self.config.has(Mutant::NoGridWait) && behind && thread.launch <= state.threads[a][0].launch {
                let mut next = *state;
                next.threads[a][t].pc = 1;
                // What has been stored is visible; what still runs is the fault.
                self.drain_window(&mut next, a);
                drain_epoch(&mut next.actors[a], t);
                let step = Step::Execute { actor: a as u8, thread: t as u8, op: Op::Read };
                let outcome = self.read_and_run(&mut next, a, t);
                emit(step, self.finish(next, outcome));
            }
            return;
        }
        let op = self.program(state, a, t, thread.launch)[thread.pc as usize - 1];
        let step = Step::Execute { actor: a as u8, thread: t as u8, op };
        match op {
            Op::Read if self.quiet(state, a, t) => self.quiet_steps(state, a, t, emit),
            Op::Read => {
                let mut next = *state;
                let outcome = self.read_and_run(&mut next, a, t);
                emit(step, self.finish(next, outcome));
            }
            Op::Barrier | Op::SecondBarrier => {
                if self.barrier_open(state, a, t, op) {
                    let mut next = *state;
                    next.threads[a][t].pc += 1;
                    let outcome = self.run(&mut next, a, t);
                    emit(step, self.finish(next, outcome));
                }
            }
            Op::Arrive => {
                let mut next = *state;
                self.arrive(&mut next, a, t);
                next.threads[a][t].pc += 1;
                let outcome = self.run(&mut next, a, t);
                emit(step, self.finish(next, outcome));
            }
            Op::Announce { to, line, inputs } => {
                if self.landed(state, a, t, inputs) {
                    let mut next = *state;
                    let outcome = self.push(&mut next, a, t, Target::Rank(to), line).and_then(|()| {
                        next.threads[a][t].pc += 1;
                        self.run(&mut next, a, t)
                    });
                    emit(step, self.finish(next, outcome));
                }
            }
            Op::Load { line } => self.load_steps(state, a, t, line, emit),
            Op::Poll { set, what } => self.poll_steps(state, a, t, set, what, emit),
            Op::Push { .. } | Op::Clear | Op::Advance | Op::Rearm { .. } => {
                unreachable!("done together with the step before")
            }
        }
    }

    pub fn read_and_run(&self, state: &mut State, a: usize, t: usize) -> Outcome {
        self.read(state, a, t);
        state.threads[a][t].pc += 1;
        self.run(state, a, t)
    }

    /// Executes what nobody can observe before a later step: issuing stores. Stops in front of the next visible step.
    pub fn run(&self, state: &mut State, a: usize, t: usize) -> Outcome {
        loop {
            let thread = state.threads[a][t];
            let ops = self.program(state, a, t, thread.launch);
            match ops.get(thread.pc as usize - 1) {
                None => return self.end(state, a, t),
                // Quiet: nothing but the epoch. What stands in front of its advance are sends.
                Some(Op::Push { .. }) if thread.quiet => {}
                Some(
                    Op::Announce { .. } | Op::Poll { .. } | Op::Load { .. } | Op::SecondBarrier | Op::Rearm { .. },
                ) if thread.quiet => {
                    return self.end(state, a, t);
                }
                Some(Op::Poll { .. } | Op::Load { .. }) if thread.unfinished => {}
                Some(&Op::Push { to, line }) => self.push(state, a, t, to, line)?,
                Some(Op::Advance) => self.advance(state, a, t),
                Some(Op::Clear) => self.clear(state, a, t)?,
                Some(&Op::Rearm { line }) => self.rearm(state, a, t, line),
                // What it waits for has landed: nothing is ever in flight.
                Some(&Op::Announce { to, line, .. }) if self.reduced() => {
                    self.push(state, a, t, Target::Rank(to), line)?
                }
                Some(Op::Read) if self.reduced() => {
                    self.read(state, a, t);
                    if state.threads[a][t].quiet && !self.config.quiet_at_once {
                        return self.end(state, a, t);
                    }
                }
                // Sound only because every thread of the launch has read by now: `launch` runs them all.
                Some(Op::Barrier) if self.reduced() => {}
                Some(_) => return Ok(()),
            }
            state.threads[a][t].pc += 1;
        }
    }

    pub fn end(&self, state: &mut State, a: usize, t: usize) -> Outcome {
        let launch = state.threads[a][t].launch + 1;
        state.threads[a][t] = Thread { launch, ..Thread::default() };
        let threads = &state.threads[a];
        if threads.iter().all(|t| t.pc == 0 && t.launch == launch) && !self.config.has(Mutant::NoGridWait) {
            state.actors[a].shape = 0;
            self.check_end(state, a, launch - 1)?;
        }
        Ok(())
    }

    pub fn block(&self, state: &State, a: usize, t: usize) -> (Shape, u8) {
        let shape = self.config.shapes[state.actors[a].shape as usize - 1];
        (shape, t as u8 / shape.block)
    }

    fn read(&self, state: &mut State, a: usize, t: usize) {
        let (_, block) = self.block(state, a, t);
        let lagged = self.config.variant == Variant::Lagged;
        let word = if lagged { 0 } else { block as usize };
        let epoch = state.actors[a].replica[word];
        let dirty = state.actors[a].dirty[self.stage(epoch + 2)];
        let quiet = self.quiet(state, a, t);
        let thread = &mut state.threads[a][t];
        thread.quiet = quiet;
        thread.epoch = epoch + 1;
        thread.dirty = if lagged { dirty } else { 0 };
    }

    fn barrier_open(&self, state: &State, a: usize, t: usize, barrier: Op) -> bool {
        let (shape, block) = self.block(state, a, t);
        let launch = state.threads[a][t].launch;
        let arrived = |other: usize| {
            let thread = state.threads[a][other];
            let ops = self.program(state, a, other, launch);
            let at = ops.iter().position(|&op| op == barrier).map_or(0, |p| p + 1);
            thread.launch > launch || thread.pc as usize >= at
        };
        (0..shape.threads()).filter(|&o| o / shape.block == block).all(|o| arrived(o as usize))
    }

    fn next_epoch(&self, epoch: u8) -> u8 {
        (epoch + 1) % self.config.epoch_modulus
    }

    /// The block writes epoch + 1 to each replica that is its own for this grid size.
    fn advance(&self, state: &mut State, a: usize, t: usize) {
        let (shape, block) = self.block(state, a, t);
        let epoch = self.next_epoch(state.threads[a][t].epoch - 1);
        for replica in 0..MAX_THREADS {
            let mine = if self.config.has(Mutant::OwnReplicaOnly) {
                replica as u8 == block
            } else {
                replica as u8 % shape.grid == block
            };
            if mine {
                state.actors[a].replica_store[replica] = epoch + 1;
            }
        }
    }

    fn arrive(&self, state: &mut State, a: usize, t: usize) {
        let (shape, _) = self.block(state, a, t);
        let thread = state.threads[a][t];
        state.actors[a].arrived += 1;
        if state.actors[a].arrived < shape.threads() {
            return;
        }
        let actor = &mut state.actors[a];
        actor.arrived = 0;
        // A last arriver that has not read yet (the fault) reads here what it needs to advance.
        let epoch = thread.epoch.checked_sub(1).unwrap_or(actor.replica[0]);
        actor.replica_store[0] = self.next_epoch(epoch) + 1;
        actor.dirty_store = actor.dirty;
        actor.dirty_store[self.stage(epoch + 2)] = 0;
        let call = state.calls[self.communicator(a)][thread.launch as usize] as usize - 1;
        let extent = self.config.calls[call].extent(self.config.ranks);
        state.actors[a].dirty_store[self.stage(epoch)] = extent;
    }

    fn clear(&self, state: &mut State, a: usize, t: usize) -> Outcome {
        let (shape, _) = self.block(state, a, t);
        let thread = state.threads[a][t];
        let call = state.calls[self.communicator(a)][thread.launch as usize] as usize - 1;
        let extent = if self.config.has(Mutant::ThisCallsSize) {
            self.config.calls[call].extent(self.config.ranks)
        } else {
            thread.dirty
        };
        let ahead = if self.config.has(Mutant::WrongStage) { 1 } else { 2 };
        let stage = self.stage(thread.epoch - 1 + ahead);
        for line in (t as u8..extent).step_by(shape.threads() as usize) {
            let index = self.size.index(self.window(a), stage, line as usize);
            for word in 0..WORDS {
                let before = state.memory[index][word];
                let live = (1..OLD).contains(&before.content()) && before.content() >= self.tag(a, thread.launch);
                if self.reduced() && live {
                    return Err(self.unordered(index));
                }
                state.memory[index][word] = before.with_pending();
            }
        }
        Ok(())
    }

    fn push(&self, state: &mut State, a: usize, t: usize, to: Target, line: u8) -> Outcome {
        let own = self.rank(a);
        let thread = state.threads[a][t];
        let stage = self.stage(thread.epoch - 1);
        let tag = if thread.unfinished { OLD } else { self.tag(a, thread.launch) };
        for rank in 0..self.config.ranks as usize {
            let addressed = match to {
                Target::Rank(r) => rank == r as usize,
                Target::Peers => rank != own,
                Target::All => true,
            };
            if !addressed {
                continue;
            }
            let window = self.window_of(self.communicator(a), rank);
            let index = self.size.index(window, stage, line as usize);
            for word in 0..WORDS {
                let before = state.memory[index][word];
                state.memory[index][word] = if self.reduced() {
                    // Merged send and landing: sound when nothing else can touch the word before its consumption.
                    if before != Word(0) {
                        return Err(self.unordered(index));
                    }
                    before.with_content(tag)
                } else {
                    before.send(tag, own as u32).ok_or(Violation::Drift)?
                };
            }
        }
        Ok(())
    }

    fn poll_steps(&self, state: &State, a: usize, t: usize, set: PollSet, what: Polled, emit: &mut impl Emit) {
        // The kernels re-arm once all lines of the poll have come. Where nobody gives up, each at once is the same.
        let together = self.may_give_up(a);
        if together {
            let mut next = *state;
            let outcome = self.give_up(&mut next, a, t);
            emit(Step::GiveUp { actor: a as u8, thread: t as u8 }, self.finish(next, outcome));
        }
        let stage = self.stage(state.threads[a][t].epoch - 1);
        let polled = if self.config.has(Mutant::OneWord) { 1 } else { WORDS };
        for k in 0..set.len as usize {
            let line = set.lines[k];
            let index = self.size.index(self.window(a), stage, line as usize);
            let taken = state.threads[a][t].mask & (1 << k) != 0;
            if taken || state.memory[index][..polled].iter().any(|w| w.content() == 0) {
                continue;
            }
            let mut next = *state;
            let outcome = self.expect(&mut next, a, t, self.window(a), line).and_then(|()| {
                next.threads[a][t].mask |= 1 << k;
                let complete = next.threads[a][t].mask + 1 == 1 << set.len;
                if !together {
                    self.rearm_polled(&mut next, a, t, line, what);
                } else if complete {
                    for &line in &set.lines[..set.len as usize] {
                        self.rearm_polled(&mut next, a, t, line, what);
                    }
                }
                if complete {
                    next.threads[a][t].mask = 0;
                    next.threads[a][t].pc += 1;
                    return self.run(&mut next, a, t);
                }
                Ok(())
            });
            let step = Step::Consume { actor: a as u8, thread: t as u8, stage: stage as u8, line };
            emit(step, self.finish(next, outcome));
        }
    }

    /// Whether all that this rank has stored into these inputs has reached its memory.
    fn landed(&self, state: &State, a: usize, t: usize, inputs: Inputs) -> bool {
        if self.config.has(Mutant::ArrivalWithoutInputs) {
            return true;
        }
        let stage = self.stage(state.threads[a][t].epoch - 1);
        let Inputs { shard, first, len } = inputs;
        let mine = move |r| (first..(first + len).min(shard)).map(move |i| r * shard + i);
        let lines = (0..self.config.ranks).flat_map(mine);
        let mut words = lines.flat_map(|line| state.memory[self.size.index(self.window(a), stage, line as usize)]);
        words.all(|word| !word.in_flight())
    }

    /// Each window's line is read at a moment of its own.
    fn load_steps(&self, state: &State, a: usize, t: usize, line: u8, emit: &mut impl Emit) {
        let stage = self.stage(state.threads[a][t].epoch - 1) as u8;
        for from in 0..self.config.ranks {
            if state.threads[a][t].mask & (1 << from) != 0 {
                continue;
            }
            let mut next = *state;
            let window = self.window_of(self.communicator(a), from as usize);
            let outcome = self.expect(&mut next, a, t, window, line).and_then(|()| {
                let thread = &mut next.threads[a][t];
                thread.mask |= 1 << from;
                if thread.mask + 1 == 1 << self.config.ranks {
                    thread.mask = 0;
                    thread.pc += 1;
                    return self.run(&mut next, a, t);
                }
                Ok(())
            });
            emit(Step::Load { actor: a as u8, thread: t as u8, from, stage, line }, self.finish(next, outcome));
        }
    }

    /// That all words of the line in this window are this launch's.
    fn expect(&self, state: &mut State, a: usize, t: usize, window: usize, line: u8) -> Outcome {
        let thread = state.threads[a][t];
        let stage = self.stage(thread.epoch - 1);
        let index = self.size.index(window, stage, line as usize);
        for word in 0..WORDS {
            let found = state.memory[index][word].content();
            if found != self.tag(a, thread.launch) {
                let (actor, launch, stage, word, found) =
                    (a as u8, thread.launch, stage as u8, word as u8, found as u8);
                return self.took_wrong(state, a, Violation::WrongWord { actor, launch, stage, line, word, found });
            }
        }
        Ok(())
    }

    fn rearm(&self, state: &mut State, a: usize, t: usize, line: u8) {
        let stage = self.stage(state.threads[a][t].epoch - 1);
        let index = self.size.index(self.window(a), stage, line as usize);
        for word in &mut state.memory[index] {
            *word = word.with_pending();
            // Peers load from here, so they could tell when it drains: at once is the moment that could do harm, and
            // the full search has all others.
            if self.config.reduction != Reduction::None {
                *word = word.drained();
            }
        }
    }

    /// Re-arms a line that was polled (immediate variant).
    fn rearm_polled(&self, state: &mut State, a: usize, t: usize, line: u8, what: Polled) {
        if let Polled::Results { inputs } = what {
            self.rearm(state, a, t, line - inputs);
        }
        let thread = state.threads[a][t];
        let stage = self.stage(thread.epoch - 1);
        let index = self.size.index(self.window(a), stage, line as usize);
        let skipped = match self.config.mutant {
            Some(Mutant::FixedSize(lines)) => line >= lines,
            Some(Mutant::OwnShardOnly) => what == Polled::Broadcast,
            _ => what == Polled::Arrivals,
        };
        if self.config.variant == Variant::Lagged || skipped {
            return;
        }
        let target = if self.config.has(Mutant::WrongStage) {
            self.size.index(self.window(a), self.stage(thread.epoch), line as usize)
        } else {
            index
        };
        for word in &mut state.memory[target] {
            *word = word.with_pending();
        }
    }
}
