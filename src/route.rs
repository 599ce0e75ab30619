//! The decision: which path a call takes. A pure function of the call and of what all ranks agreed on.
//!
//! Nothing that may differ between ranks enters here: no address, no placement, no clock, no local memory.
#![forbid(unsafe_code)]

use crate::call::{Call, Class, DataType, Factor, ReduceOp};
use crate::layout::{Algorithm, LINE, Layout, MAX_BLOCKS, MAX_THREADS};

/// What the ranks of a ready communicator agreed on: the same value on every rank.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Agreement {
    /// Ranks of the communicator.
    pub ranks: u32,
    /// Stage sizes.
    pub layout: Layout,
    /// Smallest payload taken, in bytes.
    pub min_bytes: u64,
    /// Largest payload of one-shot, in bytes.
    pub oneshot_bytes: u64,
    /// Largest payload of two-shot, in bytes.
    pub twoshot_bytes: u64,
    /// Smallest payload above one-shot's whose sum the switch makes, in bytes; [`NEVER`] where it makes none.
    pub switch_bytes: u64,
    /// The largest of them.
    pub switch_max_bytes: u64,
    /// Largest part of it that one launch reduces.
    pub piece_bytes: u64,
    /// Largest payload that goes through the ring, in bytes, whatever the lines of the others carry: all above two-shot's
    /// do. 0 where there is no ring.
    pub bulk_bytes: u64,
    /// Largest payload of a pre-multiplied sum, in bytes; 0 where they are stock NCCL's.
    pub scaled_bytes: u64,
    /// Most blocks of a launch: the smallest budget of all ranks.
    pub blocks: u32,
    /// The same for payloads up to [`SMALL`].
    pub small_blocks: u32,
}

/// [`Agreement::switch_bytes`] of ranks without it.
pub const NEVER: u64 = u64::MAX;

/// Up to this payload latency counts, and a launch is over before others miss its multiprocessors.
pub const SMALL: u64 = 1 << 20;

/// Most of a payload that one launch moves through the ring: all that was ever routed. One launch could move any.
const BULK_PIECE: u64 = 128 << 20;

/// From this payload on the ring, whose lines are whole, is faster than lines that carry half: docs/performance.md.
const WHOLE_LINES: u64 = 1 << 20;

/// The largest payload of 8-bit floats through the ring: their conversions take longer than the links, and stock NCCL's reads
/// less. Where nothing but the ring is allowed, all go.
const FP8_MOST: u64 = 4 << 20;

/// Launches begin at multiples of so many carried bytes, so that all of them see the buffers' alignment.
const PIECE_ALIGN: u64 = 128;

/// Why a call stays with stock NCCL.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Reason {
    /// Nothing to do for a count of zero; stock checks the arguments.
    Empty,
    /// The element type has no kernel.
    Type,
    /// The operation has no kernel.
    Operation,
    /// Above the cross-over, or outside the sizes the user allowed.
    Size,
    /// The communicator is not set up yet.
    NotReady,
    /// The communicator was declined at set-up.
    Declined,
    /// The call has a configuration of its own, which speaks of stock NCCL's algorithms.
    Configured,
}

impl Reason {
    /// All reasons, in the order of the counters.
    pub const ALL: [Self; 7] =
        [Self::Empty, Self::Type, Self::Operation, Self::Size, Self::NotReady, Self::Declined, Self::Configured];

    /// The word used in log lines and statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Type => "type",
            Self::Operation => "operation",
            Self::Size => "size",
            Self::NotReady => "not-ready",
            Self::Declined => "declined",
            Self::Configured => "configured",
        }
    }
}

/// How a routed call runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Plan {
    /// Which algorithm.
    pub algorithm: Algorithm,
    /// Which kernels.
    pub class: Class,
    /// Element type.
    pub dtype: DataType,
    /// Reduction.
    pub op: ReduceOp,
    /// Blocks of the launch.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Most elements of one launch: a larger call is several.
    pub piece: u64,
    /// What the input is multiplied by first, in a launch of its own.
    pub factor: Option<Factor>,
}

/// The verdict.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Route {
    /// Our kernel.
    Routed(Plan),
    /// Stock NCCL, untouched.
    Stock(Reason),
}

