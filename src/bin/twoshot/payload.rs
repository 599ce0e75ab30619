//! What the ranks send and what must come back: every element is a function of (seed, rank, index), so each rank can
//! compute the result without asking anybody.
#![forbid(unsafe_code)]

use crate::element::{Op, Reduction, fold};

/// What kind of numbers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Numbers around 1 with all signs, zeros of both signs and subnormals among them: stock NCCL can be held to a
    /// tolerance on them.
    Numbers,
    /// Any bits at all, NaN and infinities included: for exact comparison only.
    Bits,
}

/// One call's payload on all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Payload {
    /// Element type and operation.
    pub what: Reduction,
    /// Kind of numbers.
    pub kind: Kind,
    /// Differs from call to call.
    pub seed: u64,
}

/// A finaliser in the manner of splitmix64: equal inputs give equal bits everywhere, neighbours unrelated ones.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Elements verified for sure at each end of a payload too large to verify whole, and in each window between.
const WINDOW: u64 = 1 << 18;
/// Windows between the ends.
const WINDOWS: u64 = 6;

/// Which elements are compared: all of a payload up to `limit` elements, else both ends and some random windows.
pub fn checked_ranges(count: u64, limit: u64, seed: u64) -> Vec<std::ops::Range<u64>> {
    if count <= limit.max(WINDOW * (WINDOWS + 2)) {
        return std::iter::once(0..count).collect();
    }
    let inner = (1..=WINDOWS).map(|i| WINDOW + mix(seed ^ i) % (count - 3 * WINDOW)).map(|start| start..start + WINDOW);
    std::iter::once(0..WINDOW).chain(inner).chain(std::iter::once(count - WINDOW..count)).collect()
}

impl Payload {
    /// The bits of one element of one rank.
    fn element(&self, rank: u32, index: u64) -> u64 {
        let dtype = self.what.dtype;
        let random =
            mix(mix(self.seed ^ (u64::from(rank) << 48)).wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        if self.kind == Kind::Bits || dtype.is_integer() {
            return random & dtype.mask();
        }
        let unit = (random & 0xff_ffff) as f64 / 8_388_608.0 - 1.0;
        match random >> 56 {
            0 => dtype.bits(0.0),
            1 => dtype.bits(-0.0),
            // A product of many numbers stays near 1 if they are below and above it in turn.
            _ if self.what.op == Op::Prod => {
                let magnitude = if rank.is_multiple_of(2) { 1.5 + unit / 2.0 } else { 0.75 + unit / 4.0 };
                dtype.bits(magnitude.copysign(if random >> 55 & 1 == 0 { 1.0 } else { -1.0 }))
            }
            // The smallest subnormals.
            2 => 1 + (random & 3),
            _ => dtype.bits(unit * if random >> 55 & 1 == 0 { 2.0 } else { 0.125 }),
        }
    }

    /// A rank's elements of a range, as bytes of the device.
    pub fn fill(&self, rank: u32, first: u64, bytes: &mut [u8]) {
        let size = self.what.size();
        for (i, chunk) in bytes.chunks_exact_mut(size).enumerate() {
            chunk.copy_from_slice(&self.element(rank, first + i as u64).to_le_bytes()[..size]);
        }
    }

    /// The result of all ranks, and the sum of their absolute values.
    fn expected(&self, elements: &mut [u64], index: u64) -> (u64, f64) {
        let mut magnitude = 0.0;
        for (rank, element) in (0..).zip(elements.iter_mut()) {
            *element = self.element(rank, index);
            magnitude += self.what.dtype.value(*element).abs();
        }
        (fold(self.what, elements), magnitude)
    }

    /// How far another order of the operations, with a rounding at each, may lead away.
    fn tolerance(&self, ranks: u32, expected: f64, magnitude: f64) -> f64 {
        let dtype = self.what.dtype;
        let after = |roundings: u32| (dtype.epsilon().ln_1p() * f64::from(roundings)).exp_m1();
        let relative = match self.what.op {
            Op::Sum => magnitude * after(ranks),
            Op::Prod => expected.abs() * after(ranks),
            // Stock NCCL multiplies by 1/ranks, which is rounded too, before or behind the sum.
            Op::Avg => magnitude / f64::from(ranks) * after(ranks + 3),
            Op::Max | Op::Min => 0.0,
        };
        // A subnormal may be rounded up to a whole step of the smallest number, at every operation.
        relative + 2.0 * f64::from(ranks) * dtype.smallest()
    }

    /// Counts wrong elements among `got`, which begins at element `first`, and describes the first of them.
    /// `exact` compares bits (a NaN outside the specialised sums may be any NaN); else the order is free.
    pub fn wrong(&self, ranks: u32, first: u64, got: &[u8], exact: bool) -> (u64, Option<String>) {
        let dtype = self.what.dtype;
        let strict = self.what.op == Op::Sum && dtype.size() != 1 && dtype.size() != 8;
        let mut elements = vec![0; ranks as usize];
        let (mut wrong, mut note) = (0, None);
        for (i, chunk) in got.chunks_exact(dtype.size()).enumerate() {
            let bits = chunk.iter().rev().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
            let index = first + i as u64;
            let (expected, magnitude) = self.expected(&mut elements, index);
            let (have, want) = (dtype.value(bits), dtype.value(expected));
            let good = bits == expected
                || !dtype.is_integer()
                    && match exact {
                        true => !strict && have.is_nan() && want.is_nan(),
                        false => (have - want).abs() <= self.tolerance(ranks, want, magnitude),
                    };
            if !good {
                wrong += 1;
                note.get_or_insert_with(|| {
                    format!("element {index}: got {bits:#x} ({have}), expected {expected:#x} ({want})")
                });
            }
        }
        (wrong, note)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Dtype;
    use clap::ValueEnum;
    use half::bf16;

    fn payload(dtype: Dtype, op: Op, kind: Kind) -> Payload {
        Payload { what: Reduction { dtype, op }, kind, seed: 7 }
    }

    fn all() -> impl Iterator<Item = (Dtype, Op)> {
        let ops = Op::value_variants();
        Dtype::value_variants().iter().flat_map(move |dtype| ops.iter().map(move |op| (*dtype, *op)))
    }

    /// The results as a library would deliver them.
    fn reduced(payload: &Payload, ranks: usize, count: u64) -> Vec<u8> {
        let mut elements = vec![0; ranks];
        let mut result = |i| payload.expected(&mut elements, i).0.to_le_bytes();
        (0..count).flat_map(|i| result(i)[..payload.what.size()].to_vec()).collect()
    }

    #[test]
    fn the_reference_accepts_itself_and_no_single_flipped_bit() {
        for (dtype, op) in all() {
            for kind in [Kind::Numbers, Kind::Bits] {
                let payload = payload(dtype, op, kind);
                let mut bytes = reduced(&payload, 4, 300);
                assert_eq!(payload.wrong(4, 0, &bytes, true), (0, None), "{dtype:?} {op:?}");
                let at = (100..300).find(|i| {
                    let value = &bytes[dtype.size() * i..dtype.size() * (i + 1)];
                    !dtype.value(value.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte))).is_nan()
                });
                let at = at.expect("a number");
                bytes[dtype.size() * at] ^= 1;
                let (wrong, note) = payload.wrong(4, 0, &bytes, true);
                assert_eq!(wrong, 1, "{dtype:?} {op:?}");
                assert!(note.unwrap().starts_with(&format!("element {at}:")));
            }
        }
    }

