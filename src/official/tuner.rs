//! What NCCL is told about costs: AllReduce through CollNet is preferred at the sizes of the table; nothing else is
//! touched. Pure.
//!
//! NCCL's ranks ask their tuners apart and have to get the same answer. So what a tuning file says is used only where the
//! ranks of a collective communicator have the same preferences: where they have not, there is no CollNet
//! (`collnet.rs`), and nothing to prefer.
#![forbid(unsafe_code)]

use crate::tuning::Tuning;

/// `ncclFuncAllReduce`.
pub const ALLREDUCE: i32 = 4;
/// `NCCL_ALGO_COLLNET_DIRECT` and `NCCL_ALGO_COLLNET_CHAIN`: rows of the cost table.
const COLLNET: [usize; 2] = [2, 3];

/// Largest AllReduce for which CollNet is preferred. A rule, not a measurement: on 4 H100 a collective network
/// that reduces nothing took 41 us at 1 KiB and 131 us at 1 MiB, NCCL's own choice over sockets 62 and 853.
pub const LIMIT: u64 = 256 << 20;

/// Sizes of AllReduce for which CollNet is preferred.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// The smallest.
    pub from: u64,
    /// The largest.
    pub to: u64,
    /// Channels that may be asked for; 0: NCCL takes as many as it likes.
    pub channels: u64,
}

impl Limits {
    /// Of a communicator with so many ranks on so many hosts: measured ones where the user's file has them, else the rule.
    /// `channels`: what every communicator has, because the user told NCCL so.
    pub fn of(tuning: Option<&Tuning>, ranks: usize, hosts: usize, channels: u32) -> Self {
        let known = u32::try_from(ranks).ok().zip(u32::try_from(hosts).ok());
        let measured = tuning.zip(known).and_then(|(tuning, (ranks, hosts))| tuning.preferred(ranks, hosts));
        // With several ranks on a host NCCL cuts otherwise.
        let channels = if ranks == hosts { u64::from(channels).min(TOGETHER) } else { 0 };
        let (from, to) = measured.map_or((0, LIMIT), |one| (one.from_bytes, one.to_bytes));
        Self { from, to, channels }
    }

    /// Channels with which NCCL hands over an AllReduce in the fewest requests; `None`: its own number is as good.
    pub fn channels(&self, bytes: u64) -> Option<i32> {
        let fewest = (1..=self.channels).min_by_key(|channels| requests(bytes, *channels))?;
        (bytes < OWN).then_some(i32::try_from(fewest).ok()?)
    }
}

/// Channels that NCCL puts into one request of a collective network.
const TOGETHER: u64 = 8;
/// From here on NCCL takes as many channels by itself: 640 threads of 512 bytes each.
const OWN: u64 = TOGETHER * 640 * 512;

/// Requests of an AllReduce with one rank on each host, as NCCL (2.20 to 2.30, read in its sources) cuts it: a chunk of a
/// channel is halved while there are few of them, and a request has one of every channel.
fn requests(bytes: u64, channels: u64) -> u64 {
    let few = |chunk: u64, least: u64| bytes / (channels * chunk) < least;
    let mut chunk = 256 << 10;
    for (least, smallest) in [(64, 128 << 10), (8, 64 << 10), (1, 32 << 10)] {
        while chunk > smallest && few(chunk, least) {
            chunk /= 2;
        }
    }
    bytes.div_ceil(channels * chunk)
}

/// What came of a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Advice {
    /// The table is as it was.
    Untouched,
    /// CollNet is the cheapest now.
    CollNet,
}

