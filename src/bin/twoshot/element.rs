//! NCCL's element types and reductions as the reference sees them: what bits mean, and what all ranks' elements make.
//!
//! `docs/numerics.md` says the same in words.
#![forbid(unsafe_code)]

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Element types, by the names that the option takes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
#[allow(missing_docs, reason = "their names say it")]
pub enum Dtype {
    Bf16,
    F16,
    F32,
    F64,
    E4m3,
    E5m2,
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
}

/// Reductions.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
#[allow(missing_docs, reason = "their names say it")]
pub enum Op {
    Sum,
    Prod,
    Max,
    Min,
    Avg,
}

impl Op {
    /// `ncclRedOp_t`.
    pub fn nccl(self) -> i32 {
        self as i32
    }

    /// The word in tables and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Prod => "prod",
            Self::Max => "max",
            Self::Min => "min",
            Self::Avg => "avg",
        }
    }
}

/// What a call reduces, and how.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reduction {
    pub dtype: Dtype,
    pub op: Op,
}

impl Reduction {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        self.dtype.size()
    }

    /// For log lines.
    pub fn name(self) -> String {
        format!("{} {}", self.dtype.name(), self.op.name())
    }
}

/// The smaller part of `f32` and of the narrow types that a value is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Family {
    /// Folded as f32, rounded once.
    Float,
    /// Folded as f64.
    Double,
    /// Folded modulo two to the number of its bits.
    Integer { bits: u32, signed: bool },
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::E4m3 | Self::E5m2 | Self::I8 | Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// `ncclDataType_t`.
    pub fn nccl(self) -> i32 {
        match self {
            Self::I8 => 0,
            Self::U8 => 1,
            Self::I32 => 2,
            Self::U32 => 3,
            Self::I64 => 4,
            Self::U64 => 5,
            Self::F16 => 6,
            Self::F32 => 7,
            Self::F64 => 8,
            Self::Bf16 => 9,
            Self::E4m3 => 10,
            Self::E5m2 => 11,
        }
    }

    /// The word in tables and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::E4m3 => "e4m3",
            Self::E5m2 => "e5m2",
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::I64 => "i64",
            Self::U64 => "u64",
        }
    }

    fn family(self) -> Family {
        let integer = |bits, signed| Family::Integer { bits, signed };
        match self {
            Self::Bf16 | Self::F16 | Self::F32 | Self::E4m3 | Self::E5m2 => Family::Float,
            Self::F64 => Family::Double,
            Self::I8 => integer(8, true),
            Self::U8 => integer(8, false),
            Self::I32 => integer(32, true),
            Self::U32 => integer(32, false),
            Self::I64 => integer(64, true),
            Self::U64 => integer(64, false),
        }
    }

    /// Whether another order of the same operations gives the same result.
    pub fn is_integer(self) -> bool {
        matches!(self.family(), Family::Integer { .. })
    }

    /// All bits of an element.
    pub fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self.size())
    }

    fn single(self, bits: u64) -> f32 {
        match self {
            Self::Bf16 => bf16::from_bits(bits as u16).to_f32(),
            Self::F16 => f16::from_bits(bits as u16).to_f32(),
            Self::E5m2 => f16::from_bits((bits as u16) << 8).to_f32(),
            Self::E4m3 => e4m3(bits as u8),
            _ => f32::from_bits(bits as u32),
        }
    }

    /// Rounds once, to nearest even; every NaN becomes the one that the GPU makes.
    fn narrow(self, value: f32) -> u64 {
        match self {
            Self::E4m3 => round_to_byte(value, 0x7e, e4m3),
            Self::E5m2 => round_to_byte(value, 0x7b, |byte| f16::from_bits(u16::from(byte) << 8).to_f32()),
            Self::Bf16 | Self::F16 if value.is_nan() => 0x7fff,
            Self::Bf16 => u64::from(bf16::from_f32(value).to_bits()),
            Self::F16 => u64::from(f16::from_f32(value).to_bits()),
            _ if value.is_nan() => 0x7fff_ffff,
            _ => u64::from(value.to_bits()),
        }
    }

    /// What the bits mean, for people and for tolerances.
    pub fn value(self, bits: u64) -> f64 {
        match self.family() {
            Family::Float => f64::from(self.single(bits)),
            Family::Double => f64::from_bits(bits),
            Family::Integer { bits: width, signed } => {
                if signed {
                    extended(bits, width) as f64
                } else {
                    bits as f64
                }
            }
        }
    }

    /// The element nearest to a number.
    pub fn bits(self, value: f64) -> u64 {
        match self.family() {
            Family::Float => self.narrow(value as f32),
            Family::Double => value.to_bits(),
            Family::Integer { .. } => value as i64 as u64 & self.mask(),
        }
    }

    /// Half the distance between neighbours, relative; 0 for integers.
    pub fn epsilon(self) -> f64 {
        match self {
            Self::Bf16 => 0.5f64.powi(8),
            Self::F16 => 0.5f64.powi(11),
            Self::F32 => 0.5f64.powi(24),
            Self::F64 => 0.5f64.powi(53),
            Self::E4m3 => 0.5f64.powi(4),
            Self::E5m2 => 0.5f64.powi(3),
            _ => 0.0,
        }
    }

    /// The smallest number above zero.
    pub fn smallest(self) -> f64 {
        match self {
            Self::Bf16 => 0.5f64.powi(133),
            Self::F16 => 0.5f64.powi(24),
            Self::F32 => 0.5f64.powi(149),
            Self::F64 => f64::from_bits(1),
            Self::E4m3 => 0.5f64.powi(9),
            Self::E5m2 => 0.5f64.powi(16),
            _ => 0.0,
        }
    }
}

