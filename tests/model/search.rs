//! Exhaustive search: breadth first for the shortest counterexample, depth first where only the verdict is wanted.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is searched: a transition system whose states are few enough to visit all of them.
pub trait Machine {
    type State: Copy;
    type Step: Copy;
    type Violation;

    fn initial(&self) -> Self::State;
    fn fingerprint(&self, state: &Self::State) -> u128;
    /// Calls `emit` with each step that is possible, and with the state it leads to; always in the same order.
    fn successors(&self, state: &Self::State, emit: impl FnMut(Self::Step, Result<Self::State, Self::Violation>));
    /// Whether nothing is under way on any rank.
    fn at_rest(&self, state: &Self::State) -> bool;
    /// What must hold in such a state.
    fn check_rest(&self, state: &Self::State) -> Result<(), Self::Violation>;
    /// What it means that no step is possible: nothing, if runs may end here.
    fn check_stuck(&self, state: &Self::State) -> Result<(), Self::Violation>;
    /// By how much launches have been renamed, for printing.
    fn base(&self, state: &Self::State) -> u32;
}

/// How long runs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Horizon {
    /// Runs end after this many launches of each communicator.
    Launches(u8),
    /// Runs never end; states that differ only in where the launches' count began are one state.
    Unbounded,
}

/// What one exploration found.
pub struct Report<M: Machine> {
    pub states: usize,
    pub transitions: usize,
    /// States in which every rank was between two launches, and which were checked.
    pub rests: usize,
    pub time: Duration,
    pub counterexample: Option<Counterexample<M>>,
}

pub struct Counterexample<M: Machine> {
    pub violation: M::Violation,
    /// Each step with the base epoch at which it was taken.
    pub steps: Vec<(u32, M::Step)>,
}

/// The order in which states are taken up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Breadth,
    Depth,
}

/// Explores every state that the machine can reach, or stops at the first violation.
pub fn explore<M: Machine>(model: &M, order: Order) -> Report<M> {
    let started = Instant::now();
    let initial = model.initial();
    let mut seen = Seen::new();
    let mut parents: Vec<(u32, u16)> = vec![(0, 0)];
    seen.insert(model.fingerprint(&initial));
    let mut open = VecDeque::from([(initial, 0_u32)]);
    let mut report = Report { states: 1, transitions: 0, rests: 0, time: Duration::ZERO, counterexample: None };
    let mut failure = None;
    while let Some((state, id)) = match order {
        Order::Breadth => open.pop_front(),
        Order::Depth => open.pop_back(),
    } {
        if model.at_rest(&state) {
            report.rests += 1;
            if let Err(violation) = model.check_rest(&state) {
                failure = Some((violation, id, None));
                break;
            }
        }
        let mut possible: u16 = 0;
        model.successors(&state, |_, next| {
            let choice = possible;
            possible += 1;
            match next {
                Err(violation) => failure = failure.take().or(Some((violation, id, Some(choice)))),
                Ok(next) => {
                    if seen.insert(model.fingerprint(&next)) {
                        open.push_back((next, parents.len() as u32));
                        parents.push((id, choice));
                    }
                }
            }
        });
        report.transitions += possible as usize;
        if possible == 0
            && let Err(violation) = model.check_stuck(&state)
        {
            failure = failure.or(Some((violation, id, None)));
        }
        if failure.is_some() {
            break;
        }
    }
    report.states = parents.len();
    report.time = started.elapsed();
    report.counterexample = failure
        .map(|(violation, id, last)| Counterexample { violation, steps: replay(model, path(&parents, id, last)) });
    report
}

fn path(parents: &[(u32, u16)], mut id: u32, last: Option<u16>) -> Vec<u16> {
    let mut choices: Vec<u16> = last.into_iter().collect();
    while id != 0 {
        let (parent, choice) = parents[id as usize];
        choices.push(choice);
        id = parent;
    }
    choices.reverse();
    choices
}

fn replay<M: Machine>(model: &M, choices: Vec<u16>) -> Vec<(u32, M::Step)> {
    let mut state = model.initial();
    let mut steps = Vec::new();
    for wanted in choices {
        let (mut at, mut taken) = (0, None);
        model.successors(&state, |step, next| {
            if at == wanted {
                taken = Some((step, next));
            }
            at += 1;
        });
        let (step, next) = taken.expect("a recorded choice is possible again");
        steps.push((model.base(&state), step));
        if let Ok(next) = next {
            state = next;
        }
    }
    steps
}

/// A set of fingerprints: open addressing, grown at two thirds.
struct Seen {
    slots: Vec<u128>,
    used: usize,
}

impl Seen {
    fn new() -> Self {
        Self { slots: vec![0; 1 << 12], used: 0 }
    }

    fn place(slots: &[u128], key: u128) -> usize {
        let mask = slots.len() - 1;
        let mut at = key as usize & mask;
        while slots[at] != 0 && slots[at] != key {
            at = (at + 1) & mask;
        }
        at
    }

    fn insert(&mut self, key: u128) -> bool {
        let key = key.max(1);
        let at = Self::place(&self.slots, key);
        if self.slots[at] == key {
            return false;
        }
        self.slots[at] = key;
        self.used += 1;
        if self.used * 3 > self.slots.len() * 2 {
            let mut grown = vec![0; self.slots.len() * 2];
            for &key in self.slots.iter().filter(|&&key| key != 0) {
                let at = Self::place(&grown, key);
                grown[at] = key;
            }
            self.slots = grown;
        }
        true
    }
}