    #[test]
    fn tolerance_accepts_another_order_with_a_rounding_at_each_step() {
        for (dtype, op) in all().filter(|(dtype, _)| !dtype.is_integer()) {
            let payload = payload(dtype, op, Kind::Numbers);
            let ranks = 4;
            let backwards: Vec<u8> = (0..4096)
                .flat_map(|i| {
                    let share = dtype.value(dtype.bits(1.0 / f64::from(ranks)));
                    let scaled = |bits| if op == Op::Avg { dtype.bits(dtype.value(bits) * share) } else { bits };
                    let step = Reduction { dtype, op: if op == Op::Avg { Op::Sum } else { op } };
                    let elements = (0..ranks).rev().map(|rank| scaled(payload.element(rank, i)));
                    let result = elements.reduce(|a, b| fold(step, &[a, b])).unwrap_or(0);
                    result.to_le_bytes()[..dtype.size()].to_vec()
                })
                .collect();
            assert_eq!(payload.wrong(ranks, 0, &backwards, false), (0, None), "{dtype:?} {op:?}");
        }
    }

    #[test]
    fn tolerance_does_not_accept_a_missing_rank() {
        let payload = payload(Dtype::Bf16, Op::Sum, Kind::Numbers);
        let backwards: Vec<u8> = (0..4096)
            .flat_map(|i| {
                let sum = (0..4).rev().fold(0.0, |sum: f32, rank| {
                    bf16::from_f32(sum + bf16::from_bits(payload.element(rank, i) as u16).to_f32()).to_f32()
                });
                bf16::from_f32(sum).to_bits().to_le_bytes()
            })
            .collect();
        assert!(payload.wrong(4, 0, &backwards, true).0 > 0, "another order has other bits");
        // With two or three bits of fraction four roundings hide much.
        for (dtype, op) in all().filter(|(dtype, _)| dtype.epsilon() < 0.01) {
            let payload = Payload { what: Reduction { dtype, op }, ..payload };
            let three = reduced(&payload, 3, 4096);
            assert!(payload.wrong(4, 0, &three, false).0 > 500, "{dtype:?} {op:?}");
        }
    }

    #[test]
    fn fill_and_expectation_agree_on_every_element() {
        let payload = payload(Dtype::F64, Op::Sum, Kind::Bits);
        let mut bytes = [0; 40];
        payload.fill(3, 5, &mut bytes);
        assert_eq!(bytes[8..16], payload.element(3, 6).to_le_bytes());
        assert_ne!(payload.element(3, 6), payload.element(2, 6));
    }

    #[test]
    fn large_payloads_are_checked_at_both_ends_and_inside_bounds() {
        let count = 100 << 20;
        let ranges = checked_ranges(count, 1 << 20, 3);
        assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, count));
        assert!(ranges.iter().all(|r| r.start < r.end && r.end <= count));
        assert_eq!(checked_ranges(1000, 1 << 20, 3), std::slice::from_ref(&(0..1000)));
    }
}