/// All ranks' elements, in rank order, made into one.
pub fn fold(what: Reduction, elements: &[u64]) -> u64 {
    let Reduction { dtype, op } = what;
    match dtype.family() {
        Family::Float => {
            let values = elements.iter().map(|bits| dtype.single(*bits));
            dtype.narrow(folded(op, values, |a, b| a + b, |a, b| a * b, |sum| sum / elements.len() as f32))
        }
        Family::Double => {
            let values = elements.iter().map(|bits| f64::from_bits(*bits));
            folded(op, values, |a, b| a + b, |a, b| a * b, |sum| sum / elements.len() as f64).to_bits()
        }
        Family::Integer { bits, signed } => {
            let less = |a: u64, b: u64| if signed { extended(a, bits) < extended(b, bits) } else { a < b };
            let make = |a: u64, b: u64| match op {
                Op::Sum | Op::Avg => a.wrapping_add(b) & dtype.mask(),
                Op::Prod => a.wrapping_mul(b) & dtype.mask(),
                Op::Max => {
                    if less(a, b) {
                        b
                    } else {
                        a
                    }
                }
                Op::Min => {
                    if less(b, a) {
                        b
                    } else {
                        a
                    }
                }
            };
            let result = elements.iter().copied().reduce(make).unwrap_or(0);
            match op {
                // Towards zero.
                Op::Avg if signed => (extended(result, bits) / elements.len() as i64) as u64 & dtype.mask(),
                Op::Avg => result / elements.len() as u64,
                _ => result,
            }
        }
    }
}

trait Number: Copy + PartialOrd {
    fn is_nan(self) -> bool;
    fn is_negative(self) -> bool;
}

impl Number for f32 {
    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }
    fn is_negative(self) -> bool {
        self.is_sign_negative()
    }
}

impl Number for f64 {
    fn is_nan(self) -> bool {
        f64::is_nan(self)
    }
    fn is_negative(self) -> bool {
        self.is_sign_negative()
    }
}

fn folded<F: Number + Default>(
    op: Op,
    values: impl Iterator<Item = F>,
    sum: impl Fn(F, F) -> F,
    product: impl Fn(F, F) -> F,
    average: impl Fn(F) -> F,
) -> F {
    // Of a NaN and a number the number; +0 is more than -0.
    let pick = |a: F, b: F, largest: bool| {
        if a.is_nan() || b.is_nan() {
            return if a.is_nan() { b } else { a };
        }
        let first = if a == b { a.is_negative() != largest } else { (a > b) == largest };
        if first { a } else { b }
    };
    let make = |a, b| match op {
        Op::Sum | Op::Avg => sum(a, b),
        Op::Prod => product(a, b),
        Op::Max => pick(a, b, true),
        Op::Min => pick(a, b, false),
    };
    let result = values.reduce(make).unwrap_or_default();
    if op == Op::Avg { average(result) } else { result }
}

fn extended(bits: u64, width: u32) -> i64 {
    (bits << (64 - width)) as i64 >> (64 - width)
}

fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => fraction * 2f32.powi(-9),
        _ => (8.0 + fraction) * 2f32.powi(exponent - 10),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The nearest of the bytes 0 to `most`, whose values grow, of two equally near ones the even one; the sign is the
