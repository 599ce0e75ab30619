//! How long a call takes: eager calls between two events, and replays of a captured graph of calls.
//!
//! Stock and routed take turns, repetition by repetition, so that whatever changes in the machine meets both. Every
//! repetition begins behind a barrier that the GPUs pass together.
#![forbid(unsafe_code)]

use std::time::Instant;

use crate::cuda::{Event, Graph};
use crate::element::Reduction;
use crate::protocol::Samples;
use crate::rank::{Path, Place, Rank};

/// Calls of one repetition: many where a call takes microseconds, few where it takes milliseconds.
fn calls(bytes: u64) -> u32 {
    match bytes {
        0..=0x1_0000 => 100,
        0x1_0001..=0x10_0000 => 50,
        0x10_0001..=0x100_0000 => 20,
        _ => 5,
    }
}

/// Where the data of the timed calls lies on this rank.
fn place(rank: &Rank, what: Reduction) -> Place {
    let shift = if rank.task.plan.unaligned { shift(rank.task.rank, what.size() as u64) } else { 0 };
    Place { in_place: false, input_shift: shift, output_shift: shift }
}

/// Bytes behind a multiple of 16, never none.
fn shift(rank: u32, size: u64) -> u64 {
    size * (1 + u64::from(rank) % (16 / size - 1))
}

/// Times a size: stock and routed.
pub fn both(rank: &mut Rank, what: Reduction, count: u64) -> Result<(Samples, Samples), String> {
    let bytes = count * what.size() as u64;
    let calls = rank.task.plan.calls.unwrap_or_else(|| calls(bytes)).max(1);
    rank.step(&format!("timing {} {}", what.name(), crate::sizes::format(bytes)));
    let paths = [Path::Stock, Path::Routed];
    let graph = |path| rank.graph(path, what, count, place(rank, what), calls);
    let graphs = [graph(Path::Stock)?, graph(Path::Routed)?];
    let mut samples = [Samples::default(), Samples::default()];
    for repetition in 0..=rank.task.plan.repetitions {
        for (which, path) in paths.into_iter().enumerate() {
            let (eager, host) = eager(rank, path, what, count, calls)?;
            let replay = replay(rank, &graphs[which], calls)?;
            // The first repetition warms up: clocks, lazy loading, first touches.
            if repetition > 0 {
                samples[which].eager.push(eager);
                samples[which].host.push(host);
                samples[which].graph.push(replay);
            }
        }
    }
    let [stock, routed] = samples;
    Ok((stock, routed))
}

/// Microseconds per call on the GPU and on the host.
fn eager(rank: &Rank, path: Path, what: Reduction, count: u64, calls: u32) -> Result<(f64, f64), String> {
    let (begin, end) = start(rank)?;
    let clock = Instant::now();
    let place = place(rank, what);
    for _ in 0..calls {
        rank.call(path, what, count, place)?;
    }
    let host = clock.elapsed().as_secs_f64() * 1e6 / f64::from(calls);
    Ok((stop(rank, &begin, &end)? / f64::from(calls), host))
}

fn replay(rank: &Rank, graph: &Graph, calls: u32) -> Result<f64, String> {
    let (begin, end) = start(rank)?;
    graph.launch(rank.raw_stream())?;
    Ok(stop(rank, &begin, &end)? / f64::from(calls))
}

/// Host and device barrier, then the first event.
fn start(rank: &Rank) -> Result<(Event, Event), String> {
    let events = (Event::new()?, Event::new()?);
    rank.agree(1)?;
    rank.device_barrier()?;
    events.0.record(rank.raw_stream())?;
    Ok(events)
}

fn stop(rank: &Rank, begin: &Event, end: &Event) -> Result<f64, String> {
    end.record(rank.raw_stream())?;
    end.wait(|| rank.stock.async_error().and_then(|()| rank.routed.async_error()))?;
    end.since(begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unaligned_buffers_begin_at_elements_and_never_at_a_multiple_of_16_bytes() {
        for size in [1, 2, 4, 8] {
            let shifts: Vec<u64> = (0..72).map(|rank| shift(rank, size)).collect();
            assert!(shifts.iter().all(|shift| shift % size == 0 && (1..16).contains(shift)), "{size}: {shifts:?}");
            assert!(size == 8 || shifts.iter().any(|other| *other != shifts[0]), "{size}");
        }
    }
}
