//! One AllReduce call as a value: what `ncclAllReduce` was asked, in open integers.
#![forbid(unsafe_code)]

/// NCCL's `ncclDataType_t` as the number it is: newer libraries add values, so it stays open.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DataType(pub i32);

impl DataType {
    /// `ncclFloat16`.
    pub const F16: Self = Self(6);
    /// `ncclFloat32`.
    pub const F32: Self = Self(7);
    /// `ncclBfloat16`.
    pub const BF16: Self = Self(9);

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

    /// The part of a kernel's name that stands for this type, if there are kernels for it.
    pub fn kernel_name(self) -> Option<&'static str> {
        match self {
            Self::F32 => Some("f32"),
            Self::F16 => Some("f16"),
            Self::BF16 => Some("bf16"),
            _ => None,
        }
    }

    /// Index of this type in the table of kernels; the order is [`DataType::ROUTED`].
    pub fn kernel_index(self) -> Option<usize> {
        Self::ROUTED.iter().position(|known| *known == self)
    }

    /// The types the kernels reduce.
    pub const ROUTED: [Self; 3] = [Self::F32, Self::F16, Self::BF16];
}

/// NCCL's `ncclRedOp_t` as the number it is: values from 5 on are operations made at run time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReduceOp(pub i32);

impl ReduceOp {
    /// `ncclSum`.
    pub const SUM: Self = Self(0);
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
