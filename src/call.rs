//! One AllReduce call as a value: what `ncclAllReduce` was asked, in open integers.
#![forbid(unsafe_code)]

use crate::layout::Packing;

/// NCCL's `ncclDataType_t` as the number it is: newer libraries add values, so it stays open.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DataType(pub i32);

impl DataType {
    /// `ncclInt8`.
    pub const I8: Self = Self(0);
    /// `ncclUint8`.
    pub const U8: Self = Self(1);
    /// `ncclInt32`.
    pub const I32: Self = Self(2);
    /// `ncclUint32`.
    pub const U32: Self = Self(3);
    /// `ncclInt64`.
    pub const I64: Self = Self(4);
    /// `ncclUint64`.
    pub const U64: Self = Self(5);
    /// `ncclFloat16`.
    pub const F16: Self = Self(6);
    /// `ncclFloat32`.
    pub const F32: Self = Self(7);
    /// `ncclFloat64`.
    pub const F64: Self = Self(8);
    /// `ncclBfloat16`.
    pub const BF16: Self = Self(9);
    /// `ncclFloat8e4m3`.
    pub const E4M3: Self = Self(10);
    /// `ncclFloat8e5m2`.
    pub const E5M2: Self = Self(11);

    /// Bytes of one element, or `None` for a number this version does not know.
    pub fn size(self) -> Option<u64> {
        match self.0 {
            0 | 1 | 10 | 11 => Some(1),
            6 | 9 => Some(2),
            2 | 3 | 7 => Some(4),
            4 | 5 | 8 => Some(8),
            _ => None,
        }
    }
}

/// NCCL's `ncclRedOp_t` as the number it is: values from 5 on are operations made at run time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReduceOp(pub i32);

impl ReduceOp {
    /// `ncclSum`.
    pub const SUM: Self = Self(0);
    /// `ncclProd`.
    pub const PROD: Self = Self(1);
    /// `ncclMax`.
    pub const MAX: Self = Self(2);
    /// `ncclMin`.
    pub const MIN: Self = Self(3);
    /// `ncclAvg`.
    pub const AVG: Self = Self(4);

    /// Whether NCCL's caller made it at run time: a pre-multiplied sum.
    pub fn made(self) -> bool {
        self.0 > Self::AVG.0
    }

    /// Whether the kernels know it by its number.
    pub fn known(self) -> bool {
        (Self::SUM.0..=Self::AVG.0).contains(&self.0)
    }
}

/// What every element is multiplied by before the sum. It may differ between ranks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Factor {
    /// Its bits, in the elements' type.
    Value(u64),
    /// Its device address: it is read when the call runs.
    Device(u64),
}

/// What a kernel is made for: one type's sum, or a class of types with every operation.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Class {
    /// Sums of f32.
    F32,
    /// Sums of f16.
    F16,
    /// Sums of bf16.
    Bf16,
    /// Every other operation on f32.
    F32Op,
    /// Every other operation on f16.
    F16Op,
    /// Every other operation on bf16.
    Bf16Op,
    /// i8 and u8.
    I8,
    /// i32 and u32.
    I32,
    /// i64 and u64.
    I64,
    /// f64.
    F64,
    /// e4m3 and e5m2.
    Fp8,
}

impl Class {
    /// All of them, in the order of the kernel table.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::F32Op,
        Self::F16Op,
        Self::Bf16Op,
        Self::I8,
        Self::I32,
        Self::I64,
        Self::F64,
        Self::Fp8,
    ];

    /// The part of a kernel's name that stands for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32Op => "f32op",
            Self::F16Op => "f16op",
            Self::Bf16Op => "bf16op",
            Self::I8 => "i8",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::F64 => "f64",
            Self::Fp8 => "fp8",
        }
    }

    /// Whether a pre-multiplied sum may use it: a class that sums, and the only one of its types that does.
    pub fn scales(self) -> bool {
        !matches!(self, Self::F32Op | Self::F16Op | Self::Bf16Op)
    }

    /// Whether its kernels are also compiled for particular numbers of ranks.
    pub fn specialised(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// How its payload lies in lines.
    pub fn packing(self) -> Packing {
        match self {
            Self::I8 | Self::I32 | Self::I64 | Self::F64 | Self::Fp8 => Packing::Half,
            _ => Packing::Full,
        }
    }
}

/// The arguments of one AllReduce that every rank gives alike. Addresses are not part of it: they differ
/// between ranks, and whatever differs between ranks must not decide the path a call takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Call {
    /// Elements to reduce.
    pub count: u64,
    /// Element type.
    pub dtype: DataType,
    /// Reduction.
    pub op: ReduceOp,
}

impl Call {
    /// Bytes of the payload, for statistics: 0 where the type is not known.
    pub fn bytes(&self) -> u64 {
        self.dtype.size().unwrap_or(0).saturating_mul(self.count)
    }

    /// The kernels for this type and operation, if there are any.
    pub fn class(&self) -> Option<Class> {
        if !self.op.known() {
            return None;
        }
        let sum = self.op == ReduceOp::SUM;
        Some(match self.dtype {
            DataType::F32 if sum => Class::F32,
            DataType::F16 if sum => Class::F16,
            DataType::BF16 if sum => Class::Bf16,
            DataType::F32 => Class::F32Op,
            DataType::F16 => Class::F16Op,
            DataType::BF16 => Class::Bf16Op,
            DataType::I8 | DataType::U8 => Class::I8,
            DataType::I32 | DataType::U32 => Class::I32,
            DataType::I64 | DataType::U64 => Class::I64,
            DataType::F64 => Class::F64,
            DataType::E4M3 | DataType::E5M2 => Class::Fp8,
            _ => return None,
        })
    }
}
