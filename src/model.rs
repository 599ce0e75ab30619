//! What an AllReduce would cost where nobody has measured one: launch, hops, peers, links, and blocks that store and
//! poll. A handful of parameters, fitted to the times of the prototype on 2 and 4 H100 (`points`); `docs/scaling.md`
//! says what it predicts and how far it was off wherever it could be checked.
#![forbid(unsafe_code)]

mod check;
mod fit;
mod points;
mod show;

use crate::layout::Algorithm;

pub use check::{Error, left_out};
pub use fit::fit;
pub use points::POINTS;
pub use show::tables;

/// What is timed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum What {
    /// One-shot.
    OneShot,
    /// Two-shot.
    TwoShot,
    /// Two-shot whose sums the switch makes. Nobody has measured it: neither is it in the points.
    Switch,
    /// Stock NCCL.
    Stock,
}

impl What {
    /// An algorithm's; what goes through the ring is not modelled.
    pub fn of(algorithm: Algorithm) -> Option<Self> {
        Some(match algorithm {
            Algorithm::OneShot => Self::OneShot,
            Algorithm::TwoShot => Self::TwoShot,
            Algorithm::Switch => Self::Switch,
            Algorithm::Bulk => return None,
        })
    }
}

/// A kind of GPU and the links between several.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Its name.
    pub name: &'static str,
    /// Compute capability.
    pub arch: u32,
    /// What its links carry in one direction, by the data sheet, in GB/s.
    pub link: f64,
    /// Multiprocessors.
    pub sms: u32,
}

/// 18 links of NVLink 4.
pub const H100: Gpu = Gpu { name: "H100", arch: 90, link: 450.0, sms: 132 };
/// The links and multiprocessors of H100.
pub const H200: Gpu = Gpu { name: "H200", ..H100 };
/// 18 links of NVLink 5.
pub const B200: Gpu = Gpu { name: "B200", arch: 100, link: 900.0, sms: 148 };
/// The links of B200, up to 72 GPUs in one domain.
pub const GB200: Gpu = Gpu { name: "GB200", sms: 152, ..B200 };
/// All of them.
pub const GPUS: [Gpu; 4] = [H100, H200, B200, GB200];

/// One call, as the model sees it: in a captured graph, on an idle machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    /// Which algorithm.
    pub what: What,
    /// The GPUs.
    pub gpu: Gpu,
    /// Ranks, one per GPU, all in one NVLink domain. Hosts are no part of it: the path through the switch is the same.
    pub ranks: u32,
    /// Whether one store reaches all ranks.
    pub multicast: bool,
    /// Most blocks of a launch.
    pub blocks: u32,
    /// Without programmatic dependent launch.
    pub plain: bool,
    /// Payload per rank.
    pub bytes: u64,
}

/// A time that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Of what.
    pub case: Case,
    /// Microseconds.
    pub us: f64,
}

/// The parameters. Times in microseconds, rates in GB/s.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Parameters {
    /// Launch, epoch and end of one of our kernels.
    pub launch: f64,
    /// More of it without programmatic dependent launch.
    pub plain: f64,
    /// From a store to the poll that sees it.
    pub hop: f64,
    /// More of a hop for every further peer: another store to issue, another slot to poll.
    pub peer: f64,
    /// Share of the links' nominal rate that our stores reach.
    pub link: f64,
    /// What one block stores and polls.
    pub block: f64,
    /// Stock NCCL's latencies by those in its own cost model.
    pub stock_latency: f64,
    /// Share of the nominal rate that its protocols reach.
    pub stock_ll: f64,
    /// The second protocol.
    pub stock_ll128: f64,
    /// The third.
    pub stock_simple: f64,
}

/// Fitted to [`POINTS`]; a test fits again and compares.
pub const PARAMETERS: Parameters = Parameters {
    launch: 1.76,
    plain: 0.248,
    hop: 0.734,
    peer: 0.0732,
    link: 0.7605,
    block: 18.4,
    stock_latency: 0.9474,
    stock_ll: 0.3454,
    stock_ll128: 0.733,
    stock_simple: 0.7565,
};

/// Latency of a ring's start and of each of its steps in NCCL's own cost model, in microseconds, for LL, LL128, Simple.
const RING: [(f64, f64); 3] = [(6.6, 0.6), (14.0, 1.9), (8.4, 3.4)];
/// The same for NVLS, whose steps the switch takes.
const NVLS: f64 = 25.0;

/// Microseconds for so many bytes at so many GB/s.
fn transfer(bytes: f64, rate: f64) -> f64 {
    bytes / rate / 1e3
}

impl Parameters {
    /// The predicted time of a case, in microseconds.
    pub fn time(&self, case: &Case) -> f64 {
        match case.what {
            What::Stock => self.stock(case),
            What::OneShot => self.ours(case, 1.0),
            What::TwoShot => self.ours(case, 2.0),
            What::Switch => self.switch(case),
        }
    }