/// Decides one call.
pub fn decide(call: &Call, agreed: &Agreement) -> Route {
    if call.count == 0 {
        return Route::Stock(Reason::Empty);
    }
    let Some(class) = call.class() else {
        return Route::Stock(if call.op.known() { Reason::Type } else { Reason::Operation });
    };
    let Some(payload) = call.dtype.size().and_then(|size| size.checked_mul(call.count)) else {
        return Route::Stock(Reason::Size);
    };
    // The limits are about what the links carry: twice the payload where a line holds half as much.
    let Some(bytes) = class.packing().carried(payload) else {
        return Route::Stock(Reason::Size);
    };
    if payload < agreed.min_bytes {
        return Route::Stock(Reason::Size);
    }
    let whole = agreed.twoshot_bytes < bytes || (bytes > payload && payload >= WHOLE_LINES);
    let algorithm = if bytes <= agreed.oneshot_bytes {
        Algorithm::OneShot
    } else if class.specialised() && (agreed.switch_bytes..=agreed.switch_max_bytes).contains(&bytes) {
        Algorithm::Switch
    } else if whole && payload <= agreed.bulk_bytes {
        return bulk(call, class, payload, agreed);
    } else if bytes <= agreed.twoshot_bytes {
        Algorithm::TwoShot
    } else {
        return Route::Stock(Reason::Size);
    };
    let (carried, piece) = match algorithm {
        Algorithm::TwoShot | Algorithm::Switch if bytes > agreed.piece_bytes => {
            let carried = agreed.piece_bytes / PIECE_ALIGN * PIECE_ALIGN;
            (carried, class.packing().payload(carried) / (payload / call.count))
        }
        _ => (bytes, call.count),
    };
    let Some(shape) = agreed.layout.fit(algorithm, carried).filter(|_| piece > 0) else {
        return Route::Stock(Reason::Size);
    };
    let budget = if bytes <= SMALL { agreed.small_blocks } else { agreed.blocks };
    let (blocks, threads) = grid(shape.work, budget);
    Route::Routed(Plan { algorithm, class, dtype: call.dtype, op: call.op, blocks, threads, piece, factor: None })
}

/// Through the ring, where every line is all payload.
fn bulk(call: &Call, class: Class, payload: u64, agreed: &Agreement) -> Route {
    if class == Class::Fp8 && payload > FP8_MOST && agreed.twoshot_bytes > 0 {
        return Route::Stock(Reason::Size);
    }
    let layout = &agreed.layout;
    let (Some(ring), Some(shape)) = (layout.ring(), layout.fit(Algorithm::Bulk, payload.min(BULK_PIECE))) else {
        return Route::Stock(Reason::Size);
    };
    let blocks = u32::try_from(shape.work).unwrap_or(u32::MAX).clamp(1, ring.channels);
    Route::Routed(Plan {
        algorithm: Algorithm::Bulk,
        class,
        dtype: call.dtype,
        op: call.op,
        blocks,
        threads: MAX_THREADS,
        piece: (BULK_PIECE / (payload / call.count)).min(call.count),
        factor: None,
    })
}

/// Decides a pre-multiplied sum, whose `op` says nothing: it is the sum of the products, within limits of its own. The
/// factor may differ between ranks and decides nothing.
pub fn decide_scaled(call: &Call, factor: Factor, agreed: &Agreement) -> Route {
    if agreed.scaled_bytes == 0 {
        return Route::Stock(Reason::Operation);
    }
    let carried = |plan: Plan| match plan.algorithm {
        Algorithm::Bulk => Some(call.bytes()),
        _ => plan.class.packing().carried(call.bytes()),
    };
    match decide(&Call { op: ReduceOp::SUM, ..*call }, agreed) {
        Route::Routed(plan) if carried(plan).is_none_or(|bytes| bytes > agreed.scaled_bytes) => {
            Route::Stock(Reason::Size)
        }
        Route::Routed(plan) => Route::Routed(Plan { factor: Some(factor), ..plan }),
        stock => stock,
    }
}

/// How the input of a pre-multiplied sum is passed over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pass {
    /// Elements before both buffers are at a line's boundary, all of them where they never are.
    pub head: u64,
    /// Blocks of the launch.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
}

/// Lines that a thread of the pass takes at a time.
const PASS_BATCH: u64 = 4;

