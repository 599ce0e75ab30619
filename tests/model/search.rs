//! Exhaustive search: breadth first for the shortest counterexample, depth first where only the verdict is wanted.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::config::{Config, Horizon};
use super::machine::{Model, Step, Violation};
use super::state::State;

/// What one exploration found.
pub struct Report {
    pub states: usize,
    pub transitions: usize,
    /// States in which every rank was between two launches and the stages were checked.
    pub rests: usize,
    pub time: Duration,
    pub counterexample: Option<Counterexample>,
}

pub struct Counterexample {
    pub violation: Violation,
    /// Each step with the base epoch at which it was taken.
    pub steps: Vec<(u32, Step)>,
}

/// The order in which states are taken up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Breadth,
    Depth,
}

/// Explores every state that the configuration can reach, or stops at the first violation.
pub fn explore(config: &Config, order: Order) -> Report {
    let started = Instant::now();
    let model = Model::new(config.clone());
    let initial = model.initial();
    let mut seen = Seen::new();
    let mut parents: Vec<(u32, u16)> = vec![(0, 0)];
    seen.insert(initial.fingerprint(model.size));
    let mut open = VecDeque::from([(initial, 0_u32)]);
    let mut report = Report { states: 1, transitions: 0, rests: 0, time: Duration::ZERO, counterexample: None };
    let mut failure = None;
    while let Some((state, id)) = match order {
        Order::Breadth => open.pop_front(),
        Order::Depth => open.pop_back(),
    } {
        let at_rest = model.all_done(&state);
        if at_rest {
            report.rests += 1;
            // A fault has to show harm to a result or to progress, not only an untidy end.
            if let (None, Err(violation)) = (config.mutant, model.rearmed(&state)) {
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
                    if seen.insert(next.fingerprint(model.size)) {
                        open.push_back((next, parents.len() as u32));
                        parents.push((id, choice));
                    }
                }
            }
        });
        report.transitions += possible as usize;
        let finished = at_rest && config.horizon != Horizon::Unbounded;
        if failure.is_none() && possible == 0 && !finished {
            failure = Some((Violation::Deadlock, id, None));
        }
        if failure.is_some() {
            break;
        }
    }
    report.states = parents.len();
    report.time = started.elapsed();
    report.counterexample = failure
        .map(|(violation, id, last)| Counterexample { violation, steps: replay(&model, path(&parents, id, last)) });
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

fn replay(model: &Model, choices: Vec<u16>) -> Vec<(u32, Step)> {
    let mut state: State = model.initial();
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
        steps.push((state.base, step));
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
