//! Ranks that give up (abort or deadline): what the thread leaves undone, and what the launches behind it do.
//!
//! Any thread that polls may give up at any moment. It leaves its launch: what it has not published stays unpublished, and
//! of the poll that it left nothing is re-armed. Other threads of the launch go on, until they give up too. A thread that
//! finds, together with the epoch, that one of its rank gave up in another launch is quiet: it leaves at once. The other
//! rule that is searched makes it quiet whatever launch that was, its own too; then it advances the epoch or does not.

use super::config::Mutant;
use super::kernel::Emit;
use super::machine::{Model, Outcome, Step, Violation};
use super::state::State;

impl Model {
    pub fn may_give_up(&self, a: usize) -> bool {
        self.config.may_give_up >> self.rank(a) & 1 != 0
    }

    pub fn anyone_gave_up(&self, state: &State) -> bool {
        state.actors[..self.size.actors].iter().any(|actor| actor.claim != 0)
    }

    /// Whether this thread, if it reads the epoch now, is quiet.
    pub fn quiet(&self, state: &State, a: usize, t: usize) -> bool {
        let actor = &state.actors[a];
        let (_, block) = self.block(state, a, t);
        match self.config.mutant {
            _ if actor.claim == 0 => false,
            Some(Mutant::LaunchesBehind(working)) => actor.behind > working,
            _ => self.config.quiet_at_once || actor.claim != actor.replica[block as usize] + 1,
        }
    }

    /// One thread gives up. The claim is there at once for those who claim it too, an atomic; other launches see its copies
    /// beside the epochs, and only once this one has ended.
    pub fn give_up(&self, state: &mut State, a: usize, t: usize) -> Outcome {
        let actor = &mut state.actors[a];
        if actor.claim == 0 {
            actor.claim = state.threads[a][t].epoch;
        }
        actor.wrong = false;
        if self.config.has(Mutant::PublishesUnfinished) {
            let thread = &mut state.threads[a][t];
            thread.unfinished = true;
            thread.mask = 0;
            thread.pc += 1;
            return self.run(state, a, t);
        }
        self.end(state, a, t)
    }

    /// A quiet thread leaves at once or, by the other rule, may go through the block's barrier and advance the epoch first.
    pub fn quiet_steps(&self, state: &State, a: usize, t: usize, emit: &mut impl Emit) {
        for &advances in &[false, true][..1 + usize::from(self.config.quiet_at_once)] {
            let mut next = *state;
            let outcome = if advances { self.read_and_run(&mut next, a, t) } else { self.end(&mut next, a, t) };
            emit(Step::Quiet { actor: a as u8, thread: t as u8 }, self.finish(next, outcome));
        }
    }

    /// What to make of a wrong word. It is a violation at once, but for a fault that is about giving up: there it is
    /// harm only if this rank's launch ends well. A rank that gave up has said that its results are not to be used.
    pub fn took_wrong(&self, state: &mut State, a: usize, violation: Violation) -> Outcome {
        if self.config.may_give_up == 0 || self.config.mutant.is_none() {
            return Err(violation);
        }
        let actor = &mut state.actors[a];
        actor.wrong = actor.claim == 0;
        Ok(())
    }

    /// The launch is over on this rank.
    pub fn check_end(&self, state: &State, a: usize, launch: u8) -> Outcome {
        if state.actors[a].wrong { Err(Violation::WrongResult { actor: a as u8, launch }) } else { Ok(()) }
    }
}
