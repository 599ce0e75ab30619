//! Least squares of relative errors by coordinate search: ten parameters, all positive, so their logarithms are free.

use super::{Parameters, Point};

fn knobs(p: &mut Parameters) -> [&mut f64; 10] {
    let Parameters { launch, plain, hop, peer, link, block, stock_latency, stock_ll, stock_ll128, stock_simple } = p;
    [launch, plain, hop, peer, link, block, stock_latency, stock_ll, stock_ll128, stock_simple]
}

fn cost(parameters: &Parameters, points: &[Point]) -> f64 {
    points.iter().map(|point| (parameters.time(&point.case) / point.us).ln().powi(2)).sum()
}

/// The parameters near `start` under which the points are most likely. What the points say nothing about stays.
pub fn fit(points: &[Point], start: &Parameters) -> Parameters {
    let (mut best, mut least) = (*start, cost(start, points));
    let mut step = 0.2_f64;
    // Every round that gains nothing halves the step; narrow valleys take many rounds.
    let mut rounds = 0;
    while step > 1e-4 && rounds < 20_000 {
        let before = least;
        rounds += 1;
        for knob in 0..10 {
            for factor in [step.exp(), (-step).exp()] {
                let mut tried = best;
                *knobs(&mut tried)[knob] *= factor;
                let cost = cost(&tried, points);
                if cost < least {
                    (best, least) = (tried, cost);
                    break;
                }
            }
        }
        if least > before * (1.0 - 1e-6) {
            step /= 2.0;
        }
    }
    best
}
