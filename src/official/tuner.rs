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
}

impl Limits {
    /// Of a communicator with so many ranks on so many hosts: measured ones where the user's file has them, else the rule.
    pub fn of(tuning: Option<&Tuning>, ranks: usize, hosts: usize) -> Self {
        let known = u32::try_from(ranks).ok().zip(u32::try_from(hosts).ok());
        let measured = tuning.zip(known).and_then(|(tuning, (ranks, hosts))| tuning.preferred(ranks, hosts));
        measured.map_or(Self { from: 0, to: LIMIT }, |one| Self { from: one.from_bytes, to: one.to_bytes })
    }
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
        return Advice::Untouched;
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
    const RULE: Limits = Limits { from: 0, to: LIMIT };

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
        assert_eq!(Limits::of(None, 4, 4), RULE);
        let tuning = file(4, 10, 20);
        assert_eq!(Limits::of(Some(&tuning), 4, 4), Limits { from: 10, to: 20 });
        for (ranks, hosts) in [(4, 2), (8, 4), (0, 0), (usize::MAX, 4)] {
            assert_eq!(Limits::of(Some(&tuning), ranks, hosts), RULE);
        }
    }

    proptest! {
        #[test]
        fn with_a_file_exactly_its_sizes_are_touched(from: u64, more: u64, bytes: u64, near in -2i64..3) {
            let to = from.saturating_add(more);
            let tuning = file(2, from, to);
            let limits = Limits::of(Some(&tuning), 2, 2);
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