    fn ours(&self, case: &Case, hops: f64) -> f64 {
        let (n, payload) = (f64::from(case.ranks), case.bytes as f64);
        let peers = n - 1.0;
        // What a rank receives is the same with multicast: the switch copies, the last link carries every copy.
        let received = if hops > 1.0 { 2.0 * payload / n * peers } else { payload * peers };
        let stored = match (hops > 1.0, case.multicast) {
            (_, false) => received,
            (false, true) => payload,
            (true, true) => payload / n * peers + payload / n,
        };
        let blocks = f64::from(case.blocks.min(case.gpu.sms));
        let links = transfer(received, self.link * case.gpu.link);
        let work = transfer(stored + received, self.block * blocks);
        // With one store for all, the peers left in a hop are slots to poll: half of their cost, for want of a figure.
        let (scatter, broadcast) = (peers - 1.0, (peers - 1.0) * if case.multicast { 0.5 } else { 1.0 });
        let further = if hops > 1.0 { scatter + broadcast } else { broadcast };
        let launch = self.launch + if case.plain { self.plain } else { 0.0 };
        launch + hops * self.hop + further * self.peer + links.hypot(work)
    }

    /// Four hops instead of two: the arrivals, the load's way to the switch and the memories and its way back, the results.
    /// Arrivals cost per peer what one-shot's stores do. The links carry the own input out and one shard in for the
    /// sums, one shard out and the results in. Blocks copy the input, load and store a shard, poll the results.
    fn switch(&self, case: &Case) -> f64 {
        let (n, payload) = (f64::from(case.ranks), case.bytes as f64);
        let blocks = f64::from(case.blocks.min(case.gpu.sms));
        let links = transfer(payload * (1.0 + 1.0 / n), self.link * case.gpu.link);
        let work = transfer(payload * (2.0 + 2.0 / n), self.block * blocks);
        let further = (n - 2.0) * 1.5;
        let launch = self.launch + if case.plain { self.plain } else { 0.0 };
        launch + 4.0 * self.hop + further * self.peer + links.hypot(work)
    }

    fn stock(&self, case: &Case) -> f64 {
        let (n, payload) = (f64::from(case.ranks), case.bytes as f64);
        let steps = 2.0 * (n - 1.0);
        let shares = [self.stock_ll, self.stock_ll128, self.stock_simple];
        let ring = RING.iter().zip(shares).map(|((start, step), share)| {
            self.stock_latency * (start + step * steps) + transfer(steps / n * payload, share * case.gpu.link)
        });
        let ring = ring.fold(f64::INFINITY, f64::min);
        let nvls = self.stock_latency * NVLS + transfer(payload, self.stock_simple * case.gpu.link);
        if case.multicast && case.ranks > 2 { ring.min(nvls) } else { ring }
    }
}

/// The largest payload that is taken where nobody has measured: the memory of a communicator grows with it.
pub const CEILING: u64 = 4 << 20;
/// The largest payload that one-shot was measured to win at; beyond it the two are near each other.
const ONESHOT_CEILING: u64 = 512 << 10;
/// What must be won by the model's word before a call is taken from stock NCCL: about the model's own error.
pub const MARGIN: f64 = 1.25;
/// The smallest limit.
const FLOOR: u64 = 1 << 10;

/// The largest payloads, powers of two, for one-shot and for two-shot: as long as one-shot is the faster of the two, and
/// as long as the faster one beats stock NCCL by [`MARGIN`], without a gap below. Zero where nothing is won.
pub fn limits(parameters: &Parameters, gpu: Gpu, ranks: u32, multicast: bool, blocks: u32) -> (u64, u64) {
    let time = |what, bytes| parameters.time(&Case { what, gpu, ranks, multicast, blocks, plain: false, bytes });
    let sizes = || (0..).map(|power| FLOOR << power).take_while(|bytes| *bytes <= CEILING);
    let last = |holds: &dyn Fn(u64) -> bool| sizes().take_while(|bytes| holds(*bytes)).last().unwrap_or(0);
    let twoshot = last(&|bytes| {
        let best = time(What::OneShot, bytes).min(time(What::TwoShot, bytes));
        best * MARGIN <= time(What::Stock, bytes)
    });
    let oneshot = last(&|bytes| bytes <= ONESHOT_CEILING && time(What::OneShot, bytes) <= time(What::TwoShot, bytes));
    (oneshot.min(twoshot), twoshot)
}

