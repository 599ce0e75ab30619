//! Counterexamples in words.

use std::fmt::Write;

use super::config::{Config, Phase, Role};
use super::machine::{Model, Place, Step, Violation};
use super::state::{BAD, OLD, tagged};
use crate::model::search::Counterexample;

/// The run that ends in the violation.
pub fn render(config: &Config, found: &Counterexample<Model>) -> String {
    let model = Model::new(config.clone());
    let mut text = String::new();
    for (number, (base, step)) in found.steps.iter().enumerate() {
        let _ = writeln!(text, "  {:>3}. {}", number + 1, words(&model, *base, *step));
    }
    let base = found.steps.last().map_or(0, |(base, _)| *base);
    let _ = writeln!(text, "   => {}", verdict(&model, base, found.violation));
    text
}

fn who(model: &Model, place: Place) -> String {
    if model.config.channels == 1 {
        return format!("rank {}", place.rank);
    }
    format!("rank {}, channel {},", place.rank, place.channel)
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Scatter => "scatter",
        Phase::Broadcast => "broadcast",
    }
}

fn warp(role: Role, worker: u8) -> String {
    let role = match role {
        Role::Scatter => "scatterer",
        Role::Reduce => "reducer",
        Role::Collect => "collector",
    };
    format!("{role} {worker}")
}

fn payload(base: u32, value: u8) -> String {
    match (value, tagged(value)) {
        (_, Some((launch, chunk))) => format!("launch {} chunk {chunk}", base + u32::from(launch)),
        (BAD, _) => "something wrong".into(),
        (OLD, _) => "something old".into(),
        _ => "what was there before".into(),
    }
}

fn slot(model: &Model, slot: usize) -> String {
    let (lane, number) = model.layout.place(slot);
    let channel = if model.config.channels == 1 { String::new() } else { format!(", channel {}", lane.channel) };
    format!("{} slot {number} of window {} for rank {}{channel}", phase_name(lane.phase), lane.at, lane.source)
}

fn words(model: &Model, base: u32, step: Step) -> String {
    match step {
        Step::Launch { rank, call, grid } => {
            let call = &model.config.calls[call as usize];
            let parts = &call.parts[..model.ranks()];
            let place = if call.in_place { ", in place" } else { "" };
            format!("rank {rank} starts its next launch: parts of {parts:?} chunks, {grid} block(s){place}")
        }
        Step::Land { word, value } => {
            let (at, word) = (word / model.layout.words, word % model.layout.words);
            format!("{} lands in {} word {word}", payload(base, value), slot(model, at as usize))
        }
        Step::LandFlag { slot: at, value } => {
            format!("the flag of position {} lands in {}", value - 1, slot(model, at as usize))
        }
        Step::Tile { place, role, worker, tile } => {
            let more = if model.merged() { " and everything that follows from it is seen" } else { "" };
            format!("{} {} does tile {tile}{more}", who(model, place), warp(role, worker))
        }
        Step::OtherLanes { place, role, worker, tile } => {
            format!("{} {}: the other lanes do tile {tile}", who(model, place), warp(role, worker))
        }
        Step::LoadAhead { place, role, worker, value } => {
            format!("{} {} loads {} before it waits", who(model, place), warp(role, worker), payload(base, value))
        }
        Step::Raise { place, phase, chunk } => {
            format!("{} signaller sends the {} flags of chunk {chunk}", who(model, place), phase_name(phase))
        }
        Step::RaiseRest { place } => format!("{} signaller sends flags of all that is complete", who(model, place)),
        Step::See { place, phase, peer, chunk } => {
            format!("{} poller sees {} chunk {chunk} of rank {peer}", who(model, place), phase_name(phase))
        }
        Step::GiveUp { place, phase, peer, chunk } => {
            format!("{} poller gives up {} chunk {chunk} of rank {peer}", who(model, place), phase_name(phase))
        }
        Step::SayQuit { place } => format!("{} poller says that it gave up", who(model, place)),
    }
}

fn verdict(model: &Model, base: u32, violation: Violation) -> String {
    match violation {
        Violation::WrongWord { place, role, launch, chunk, from, word, found } => format!(
            "wrong data: {} {} of launch {} takes {} for chunk {chunk} of rank {from}, word {word}",
            who(model, place),
            warp(role, 0),
            base + u32::from(launch),
            payload(base, found),
        ),
        Violation::WrongResult { rank } => format!("rank {rank} ends a launch well, with a wrong result"),
        Violation::Deadlock => "deadlock: no step is possible and not every rank has finished".into(),
        Violation::Overwritten { slot: at } => {
            format!("{} is stored into before its chunk is known to be used", slot(model, at as usize))
        }
        Violation::FlagUnseen { slot: at } => {
            format!("the flag of {} is stored again before it was seen", slot(model, at as usize))
        }
        Violation::EndedAlone { rank } => format!("rank {rank} ends a launch that not every rank has begun"),
    }
}
