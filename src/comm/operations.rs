//! The pre-multiplied sums that a program has made for a communicator, by the handles that stock NCCL gave them.
#![forbid(unsafe_code)]

use parking_lot::Mutex;

use crate::call::{DataType, Factor, ReduceOp};

/// One operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Made {
    op: ReduceOp,
    dtype: DataType,
    factor: Factor,
}

/// Those of one communicator. Programs have few at a time: PyTorch makes one for a call and destroys it behind it.
#[derive(Default)]
pub struct Operations(Mutex<Vec<Made>>);

impl Operations {
    /// Stock NCCL has made one. A handle may be used again once its operation was destroyed, which we may not have seen.
    pub fn made(&self, op: ReduceOp, dtype: DataType, factor: Factor) {
        let mut all = self.0.lock();
        all.retain(|made| made.op != op);
        all.push(Made { op, dtype, factor });
    }

    /// Stock NCCL has destroyed it.
    pub fn destroyed(&self, op: ReduceOp) {
        self.0.lock().retain(|made| made.op != op);
    }

    /// The factor of an operation. None for one that was not seen, and for one of another type, which is stock NCCL's to
    /// refuse.
    pub fn factor(&self, op: ReduceOp, dtype: DataType) -> Option<Factor> {
        self.0.lock().iter().find(|made| made.op == op && made.dtype == dtype).map(|made| made.factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_found_by_handle_and_type_until_it_is_destroyed_or_its_handle_used_again() {
        let all = Operations::default();
        let (first, second) = (ReduceOp(5), ReduceOp(i32::MAX));
        all.made(first, DataType::F32, Factor::Value(1));
        all.made(second, DataType::F16, Factor::Device(64));
        assert_eq!(all.factor(first, DataType::F32), Some(Factor::Value(1)));
        assert_eq!(all.factor(first, DataType::F16), None);
        assert_eq!(all.factor(second, DataType::F16), Some(Factor::Device(64)));
        all.made(first, DataType::I8, Factor::Value(2));
        assert_eq!(all.factor(first, DataType::F32), None);
        assert_eq!(all.factor(first, DataType::I8), Some(Factor::Value(2)));
        all.destroyed(first);
        assert_eq!(all.factor(first, DataType::I8), None);
        assert_eq!(all.factor(second, DataType::F16), Some(Factor::Device(64)));
    }
}
