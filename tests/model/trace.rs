//! Counterexamples in words.

use std::fmt::Write;

use super::call::Op;
use super::config::Config;
use super::machine::{Model, Step, Violation};
use super::search::Counterexample;
use super::state::{OLD, describe};

/// The run that ends in the violation. Words that land in one line one after the other share a line of text, and so do a
/// launch and the read that follows it at once.
pub fn render(config: &Config, found: &Counterexample<Model>) -> String {
    let model = Model::new(config.clone());
    let mut text = String::new();
    let mut number = 0;
    let mut rest = found.steps.as_slice();
    while let [(base, step), tail @ ..] = rest {
        rest = tail;
        number += 1;
        let _ = write!(text, "  {number:>2}. {}", words(&model, *base, *step));
        match (step, tail) {
            (Step::Land { index, .. }, [(_, Step::Land { index: next, word, .. }), ..]) if index == next => {
                let _ = write!(text, ", then word {word}");
                rest = &tail[1..];
            }
            (Step::Launch { actor, .. }, [(_, Step::Execute { actor: next, thread, op: Op::Read }), ..])
                if actor == next =>
            {
                let _ = write!(text, "; thread {thread} reads the epoch and sends");
                rest = &tail[1..];
            }
            _ => {}
        }
        text.push('\n');
    }
    let _ = writeln!(text, "   => {}", verdict(&model, &found.violation));
    text
}

fn who(model: &Model, actor: u8) -> String {
    let rank = model.rank(actor as usize);
    if model.config.communicators == 1 {
        return format!("rank {rank}");
    }
    let communicator = ["A", "B"][model.communicator(actor as usize)];
    format!("rank {rank}, communicator {communicator},")
}

fn payload(tag: u8, base: u32) -> String {
    match u32::from(tag) {
        0 => "the sentinel".into(),
        OLD => "old content".into(),
        tag @ 1..=7 => format!("payload of launch {}", base + tag - 1),
        tag => format!("payload of communicator B, launch {}", base + tag - 8),
    }
}

fn address(model: &Model, index: u8, word: u8) -> String {
    let (window, stage, line) = model.size.place(index as usize);
    format!("window {window} stage {stage} line {line} word {word}")
}

fn words(model: &Model, base: u32, step: Step) -> String {
    match step {
        Step::Fill { actor } => format!("{} fills its window with sentinels", who(model, actor)),
        Step::Launch { actor, call, shape } => {
            let shape = model.config.shapes[shape as usize];
            let call = describe(model.config.calls[call as usize]);
            let (grid, block) = (shape.grid, shape.block);
            format!("{} starts its next launch: {call}, {grid} block(s) of {block}", who(model, actor))
        }
        Step::Execute { actor, thread, op } => {
            let what = match op {
                Op::Read => "reads the epoch and sends its first lines",
                Op::Barrier | Op::SecondBarrier => "leaves the block's barrier",
                Op::Announce { .. } => "announces its inputs",
                Op::Load { .. } => "loads",
                Op::Rearm { .. } => "re-arms",
                Op::Arrive => "arrives at the counter",
                Op::Advance => "advances the epoch",
                Op::Clear => "clears",
                Op::Push { .. } => "sends",
                Op::Poll { .. } => "polls",
            };
            format!("{} thread {thread} {what}", who(model, actor))
        }
        Step::Consume { actor, thread, stage, line } => {
            format!("{} thread {thread} takes stage {stage} line {line}", who(model, actor))
        }
        Step::GiveUp { actor, thread } => format!("{} thread {thread} gives up and leaves", who(model, actor)),
        Step::Quiet { actor, thread } => {
            format!("{} thread {thread} finds that its rank gave up, and is quiet", who(model, actor))
        }
        Step::Load { actor, thread, from, stage, line } => {
            format!("{} thread {thread} loads stage {stage} line {line} of window {from}", who(model, actor))
        }
        Step::Land { index, word, tag, sender } => {
            format!("{} lands in {} (from rank {sender})", payload(tag, base), address(model, index, word))
        }
        Step::Drain { index, word } => {
            format!("buffered sentinel reaches {}", address(model, index, word))
        }
        Step::DrainEpoch { actor, replica } => {
            format!("{} epoch word {replica} reaches memory", who(model, actor))
        }
    }
}

fn verdict(model: &Model, violation: &Violation) -> String {
    match *violation {
        Violation::Deadlock => "deadlock: no step is possible and not every rank has finished".into(),
        Violation::WrongWord { actor, launch, stage, line, word, found } => format!(
            "wrong data: {} in launch {launch} takes {} from stage {stage} line {line} word {word}",
            who(model, actor),
            payload(found, 0),
        ),
        Violation::WrongResult { actor, launch } => {
            format!("wrong result: launch {launch} ends well on {}", who(model, actor))
        }
        Violation::NotRearmed { window, stage, line } => {
            format!("at rest, window {window} stage {stage} line {line} is not re-armed")
        }
        Violation::Unordered { window, stage, line } => {
            format!("window {window} stage {stage} line {line} is written before its re-arm is known to be over")
        }
        Violation::Drift => "too many stores of one word are under way: the ranks have drifted apart".into(),
    }
}