/// Lowers CollNet's costs below all others where the table of this library says so. `costs` are rows of `protocols`
/// times, row by algorithm; a negative time means "not available" and stays. Of several ways through CollNet the one that
/// NCCL holds for the cheapest stays the cheapest.
pub fn advise(limits: Limits, function: i32, bytes: u64, costs: &mut [f32], protocols: usize) -> Advice {
    if function != ALLREDUCE || bytes < limits.from || bytes > limits.to || protocols == 0 {
        return Advice::Untouched;
    }
    let least = |of_collnet: bool, costs: &[f32]| {
        let rows = costs.chunks_exact(protocols).enumerate();
        let rows = rows.filter(|(row, _)| COLLNET.contains(row) == of_collnet);
        rows.flat_map(|(_, row)| row).copied().filter(|time| *time >= 0.0).min_by(f32::total_cmp)
    };
    let Some(collnet) = least(true, costs) else { return Advice::Untouched };
    let Some(other) = least(false, costs) else { return Advice::Untouched };
    if collnet < other {
        return Advice::CollNet;
    }
    let factor = if collnet > 0.0 { 0.5 * other / collnet } else { 0.0 };
    for (row, times) in costs.chunks_exact_mut(protocols).enumerate() {
        if COLLNET.contains(&row) {
            times.iter_mut().filter(|time| **time >= 0.0).for_each(|time| *time *= factor);
        }
    }
    Advice::CollNet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuning::{FORMAT, Preferred};
    use proptest::prelude::*;

    const PROTOCOLS: usize = 3;
    const RULE: Limits = Limits { from: 0, to: LIMIT, channels: 0 };

    fn cheapest(costs: &[f32]) -> Option<usize> {
        let available = costs.iter().enumerate().filter(|(_, time)| **time >= 0.0);
        available.min_by(|a, b| a.1.total_cmp(b.1)).map(|(at, _)| at / PROTOCOLS)
    }

    #[test]
    fn the_cheaper_way_through_collnet_wins_over_cheaper_others_and_the_rest_stays() {
        let mut costs = vec![30.0, -1.0, 40.0, 12.0, 50.0, 20.0, -1.0, -1.0, 90.0, -1.0, -1.0, 60.0];
        let before = costs.clone();
        assert_eq!(advise(RULE, ALLREDUCE, 1 << 10, &mut costs, PROTOCOLS), Advice::CollNet);
        assert_eq!(cheapest(&costs), Some(3));
        assert_eq!(costs[..6], before[..6]);
        assert!(costs[8] > costs[11] && costs[6] == -1.0 && costs[7] == -1.0);
    }

    #[test]
    fn other_functions_sizes_beyond_the_table_and_costs_without_collnet_are_left_alone() {
        let table = vec![30.0, -1.0, 40.0, 12.0, 50.0, 20.0, -1.0, -1.0, 90.0];
        for (function, bytes) in [(0, 8), (2, 8), (3, 8), (ALLREDUCE, LIMIT + 1)] {
            let mut costs = table.clone();
            assert_eq!(advise(RULE, function, bytes, &mut costs, PROTOCOLS), Advice::Untouched);
            assert_eq!(costs, table);
        }
        let mut none = vec![30.0, -1.0, 40.0, 12.0, 50.0, 20.0, -1.0, -1.0, -1.0];
        assert_eq!(advise(RULE, ALLREDUCE, 8, &mut none, PROTOCOLS), Advice::Untouched);
        let mut short = vec![1.0; 4];
        assert_eq!(advise(RULE, ALLREDUCE, 8, &mut short, PROTOCOLS), Advice::Untouched);
        assert_eq!(advise(RULE, ALLREDUCE, 8, &mut [], 0), Advice::Untouched);
    }

    fn file(ranks: u32, from_bytes: u64, to_bytes: u64) -> Tuning {
        let one = Preferred { ranks, hosts: ranks, from_bytes, to_bytes, note: None };
        Tuning { format: FORMAT, rows: vec![], collnet: vec![one] }
    }

    #[test]
    fn a_file_without_this_world_and_no_file_mean_the_rule() {
        assert_eq!(Limits::of(None, 4, 4, 0), RULE);
        let tuning = file(4, 10, 20);
        assert_eq!(Limits::of(Some(&tuning), 4, 4, 0), Limits { from: 10, to: 20, channels: 0 });
        for (ranks, hosts) in [(4, 2), (8, 4), (0, 0), (usize::MAX, 4)] {
            assert_eq!(Limits::of(Some(&tuning), ranks, hosts, 0), RULE);
        }
    }

    #[test]
    fn channels_are_asked_for_only_where_the_user_gave_nccl_as_many_and_each_host_has_one_rank() {
        let given = |ranks, hosts, channels| Limits::of(None, ranks, hosts, channels).channels;
        assert_eq!([given(2, 2, 0), given(2, 2, 4), given(4, 4, 8), given(4, 4, 32), given(4, 2, 8)], [0, 4, 8, 8, 0]);
        let limits = |channels| Limits { channels, ..RULE };
        for bytes in [0, 1 << 10, 1 << 20, 64 << 20] {
            assert_eq!(limits(0).channels(bytes), None);
        }
        let few = [1 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];
        assert_eq!(
            few.map(|bytes| limits(8).channels(bytes)),
            [1, 1, 4, 8, 8, 8, 0].map(|n| Some(n).filter(|n| *n > 0))
        );
        assert_eq!(few.map(|bytes| requests(bytes, 8)), [1, 1, 1, 1, 2, 4, 8]);
        // What NCCL takes by itself: one channel for each 320 KiB.
        assert_eq!([requests(256 << 10, 1), requests(1 << 20, 3), requests(64 << 20, 4)], [4, 6, 64]);
    }

    proptest! {
        #[test]
        fn with_a_file_exactly_its_sizes_are_touched(from: u64, more: u64, bytes: u64, near in -2i64..3) {
            let to = from.saturating_add(more);
            let tuning = file(2, from, to);
            let limits = Limits::of(Some(&tuning), 2, 2, 0);
            for bytes in [bytes, from.saturating_add_signed(near), to.saturating_add_signed(near)] {
                let mut costs = vec![30.0, -1.0, 40.0, 12.0, 50.0, 20.0, -1.0, -1.0, 90.0];
                let before = costs.clone();
                let inside = (from..=to).contains(&bytes);
                let advice = advise(limits, ALLREDUCE, bytes, &mut costs, PROTOCOLS);
                prop_assert_eq!(advice == Advice::CollNet, inside);
                prop_assert_eq!(costs == before, !inside);
            }
        }

        #[test]
        fn no_number_of_channels_up_to_the_limit_gives_fewer_requests(bytes in 0..OWN, most in 1..9u64) {
            let advised = Limits { channels: most, ..RULE }.channels(bytes).expect("a number") as u64;
            prop_assert!((1..=most).contains(&advised));
            for channels in 1..=most {
                let (asked, other) = (requests(bytes, advised), requests(bytes, channels));
                prop_assert!(asked < other || (asked == other && advised <= channels), "{} {}", advised, channels);
            }
        }

        #[test]
        fn whatever_the_costs_only_collnets_change_and_the_winner_is_available(
            costs in prop::collection::vec(prop_oneof![Just(-1.0f32), 0.0f32..1e6], 0..8 * PROTOCOLS),
            bytes: u64,
        ) {
            let mut after = costs.clone();
            let advice = advise(RULE, ALLREDUCE, bytes, &mut after, PROTOCOLS);
            for (at, (old, new)) in costs.iter().zip(&after).enumerate() {
                prop_assert!(old == new || (COLLNET.contains(&(at / PROTOCOLS)) && *old >= 0.0 && *new >= 0.0));
            }
            if advice == Advice::CollNet {
                let whole = after.len() / PROTOCOLS * PROTOCOLS;
                let least = |rows: bool| after[..whole].iter().enumerate()
                    .filter(|(at, time)| COLLNET.contains(&(at / PROTOCOLS)) == rows && **time >= 0.0)
                    .map(|(_, time)| *time).min_by(f32::total_cmp).unwrap();
                prop_assert!(least(true) <= least(false));
            }
        }
    }
}
