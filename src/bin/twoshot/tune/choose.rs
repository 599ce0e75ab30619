//! The limits that measured times speak for. Pure.
#![forbid(unsafe_code)]

use twoshot::layout::Algorithm;

/// Our time by stock NCCL's in the same run: below 1, ours is faster.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    pub eager: f64,
    pub graph: f64,
}

impl Ratio {
    /// Whether a call is captured is not known to the table: it must not be slower either way.
    fn worst(self) -> f64 {
        self.eager.max(self.graph)
    }

    fn mean_log(self) -> f64 {
        (self.eager.ln() + self.graph.ln()) / 2.0
    }
}

/// One size of one forced algorithm under one block budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub algorithm: Algorithm,
    pub blocks: u32,
    pub bytes: u64,
    pub ratio: Ratio,
    /// Stock and ours, captured, for the table.
    pub us: (f64, f64),
}

/// What to write down.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub blocks: u32,
    pub oneshot_bytes: u64,
    pub twoshot_bytes: u64,
    /// 0 where nothing goes through the ring.
    pub bulk_bytes: u64,
}

/// A smaller budget is taken when it costs no more than this at a size, on average: the rest of the GPU has other work.
const BUDGET_TOLERANCE: f64 = 0.02;

/// The best limits under each budget, and of those the smallest budget that is about as good as the best. `margin` is
/// the share by which stock NCCL must be beaten. Nothing without samples.
pub fn choose(samples: &[Sample], margin: f64) -> Option<Choice> {
    let mut sizes: Vec<u64> = samples.iter().map(|sample| sample.bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut budgets: Vec<u32> = samples.iter().map(|sample| sample.blocks).collect();
    budgets.sort_unstable();
    budgets.dedup();
    let scored: Vec<_> = budgets.iter().map(|blocks| limits(samples, &sizes, *blocks, margin)).collect();
    let best = scored.iter().map(|(_, score)| *score).fold(f64::INFINITY, f64::min);
    let enough = best + BUDGET_TOLERANCE * sizes.len() as f64;
    scored.into_iter().find(|(_, score)| *score <= enough).map(|(choice, _)| choice)
}

/// Limits under one budget, and the sum over all sizes of the logarithm of what a call then takes by stock NCCL's time.
fn limits(samples: &[Sample], sizes: &[u64], blocks: u32, margin: f64) -> (Choice, f64) {
    let of = |algorithm, bytes| {
        let mine = samples.iter().filter(|s| (s.algorithm, s.blocks, s.bytes) == (algorithm, blocks, bytes));
        mine.map(|sample| sample.ratio).min_by(|a, b| a.mean_log().total_cmp(&b.mean_log()))
    };
    // Two limits split all sizes: those under which they take least in all, not the first size where a noisy time says
    // otherwise. What has no time of two-shot, or behind that of bulk, is not taken there.
    let by = |one: u64, two: u64, bytes: u64| match bytes {
        _ if bytes <= one => Algorithm::OneShot,
        _ if bytes <= two => Algorithm::TwoShot,
        _ => Algorithm::Bulk,
    };
    let split = |(one, two): (u64, u64)| {
        let cost = |bytes: &u64| {
            let missing = if *bytes <= one { f64::INFINITY } else { 0.0 };
            of(by(one, two, *bytes), *bytes).map_or(missing, Ratio::mean_log)
        };
        sizes.iter().map(cost).sum::<f64>()
    };
    let edges = || std::iter::once(0).chain(sizes.iter().copied());
    let pairs = edges().flat_map(|one| edges().filter(move |two| *two >= one).map(move |two| (one, two)));
    let (oneshot, twoshot) = pairs.min_by(|a, b| split(*a).total_cmp(&split(*b))).unwrap_or((0, 0));
    let chosen = |bytes: u64| of(by(oneshot, twoshot, bytes), bytes);
    // Without a gap: a size that is lost ends it, whatever comes behind.
    let won = |bytes: &u64| chosen(*bytes).is_some_and(|ratio| ratio.worst() * (1.0 + margin) <= 1.0);
    let most = sizes.iter().copied().take_while(won).last().unwrap_or(0);
    let taken = sizes.iter().copied().take_while(|bytes| *bytes <= most);
    let score = taken.filter_map(chosen).map(Ratio::mean_log).sum();
    let bulk_bytes = if most > twoshot { most } else { 0 };
    (Choice { blocks, oneshot_bytes: oneshot.min(most), twoshot_bytes: twoshot.min(most), bulk_bytes }, score)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A ratio for sizes 1 K, 2 K, ... in order.
    fn column(algorithm: Algorithm, blocks: u32, ratios: &[f64]) -> Vec<Sample> {
        let sample = |(power, ratio): (usize, &f64)| Sample {
            algorithm,
            blocks,
            bytes: 1024 << power,
            ratio: Ratio { eager: *ratio, graph: *ratio },
            us: (1.0, *ratio),
        };
        ratios.iter().enumerate().map(sample).collect()
    }

    fn both(one: &[f64], two: &[f64]) -> Vec<Sample> {
        [column(Algorithm::OneShot, 32, one), column(Algorithm::TwoShot, 32, two)].concat()
    }

    fn limits_of(samples: &[Sample]) -> (u64, u64) {
        let choice = choose(samples, 0.03).unwrap();
        (choice.oneshot_bytes >> 10, choice.twoshot_bytes >> 10)
    }

    #[test]
    fn the_limits_lie_where_the_curves_cross() {
        assert_eq!(limits_of(&both(&[0.3, 0.3, 0.5, 0.9], &[0.4, 0.4, 0.4, 0.5])), (2, 8));
        assert_eq!(limits_of(&both(&[0.3, 0.3, 0.3, 0.3], &[0.4, 0.4, 0.4, 0.4])), (8, 8));
        assert_eq!(limits_of(&both(&[0.5, 0.5], &[0.4, 0.4])), (0, 2));
    }

    #[test]
    fn what_does_not_win_by_the_margin_goes_to_stock_and_so_does_all_behind_it() {
        assert_eq!(limits_of(&both(&[0.3, 0.3, 0.3, 0.3], &[0.9, 0.9, 0.9, 0.98])), (8, 8));
        assert_eq!(limits_of(&both(&[0.3, 0.99, 0.9, 0.9], &[0.4, 0.99, 0.3, 0.3])), (1, 1));
        assert_eq!(limits_of(&both(&[1.2, 0.3], &[1.1, 0.3])), (0, 0));
    }

    #[test]
    fn one_noisy_time_moves_no_limit_by_more_than_itself() {
        assert_eq!(limits_of(&both(&[0.3, 0.41, 0.3, 0.3, 0.9], &[0.4, 0.40, 0.4, 0.4, 0.4])), (8, 16));
    }

    #[test]
    fn slower_when_captured_is_slower() {
        let mut samples = both(&[0.3, 0.3], &[0.5, 0.5]);
        samples[1].ratio.graph = 1.05;
        samples[3].ratio.graph = 1.05;
        assert_eq!(limits_of(&samples), (1, 1));
    }

    #[test]
    fn sizes_that_one_shot_was_not_tried_at_are_two_shots() {
        assert_eq!(limits_of(&both(&[0.3], &[0.4, 0.4, 0.4])), (1, 4));
    }

    #[test]
    fn a_smaller_budget_is_taken_when_it_costs_next_to_nothing() {
        let budgets = |small: f64| {
            [
                column(Algorithm::TwoShot, 32, &[0.4, 0.4, 0.4]),
                column(Algorithm::TwoShot, 16, &[0.4, 0.4, small]),
                column(Algorithm::TwoShot, 8, &[0.4, 0.6, 0.9]),
            ]
            .concat()
        };
        assert_eq!(choose(&budgets(0.41), 0.03).unwrap().blocks, 16);
        assert_eq!(choose(&budgets(0.50), 0.03).unwrap().blocks, 32);
    }

    #[test]
    fn what_goes_through_the_ring_begins_where_it_is_faster_than_two_shot_and_ends_where_it_loses() {
        let choice = |two: &[f64], bulk: &[f64]| {
            let samples = [both(&[0.3, 0.5], two), column(Algorithm::Bulk, 32, bulk)].concat();
            let Choice { oneshot_bytes, twoshot_bytes, bulk_bytes, .. } = choose(&samples, 0.03).unwrap();
            (oneshot_bytes >> 10, twoshot_bytes >> 10, bulk_bytes >> 10)
        };
        assert_eq!(choice(&[0.6, 0.4, 0.4, 0.7, 0.9], &[2.0, 1.0, 0.8, 0.6, 0.7, 0.75, 1.1]), (1, 4, 32));
        assert_eq!(choice(&[0.6, 0.4, 0.4, 0.7, 0.9], &[2.0, 1.0, 0.8, 0.8, 0.95]), (1, 16, 0));
        // Two-shot was not tried at the largest.
        assert_eq!(choice(&[0.6, 0.4], &[2.0, 1.0, 0.8, 0.9]), (1, 2, 8));
    }

    #[test]
    fn nothing_timed_is_nothing_chosen() {
        assert_eq!(choose(&[], 0.03), None);
    }

    proptest! {
        #[test]
        fn limits_are_measured_sizes_in_order_and_every_size_below_was_won(
            one in prop::collection::vec(0.1f64..2.0, 1..12), two in prop::collection::vec(0.1f64..2.0, 1..12),
        ) {
            let samples = both(&one, &two);
            let choice = choose(&samples, 0.03).unwrap();
            prop_assert!(choice.oneshot_bytes <= choice.twoshot_bytes && choice.bulk_bytes == 0);
            for (power, bytes) in (0..12).map(|power| (power, 1024u64 << power)) {
                if bytes <= choice.twoshot_bytes {
                    let taken = if bytes <= choice.oneshot_bytes { &one } else { &two };
                    prop_assert!(taken[power] * 1.03 <= 1.0);
                }
            }
            let sizes: Vec<u64> = samples.iter().map(|sample| sample.bytes).chain([0]).collect();
            prop_assert!(sizes.contains(&choice.oneshot_bytes) && sizes.contains(&choice.twoshot_bytes));
        }
    }
}
