//! What the ranks send and what must come back: every element is a function of (seed, rank, index), so each rank can
//! compute the sum of all ranks without asking anybody.
#![forbid(unsafe_code)]

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Element types that bench measures.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// IEEE single precision
    F32,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// `ncclDataType_t`.
    pub fn nccl(self) -> i32 {
        match self {
            Self::F16 => 6,
            Self::F32 => 7,
            Self::Bf16 => 9,
        }
    }

    /// The word in tables and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    fn value(self, bits: u32) -> f32 {
        match self {
            Self::Bf16 => bf16::from_bits(bits as u16).to_f32(),
            Self::F16 => f16::from_bits(bits as u16).to_f32(),
            Self::F32 => f32::from_bits(bits),
        }
    }

    /// Rounds once; every NaN becomes the one that the GPU makes.
    fn bits(self, value: f32) -> u32 {
        match self {
            Self::F32 if value.is_nan() => 0x7fff_ffff,
            Self::Bf16 | Self::F16 if value.is_nan() => 0x7fff,
            Self::Bf16 => u32::from(bf16::from_f32(value).to_bits()),
            Self::F16 => u32::from(f16::from_f32(value).to_bits()),
            Self::F32 => value.to_bits(),
        }
    }

    /// Half the distance between neighbours, relative.
    fn epsilon(self) -> f64 {
        match self {
            Self::Bf16 => 1.0 / 256.0,
            Self::F16 => 1.0 / 2048.0,
            Self::F32 => 1.0 / 16_777_216.0,
        }
    }
}

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
    /// Element type.
    pub dtype: Dtype,
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
    fn element(&self, rank: u32, index: u64) -> u32 {
        let random =
            mix(mix(self.seed ^ (u64::from(rank) << 48)).wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        match self.kind {
            Kind::Bits => random as u32 & if self.dtype == Dtype::F32 { u32::MAX } else { 0xffff },
            Kind::Numbers => match random >> 56 {
                0 => self.dtype.bits(0.0),
                1 => self.dtype.bits(-0.0),
                // The smallest subnormals.
                2 => 1 + (random as u32 & 3),
                _ => {
                    let unit = (random & 0xff_ffff) as f32 / 8_388_608.0 - 1.0;
                    self.dtype.bits(unit * if random >> 55 & 1 == 0 { 2.0 } else { 0.125 })
                }
            },
        }
    }

    /// A rank's elements of a range, as bytes of the device.
    pub fn fill(&self, rank: u32, first: u64, bytes: &mut [u8]) {
        match self.dtype.size() {
            2 => {
                for (i, chunk) in bytes.chunks_exact_mut(2).enumerate() {
                    chunk.copy_from_slice(&(self.element(rank, first + i as u64) as u16).to_le_bytes());
                }
            }
            _ => {
                for (i, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                    chunk.copy_from_slice(&self.element(rank, first + i as u64).to_le_bytes());
                }
            }
        }
    }

    /// The sum over all ranks in rank order, accumulated in f32 and rounded once; and the sum of absolute values.
    fn expected(&self, ranks: u32, index: u64) -> (u32, f64) {
        let first = self.dtype.value(self.element(0, index));
        let (mut sum, mut magnitude) = (first, f64::from(first.abs()));
        for rank in 1..ranks {
            let value = self.dtype.value(self.element(rank, index));
            sum += value;
            magnitude += f64::from(value.abs());
        }
        (self.dtype.bits(sum), magnitude)
    }

    /// Counts wrong elements among `got`, which begins at element `first`, and describes the first of them.
    /// `exact` compares bits; else any order of additions with a rounding at each is accepted.
    pub fn wrong(&self, ranks: u32, first: u64, got: &[u8], exact: bool) -> (u64, Option<String>) {
        let (mut wrong, mut note) = (0, None);
        for (i, chunk) in got.chunks_exact(self.dtype.size()).enumerate() {
            let bits = chunk.iter().rev().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
            let index = first + i as u64;
            let (expected, magnitude) = self.expected(ranks, index);
            let good = bits == expected
                || !exact && {
                    let (got, expected) = (f64::from(self.dtype.value(bits)), f64::from(self.dtype.value(expected)));
                    // A subnormal result may be rounded up to a whole step of the smallest number.
                    let tolerance = magnitude * self.dtype.epsilon() * f64::from(ranks) + 1e-7 * f64::from(ranks);
                    (got - expected).abs() <= tolerance
                };
            if !good {
                wrong += 1;
                note.get_or_insert_with(|| {
                    format!(
                        "element {index}: got {bits:#x} ({}), expected {expected:#x} ({})",
                        self.dtype.value(bits),
                        self.dtype.value(expected)
                    )
                });
            }
        }
        (wrong, note)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(dtype: Dtype, kind: Kind) -> Payload {
        Payload { dtype, kind, seed: 7 }
    }

    /// The sum as a library would deliver it.
    fn reduced(payload: &Payload, ranks: u32, count: u64) -> Vec<u8> {
        (0..count).flat_map(|i| payload.expected(ranks, i).0.to_le_bytes()[..payload.dtype.size()].to_vec()).collect()
    }

    #[test]
    fn the_reference_accepts_itself_and_no_single_flipped_bit() {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            for kind in [Kind::Numbers, Kind::Bits] {
                let payload = payload(dtype, kind);
                let mut bytes = reduced(&payload, 4, 300);
                assert_eq!(payload.wrong(4, 0, &bytes, true).0, 0);
                bytes[dtype.size() * 123] ^= 1;
                let (wrong, note) = payload.wrong(4, 0, &bytes, true);
                assert_eq!(wrong, 1);
                assert!(note.unwrap().starts_with("element 123:"));
            }
        }
    }

    #[test]
    fn tolerance_accepts_another_order_of_addition_but_not_a_missing_rank() {
        let payload = payload(Dtype::Bf16, Kind::Numbers);
        let backwards: Vec<u8> = (0..4096)
            .flat_map(|i| {
                let sum = (0..4).rev().fold(0.0, |sum: f32, rank| {
                    bf16::from_f32(sum + payload.dtype.value(payload.element(rank, i))).to_f32()
                });
                bf16::from_f32(sum).to_bits().to_le_bytes()
            })
            .collect();
        assert_eq!(payload.wrong(4, 0, &backwards, false).0, 0);
        assert!(payload.wrong(4, 0, &backwards, true).0 > 0);
        let three = reduced(&payload, 3, 4096);
        assert!(payload.wrong(4, 0, &three, false).0 > 3000);
    }

    #[test]
    fn fill_and_expectation_agree_on_every_element() {
        let payload = payload(Dtype::F32, Kind::Bits);
        let mut bytes = [0; 40];
        payload.fill(3, 5, &mut bytes);
        assert_eq!(bytes[4..8], payload.element(3, 6).to_le_bytes());
        assert_ne!(payload.element(3, 6), payload.element(2, 6));
    }

    #[test]
    fn a_sum_of_negative_zeros_stays_negative_zero() {
        assert_eq!(Dtype::Bf16.bits(-0.0 + -0.0), 0x8000);
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