/// upper bit. What is larger becomes `most`, a NaN 0x7f.
fn round_to_byte(value: f32, most: u8, decode: impl Fn(u8) -> f32) -> u64 {
    if value.is_nan() {
        return 0x7f;
    }
    let magnitude = f64::from(value.abs());
    let distance = |byte: u8| (f64::from(decode(byte)) - magnitude).abs();
    let below = (0..=most).rev().find(|byte| f64::from(decode(*byte)) <= magnitude).unwrap_or(0);
    let above = (below + 1).min(most);
    let nearest = match distance(below).total_cmp(&distance(above)) {
        std::cmp::Ordering::Less => below,
        std::cmp::Ordering::Greater => above,
        std::cmp::Ordering::Equal => {
            if below.is_multiple_of(2) {
                below
            } else {
                above
            }
        }
    };
    u64::from(
        if magnitude >= f64::from(decode(most)) { most } else { nearest } | u8::from(value.is_sign_negative()) << 7,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(dtype: Dtype, op: Op, elements: &[u64]) -> u64 {
        fold(Reduction { dtype, op }, elements)
    }

    #[test]
    fn bytes_of_eight_bit_floats_mean_what_their_formats_say() {
        assert_eq!([0x00, 0x01, 0x08, 0x38, 0x7e, 0xfe].map(e4m3), [0.0, 1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0, -448.0]);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        let e5m2 = |bits| Dtype::E5m2.value(bits);
        assert_eq!([0x01, 0x04, 0x3c, 0x7b].map(e5m2), [0.5f64.powi(16), 0.5f64.powi(14), 1.0, 57344.0]);
        assert!(e5m2(0x7c).is_infinite() && e5m2(0x7d).is_nan());
    }

    #[test]
    fn eight_bit_floats_round_to_nearest_even_and_saturate() {
        for (value, bits) in [(17.0, 0x58), (19.0, 0x5a), (449.0, 0x7e), (1e9, 0x7e), (f64::INFINITY, 0x7e)] {
            assert_eq!(Dtype::E4m3.bits(value), bits, "{value}");
            assert_eq!(Dtype::E4m3.bits(-value), bits | 0x80, "{value}");
        }
        assert_eq!((Dtype::E5m2.bits(f64::INFINITY), Dtype::E5m2.bits(9.0)), (0x7b, 0x48));
        assert_eq!((Dtype::E4m3.bits(0.5f64.powi(10)), Dtype::E4m3.bits(3.0 * 0.5f64.powi(10))), (0, 2));
        for (dtype, most) in [(Dtype::E4m3, 0x7e), (Dtype::E5m2, 0x7b)] {
            for byte in (0..=most).chain(0x80..=0x80 | most) {
                assert_eq!(dtype.bits(dtype.value(byte)), byte, "{dtype:?}");
            }
            assert_eq!(dtype.bits(f64::NAN), 0x7f);
        }
    }

    #[test]
    fn integers_wrap_compare_by_their_sign_and_divide_towards_zero() {
        assert_eq!(made(Dtype::I8, Op::Sum, &[100, 100]), 200);
        assert_eq!(made(Dtype::I8, Op::Avg, &[100, 100]), 0xe4, "-56 / 2");
        assert_eq!(made(Dtype::U8, Op::Avg, &[200, 100]), 22, "44 / 2");
        assert_eq!(made(Dtype::I32, Op::Avg, &[0xffff_fffd, 0]), 0xffff_ffff, "-3 / 2");
        assert_eq!(made(Dtype::I8, Op::Max, &[0x80, 0x7f]), 0x7f);
        assert_eq!(made(Dtype::U8, Op::Max, &[0x80, 0x7f]), 0x80);
        assert_eq!(made(Dtype::I64, Op::Min, &[u64::MAX, 1]), u64::MAX);
        assert_eq!(made(Dtype::U64, Op::Prod, &[u64::MAX, u64::MAX]), 1);
    }

    #[test]
    fn a_number_wins_over_a_nan_and_positive_zero_is_the_larger_one() {
        let bits = f32::to_bits;
        let nan = u64::from(bits(f32::NAN));
        for op in [Op::Max, Op::Min] {
            assert_eq!(made(Dtype::F32, op, &[nan, 5, nan]), 5);
            assert_eq!(made(Dtype::F32, op, &[nan, nan]), 0x7fff_ffff);
        }
        for elements in [[0, 0x8000_0000], [0x8000_0000, 0]] {
            assert_eq!(made(Dtype::F32, Op::Max, &elements), 0);
            assert_eq!(made(Dtype::F32, Op::Min, &elements), 0x8000_0000);
        }
    }

    #[test]
    fn an_average_is_the_sum_divided_and_then_rounded() {
        let third = made(Dtype::Bf16, Op::Avg, &[0x3f80, 0, 0]);
        assert_eq!(third, u64::from(bf16::from_f32(1.0 / 3.0).to_bits()));
        assert_eq!(made(Dtype::Bf16, Op::Sum, &[0x8000, 0x8000]), 0x8000, "-0 + -0 is -0");
    }
}