/// The pass over `count` elements of `size` bytes. A rank's own matter: it concerns nobody's lines.
pub fn pass(input: u64, output: u64, count: u64, size: u64) -> Pass {
    let alike = (input ^ output).is_multiple_of(LINE);
    let head = if alike { ((input.wrapping_neg() % LINE) / size.max(1)).min(count) } else { count };
    let work = if alike { (count.saturating_mul(size) / LINE).div_ceil(PASS_BATCH) } else { count };
    let (blocks, threads) = grid(work.max(1), MAX_BLOCKS);
    Pass { head, blocks, threads }
}

/// Blocks and threads for `work` lines under a budget: small work spreads over many multiprocessors in small
/// blocks (each has its own path to the links), large work fills blocks before it takes more of them.
pub fn grid(work: u64, budget: u32) -> (u32, u32) {
    let budget = budget.clamp(1, MAX_BLOCKS);
    let threads = [128, 256].into_iter().find(|t| work.div_ceil(u64::from(*t)) <= u64::from(budget.min(32)));
    let threads = threads.unwrap_or(MAX_THREADS);
    let blocks = work.div_ceil(u64::from(threads)).clamp(1, u64::from(budget));
    (u32::try_from(blocks).unwrap_or(budget), threads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::CHUNK_LINES;
    use proptest::prelude::*;

    fn agreed() -> Agreement {
        Agreement {
            ranks: 8,
            layout: Layout::for_payloads(8, 64 << 10, 4 << 20).unwrap(),
            min_bytes: 0,
            oneshot_bytes: 64 << 10,
            twoshot_bytes: 4 << 20,
            switch_bytes: NEVER,
            switch_max_bytes: 0,
            piece_bytes: 4 << 20,
            bulk_bytes: 0,
            scaled_bytes: 2 << 20,
            blocks: 32,
            small_blocks: 64,
        }
    }

    fn sum(count: u64) -> Call {
        Call { count, dtype: DataType::BF16, op: ReduceOp::SUM }
    }

    #[test]
    fn a_small_sum_is_one_shot_a_larger_one_two_shot_and_a_huge_one_stock() {
        let pick = |count| match decide(&sum(count), &agreed()) {
            Route::Routed(plan) => Ok(plan.algorithm),
            Route::Stock(reason) => Err(reason),
        };
        assert_eq!(pick(1), Ok(Algorithm::OneShot));
        assert_eq!(pick(32 << 10), Ok(Algorithm::OneShot));
        assert_eq!(pick((32 << 10) + 1), Ok(Algorithm::TwoShot));
        assert_eq!(pick(2 << 20), Ok(Algorithm::TwoShot));
        assert_eq!(pick((2 << 20) + 1), Err(Reason::Size));
    }

    #[test]
    fn a_payload_above_a_launch_is_split_where_alignment_stays_the_same() {
        let agreed = Agreement { twoshot_bytes: 64 << 20, ..agreed() };
        for (dtype, element) in [(DataType::BF16, 2), (DataType::F32, 4), (DataType::I8, 1), (DataType::F64, 8)] {
            let call = Call { count: (9 << 20) / element, dtype, op: ReduceOp::SUM };
            let Route::Routed(plan) = decide(&call, &agreed) else { panic!("{dtype:?} went to stock") };
            let half = if dtype == DataType::I8 || dtype == DataType::F64 { 2 } else { 1 };
            assert_eq!((plan.algorithm, plan.piece * element), (Algorithm::TwoShot, (4 << 20) / half));
        }
        let odd = Agreement { piece_bytes: 1000, oneshot_bytes: 0, ..agreed };
        let Route::Routed(plan) = decide(&sum(501), &odd) else { panic!("it fits two launches") };
        assert_eq!(plan.piece, 448);
        assert_eq!(decide(&sum(501), &Agreement { piece_bytes: 127, ..odd }), Route::Stock(Reason::Size));
    }

    #[test]
    fn small_payloads_have_a_budget_of_blocks_of_their_own() {
        let blocks = |count| match decide(&sum(count), &Agreement { oneshot_bytes: 0, ..agreed() }) {
            Route::Routed(plan) => plan.blocks,
            Route::Stock(reason) => panic!("{reason:?}"),
        };
        let wide = Agreement { ranks: 2, layout: Layout::for_payloads(2, 0, 4 << 20).unwrap(), ..agreed() };
        let call = |count| match decide(&sum(count), &Agreement { oneshot_bytes: 0, ..wide }) {
            Route::Routed(plan) => plan.blocks,
            Route::Stock(reason) => panic!("{reason:?}"),
        };
        assert_eq!((call(1 << 19), call((1 << 19) + 1)), (64, 32));
        assert_eq!(blocks(1 << 21), 32);
    }

    #[test]
    fn only_sums_of_three_types_between_its_limits_are_made_in_the_switch() {
        let layout = agreed().layout.with_switch(4 << 20).unwrap();
        let with = Agreement { layout, switch_bytes: 1 << 20, switch_max_bytes: 8 << 20, ..agreed() };
        let pick = |call: Call, agreed: &Agreement| match decide(&call, agreed) {
            Route::Routed(plan) => Ok((plan.algorithm, plan.piece)),
            Route::Stock(reason) => Err(reason),
        };
        let (two, switch) = (Algorithm::TwoShot, Algorithm::Switch);
        assert_eq!(pick(sum((1 << 19) - 1), &with), Ok((two, (1 << 19) - 1)));
        assert_eq!(pick(sum(1 << 19), &with), Ok((switch, 1 << 19)));
        assert_eq!(pick(sum(4 << 20), &with), Ok((switch, 2 << 20)), "several launches");
        assert_eq!(pick(sum((4 << 20) + 1), &with), Err(Reason::Size));
        let max = Call { op: ReduceOp::MAX, ..sum((2 << 20) + 1) };
        assert_eq!(pick(max, &with), Err(Reason::Size), "two-shot ends earlier");
        // All of two-shot's range, and never one-shot's.
        let all = Agreement { switch_bytes: 0, ..with };
        assert_eq!(pick(sum(32 << 10), &all), Ok((Algorithm::OneShot, 32 << 10)));
        assert_eq!(pick(sum((32 << 10) + 1), &all), Ok((switch, (32 << 10) + 1)));
        for dtype in (0..12).map(DataType) {
            for op in (0..5).map(ReduceOp) {
                let summed = op == ReduceOp::SUM && [DataType::F32, DataType::F16, DataType::BF16].contains(&dtype);
                let (algorithm, _) = pick(Call { count: 1 << 18, dtype, op }, &all).unwrap();
                assert_eq!(algorithm == switch, summed, "{dtype:?} {op:?}");
            }
        }
    }

    #[test]
    fn what_two_shot_leaves_goes_through_the_ring_whatever_its_type_in_launches_of_32_mib() {
        let layout = agreed().layout.with_ring(24).unwrap();
        let with = Agreement { layout, bulk_bytes: 64 << 20, ..agreed() };
        let pick = |dtype, count, agreed: &Agreement| match decide(&Call { count, dtype, ..sum(0) }, agreed) {
            Route::Routed(plan) => Ok((plan.algorithm, plan.blocks, plan.threads, plan.piece)),
            Route::Stock(reason) => Err(reason),
        };
        let (bf16, i8, i64) = (DataType::BF16, DataType::I8, DataType::I64);
        assert_eq!(pick(bf16, 2 << 20, &with).unwrap().0, Algorithm::TwoShot);
        let above = (2 << 20) + 1;
        assert_eq!(pick(bf16, above, &with), Ok((Algorithm::Bulk, 24, MAX_THREADS, above)));
        assert_eq!(pick(bf16, 32 << 20, &with), Ok((Algorithm::Bulk, 24, MAX_THREADS, 32 << 20)));
        assert_eq!(pick(bf16, (32 << 20) + 1, &with), Err(Reason::Size));
        // Lines that carry half as much end two-shot at 1 MiB, but fill the ring like any other. Without a ring they have
        // all of two-shot.
        for (dtype, size) in [(i64, 8), (i8, 1)] {
            assert_eq!(pick(dtype, (1 << 20) / size - 1, &with).unwrap().0, Algorithm::TwoShot);
            assert_eq!(pick(dtype, (1 << 20) / size, &with).unwrap().0, Algorithm::Bulk);
            assert_eq!(pick(dtype, (2 << 20) / size, &agreed()).unwrap().0, Algorithm::TwoShot);
            assert_eq!(pick(dtype, (2 << 20) / size + 1, &agreed()), Err(Reason::Size));
            let most = (64 << 20) / size;
            assert_eq!(pick(dtype, most, &with), Ok((Algorithm::Bulk, 24, MAX_THREADS, most)));
            assert_eq!(pick(dtype, (64 << 20) / size + 1, &with), Err(Reason::Size));
        }
        // 8-bit floats are stock NCCL's above 4 MiB, unless they were asked for.
        let e4m3 = DataType::E4M3;
        assert_eq!(pick(e4m3, FP8_MOST, &with).unwrap().0, Algorithm::Bulk);
        assert_eq!(pick(e4m3, FP8_MOST + 1, &with), Err(Reason::Size));
        let large = Agreement { bulk_bytes: 1 << 30, ..with };
        assert_eq!(pick(bf16, 512 << 20, &large), Ok((Algorithm::Bulk, 24, MAX_THREADS, 64 << 20)));
        assert_eq!(pick(i64, (16 << 20) + 1, &large).unwrap().3, 16 << 20);
        // Alone it takes small ones too, with a block for each chunk of 8 KiB.
        let alone = Agreement { oneshot_bytes: 0, twoshot_bytes: 0, ..with };
        assert_eq!(pick(e4m3, 64 << 20, &alone).unwrap().0, Algorithm::Bulk);
        assert_eq!(pick(bf16, 1, &alone), Ok((Algorithm::Bulk, 1, MAX_THREADS, 1)));
        assert_eq!(pick(bf16, 8 * 4 * 4096, &alone).unwrap().1, 4);
        assert_eq!(pick(bf16, 1 << 20, &Agreement { layout: agreed().layout, ..alone }), Err(Reason::Size));
    }

    #[test]
    fn an_empty_call_goes_to_stock() {
        assert_eq!(decide(&sum(0), &agreed()), Route::Stock(Reason::Empty));
    }

    #[test]
    fn a_count_whose_bytes_overflow_goes_to_stock() {
        assert_eq!(decide(&sum(u64::MAX), &agreed()), Route::Stock(Reason::Size));
    }

    #[test]
    fn types_and_operations_without_a_kernel_go_to_stock_even_when_unknown() {
        for dtype in (-3..64).filter(|d| !(0..12).contains(d)) {
            let call = Call { dtype: DataType(dtype), ..sum(1024) };
            assert_eq!(decide(&call, &agreed()), Route::Stock(Reason::Type));
        }
        for op in (-3..64).filter(|op| !(0..5).contains(op)) {
            let call = Call { op: ReduceOp(op), ..sum(1024) };
            assert_eq!(decide(&call, &agreed()), Route::Stock(Reason::Operation));
        }
    }

    #[test]
    fn the_troubleshooting_page_explains_every_reason() {
        let page = include_str!("../docs/troubleshooting.md");
        for reason in Reason::ALL {
            assert!(
                page.contains(&format!("| `{}` | ", reason.name())),
                "docs/troubleshooting.md lacks {}",
                reason.name()
            );
        }
    }

    #[test]
    fn every_type_and_operation_of_nccl_has_a_kernel_and_its_name_matches_the_type() {
        for dtype in 0..12 {
            for op in 0..5 {
                let call = Call { count: 8, dtype: DataType(dtype), op: ReduceOp(op) };
                let Route::Routed(plan) = decide(&call, &agreed()) else { panic!("{call:?} went to stock") };
                let specialised = op == 0 && [6, 7, 9].contains(&dtype);
                assert_eq!((plan.class.specialised(), plan.dtype, plan.op), (specialised, call.dtype, call.op));
            }
        }
    }

    #[test]
    fn what_lines_carry_by_half_counts_twice_against_the_limits() {
        let pick = |count| match decide(&Call { count, dtype: DataType::I8, op: ReduceOp::MAX }, &agreed()) {
            Route::Routed(plan) => Ok(plan.algorithm),
            Route::Stock(reason) => Err(reason),
        };
        assert_eq!(pick(32 << 10), Ok(Algorithm::OneShot));
        assert_eq!(pick((32 << 10) + 1), Ok(Algorithm::TwoShot));
        assert_eq!(pick(2 << 20), Ok(Algorithm::TwoShot));
        assert_eq!(pick((2 << 20) + 1), Err(Reason::Size));
    }

    #[test]
    fn a_pre_multiplied_sum_is_the_sum_within_its_own_limit_whatever_its_factor() {
        let factor = Factor::Value(0x4000);
        let made = |count| Call { op: ReduceOp(77), ..sum(count) };
        for count in [1, 32 << 10, (32 << 10) + 1, 1 << 20] {
            let (Route::Routed(plain), Route::Routed(scaled)) =
                (decide(&sum(count), &agreed()), decide_scaled(&made(count), factor, &agreed()))
            else {
                panic!("{count} went to stock")
            };
            assert_eq!(scaled, Plan { factor: Some(factor), ..plain });
        }
        assert_eq!(decide_scaled(&made((1 << 20) + 1), factor, &agreed()), Route::Stock(Reason::Size));
        assert_eq!(decide_scaled(&made(0), factor, &agreed()), Route::Stock(Reason::Empty));
        let unseen = Agreement { scaled_bytes: 0, ..agreed() };
        assert_eq!(decide_scaled(&made(8), factor, &unseen), Route::Stock(Reason::Operation));
        // Lines that carry half as much reach the limit with half the payload.
        let bytes = |count| Call { dtype: DataType::I8, ..made(count) };
        assert!(matches!(decide_scaled(&bytes(1 << 20), factor, &agreed()), Route::Routed(_)));
        assert_eq!(decide_scaled(&bytes((1 << 20) + 1), factor, &agreed()), Route::Stock(Reason::Size));
    }

    proptest! {
        #[test]
        fn the_pass_before_a_sum_takes_lines_only_where_both_buffers_have_them(
            (at, to) in (0u64..64, 0u64..64), count in 0u64..1 << 40, size in prop::sample::select(vec![1u64, 2, 4, 8]),
        ) {
            let (input, output) = (at * size, to * size);
            let Pass { head, blocks, threads } = pass(input, output, count, size);
            prop_assert!(head <= count && (1..=MAX_BLOCKS).contains(&blocks) && (1..=MAX_THREADS).contains(&threads));
            if head < count {
                prop_assert!((input + head * size).is_multiple_of(LINE) && (output + head * size).is_multiple_of(LINE));
                prop_assert!(head * size < LINE);
            }
        }
    }

    #[test]
    fn a_payload_below_the_users_minimum_goes_to_stock() {
        let agreed = Agreement { min_bytes: 4096, ..agreed() };
        assert_eq!(decide(&sum(2047), &agreed), Route::Stock(Reason::Size));
        assert!(matches!(decide(&sum(2048), &agreed), Route::Routed(_)));
    }

    proptest! {
        #[test]
        fn a_grid_stays_inside_its_budget_and_is_never_empty(work in 0u64..1 << 40, budget in 0u32..1 << 20) {
            let (blocks, threads) = grid(work, budget);
            prop_assert!(blocks >= 1 && blocks <= budget.clamp(1, MAX_BLOCKS));
            // switch.cuh needs whole chunks.
            prop_assert!(u64::from(threads) % CHUNK_LINES == 0 && threads <= MAX_THREADS);
        }

        #[test]
        fn a_routed_payload_always_fits_its_stage(
            count in 0u64..1 << 24, one in 0u64..1 << 22, two in 0u64..1 << 24, switch in (0u64..1 << 24, 0u64..1 << 24),
        ) {
            let layout = agreed().layout.with_switch(4 << 20).unwrap();
            let agreed = Agreement {
                layout, oneshot_bytes: one, twoshot_bytes: two, switch_bytes: switch.0, switch_max_bytes: switch.1, ..agreed()
            };
            for call in [sum(count), Call { dtype: DataType::E4M3, ..sum(count) }] {
                if let Route::Routed(plan) = decide(&call, &agreed) {
                    let launch = count.min(plan.piece) * call.dtype.size().unwrap();
                    let bytes = plan.class.packing().carried(launch).unwrap();
                    prop_assert!(plan.piece > 0 && agreed.layout.fit(plan.algorithm, bytes).is_some());
                }
            }
        }
    }
}