/// The payloads, powers of two up to [`CEILING`], from which and to which sums are to be made in the switch: as long as
/// that is faster than two-shot with multicast at that payload and all larger ones, and beats stock NCCL by [`MARGIN`].
/// Zeros where two-shot has lost to stock NCCL before that begins.
pub fn switch_limits(parameters: &Parameters, gpu: Gpu, ranks: u32, blocks: u32) -> (u64, u64) {
    let time = |what, bytes| parameters.time(&Case { what, gpu, ranks, multicast: true, blocks, plain: false, bytes });
    let down = (0..).map(|power| CEILING >> power).take_while(|bytes| *bytes >= FLOOR);
    let from = down.take_while(|bytes| time(What::Switch, *bytes) < time(What::TwoShot, *bytes)).last().unwrap_or(0);
    let (_, twoshot) = limits(parameters, gpu, ranks, true, blocks);
    if from == 0 || from > twoshot {
        return (0, 0);
    }
    let up = (0..).map(|power| from << power).take_while(|bytes| *bytes <= CEILING);
    let to = up.take_while(|bytes| time(What::Switch, *bytes) * MARGIN <= time(What::Stock, *bytes)).last();
    to.map_or((0, 0), |to| (from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn case(what: What, ranks: u32, bytes: u64) -> Case {
        Case { what, gpu: H100, ranks, multicast: false, blocks: 32, plain: false, bytes }
    }

    #[test]
    fn the_parameters_are_those_that_the_points_give() {
        let fitted = fit(POINTS, &PARAMETERS);
        let pairs = |p: &Parameters| {
            let value = serde_json::to_value(p).unwrap();
            let map = value.as_object().unwrap().clone();
            map.into_iter().map(|(name, value)| (name, value.as_f64().unwrap())).collect::<Vec<_>>()
        };
        for ((name, fitted), (_, stored)) in pairs(&fitted).into_iter().zip(pairs(&PARAMETERS)) {
            assert!((fitted / stored - 1.0).abs() < 0.02, "{name}: fitted {fitted:.4}, stored {stored:.4}\n{fitted:?}");
        }
    }

    #[test]
    fn the_known_points_come_out_as_they_were_measured() {
        let errors: Vec<f64> = POINTS.iter().map(|p| (PARAMETERS.time(&p.case) / p.us).ln().abs()).collect();
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        assert!(mean < 0.10, "{mean}");
    }

    #[test]
    fn a_fit_finds_the_parameters_that_made_its_points() {
        let truth = Parameters { launch: 2.0, hop: 1.4, peer: 0.2, link: 0.6, block: 30.0, ..PARAMETERS };
        let made: Vec<_> = POINTS.iter().map(|p| Point { us: truth.time(&p.case), ..*p }).collect();
        let found = fit(&made, &PARAMETERS);
        for (found, truth) in [(found.launch, 2.0), (found.hop, 1.4), (found.peer, 0.2), (found.link, 0.6)] {
            assert!((found / truth - 1.0).abs() < 0.05, "{found} for {truth}");
        }
    }

    proptest! {
        #[test]
        fn more_bytes_or_more_ranks_never_cost_less(ranks in 2u32..72, bytes in 8u64..1 << 28, multicast: bool) {
            for what in [What::OneShot, What::TwoShot, What::Switch, What::Stock] {
                let base = Case { multicast, ..case(what, ranks, bytes) };
                let time = PARAMETERS.time(&base);
                prop_assert!(time.is_finite() && time > 0.0);
                let more = PARAMETERS.time(&Case { bytes: bytes + bytes / 8 + 1, ..base });
                prop_assert!(more >= time);
                // Where the switch adds, the links carry less with every rank.
                if ranks > 2 && what != What::Switch {
                    let more = PARAMETERS.time(&Case { ranks: ranks + 1, ..base });
                    prop_assert!(more >= time * 0.999);
                }
            }
        }

        #[test]
        fn multicast_never_costs_more(ranks in 2u32..72, bytes in 8u64..1 << 28) {
            for what in [What::OneShot, What::TwoShot, What::Stock] {
                let base = case(what, ranks, bytes);
                let with = PARAMETERS.time(&Case { multicast: true, ..base });
                prop_assert!(with <= PARAMETERS.time(&base) * 1.000_001);
            }
        }

        #[test]
        fn a_call_is_only_taken_where_it_wins_by_the_margin(ranks in 2u32..=72, multicast: bool, power in 10u32..22) {
            let (one, two) = limits(&PARAMETERS, B200, ranks, multicast, 32);
            prop_assert!(one <= two && two <= CEILING);
            let time = |what| PARAMETERS.time(&Case { gpu: B200, multicast, ..case(what, ranks, 1 << power) });
            if 1 << power <= two {
                let ours = time(if 1 << power <= one { What::OneShot } else { What::TwoShot });
                prop_assert!(ours * MARGIN <= time(What::Stock));
            }
        }
    }
}
