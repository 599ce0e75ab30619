//! How far the model is off where it can be checked: on points it was not fitted to, and on what others published.

use super::{B200, Case, GB200, Gpu, H100, Parameters, Point, What, fit};

/// Relative errors of some predictions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Error {
    /// Mean of the absolute errors, as a share.
    pub mean: f64,
    /// The largest.
    pub worst: f64,
    /// How many points.
    pub points: usize,
}

impl Error {
    /// Of predictions for points.
    pub fn of<'a>(parameters: &Parameters, points: impl Iterator<Item = &'a Point>) -> Self {
        let errors: Vec<f64> = points.map(|point| (parameters.time(&point.case) / point.us - 1.0).abs()).collect();
        let mean = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
        Self { mean, worst: errors.iter().copied().fold(0.0, f64::max), points: errors.len() }
    }
}

/// Fits without the points for which `out` gives the same key, and predicts those: for every key.
pub fn left_out<K: PartialEq + Copy>(
    points: &[Point],
    start: &Parameters,
    out: impl Fn(&Point) -> K,
) -> Vec<(K, Error)> {
    let mut keys: Vec<K> = Vec::new();
    for point in points {
        if !keys.contains(&out(point)) {
            keys.push(out(point));
        }
    }
    let error = |key: K| {
        let kept: Vec<_> = points.iter().filter(|point| out(point) != key).copied().collect();
        Error::of(&fit(&kept, start), points.iter().filter(|point| out(point) == key))
    };
    keys.into_iter().map(|key| (key, error(key))).collect()
}

/// A time that somebody else published.
pub(super) struct Published {
    pub source: &'static str,
    pub case: Case,
    pub us: f64,
    /// Why it is not quite the same thing.
    pub differs: &'static str,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn published(
    source: &'static str,
    differs: &'static str,
    (what, gpu, ranks, multicast, blocks): (What, Gpu, u32, bool, u32),
    times: &[(u64, f64)],
) -> Vec<Published> {
    let case = |bytes| Case { what, gpu, ranks, multicast, blocks, plain: true, bytes };
    times.iter().map(|(bytes, us)| Published { source, case: case(*bytes), us: *us, differs }).collect()
}

/// Published AllReduce times inside one NVLink domain, of algorithms that the model knows.
#[allow(clippy::approx_constant, reason = "6.28 us is a time that somebody measured")]
pub(super) fn all() -> Vec<Published> {
    use What::{OneShot, Stock, TwoShot};
    let nccl = "NCCL, custom_algos example, poison";
    let few = "4 blocks, no input barrier";
    let window = "registered windows: other kernels than stock's";
    let fused = "64 x 7168 bf16, fused with a norm; floor of 13 us";
    let plot = "read off a plot; NVLS may be in it";
    [
        published(
            nccl,
            few,
            (TwoShot, GB200, 4, true, 4),
            &[(KIB, 5.81), (32 * KIB, 6.20), (256 * KIB, 7.28), (MIB, 17.67)],
        ),
        published(
            nccl,
            few,
            (TwoShot, GB200, 8, true, 4),
            &[(KIB, 5.74), (64 * KIB, 6.28), (256 * KIB, 7.29), (512 * KIB, 8.86), (MIB, 14.0)],
        ),
        published("tokenspeed #1234", fused, (OneShot, GB200, 8, true, 32), &[(896 * KIB, 19.0)]),
        published("tokenspeed #1234", fused, (OneShot, GB200, 16, true, 32), &[(896 * KIB, 32.7)]),
        published("tokenspeed #1234", fused, (TwoShot, GB200, 8, true, 32), &[(896 * KIB, 14.0)]),
        published("tokenspeed #1234", fused, (TwoShot, GB200, 16, true, 32), &[(896 * KIB, 15.0)]),
        published(
            "MSCCL++ documentation, NCCL's line",
            plot,
            (Stock, H100, 8, true, 24),
            &[(4 * KIB, 15.3), (64 * KIB, 17.8), (256 * KIB, 18.5), (512 * KIB, 19.0), (MIB, 24.0)],
        ),
        published(
            "Triton-distributed #57, NCCL",
            "eager, through PyTorch",
            (Stock, H100, 8, true, 24),
            &[(16 * KIB, 20.7), (MIB, 32.4), (16 * MIB, 135.7)],
        ),
        published(
            "NCCL, custom_algos example, NCCL's column",
            window,
            (Stock, GB200, 8, true, 24),
            &[(KIB, 9.16), (64 * KIB, 16.63), (256 * KIB, 14.76), (MIB, 18.16)],
        ),
        published(
            "vLLM #37756, pynccl",
            "B300/GB300, number of ranks not stated (8 assumed), eager",
            (Stock, B200, 8, true, 24),
            &[(16 * KIB, 29.0), (MIB, 27.0), (8 * MIB, 80.0), (64 * MIB, 219.0)],
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{PARAMETERS, POINTS};

    #[test]
    fn a_payload_size_that_was_left_out_is_predicted() {
        for (bytes, error) in left_out(POINTS, &PARAMETERS, |point| point.case.bytes) {
            assert!(error.mean < 0.30, "{bytes}: {error:?}");
        }
    }

    #[test]
    fn an_error_is_relative_and_its_worst_is_not_its_mean() {
        let point = |us| Point { us, ..POINTS[0] };
        let time = PARAMETERS.time(&POINTS[0].case);
        let error = Error::of(&PARAMETERS, [point(time), point(time / 2.0)].iter());
        assert!((error.mean - 0.5).abs() < 1e-9 && (error.worst - 1.0).abs() < 1e-9 && error.points == 2);
    }
}
