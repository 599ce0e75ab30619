//! Operations that programs make: pre-multiplied sums. Stock NCCL makes and destroys them; what they are is noted, so that
//! an AllReduce with one can be routed.
//!
//! Both of a function's names lead here, unlike elsewhere: an operation that was made behind our back is an operation
//! that this rank cannot route, and whether all ranks have seen theirs is voted on only once.

use std::ffi::{CStr, c_int, c_void};

use super::deferred::refused_by_handle;
use super::{Code, code, group, guard, stock, transparent};
use crate::call::{DataType, Factor, ReduceOp};
use crate::comm;
use crate::intercept::{Comm, Stock};

/// `ncclScalarDevice`.
const DEVICE: c_int = 0;
/// `ncclScalarHostImmediate`.
const HOST: c_int = 1;

/// What an operation multiplies by, if it is one that we understand.
///
/// # Safety
/// As for `ncclRedOpCreatePreMulSum`, which has just accepted these arguments.
unsafe fn factor(scalar: *const c_void, dtype: DataType, residence: c_int) -> Option<Factor> {
    let size = usize::try_from(dtype.size()?).ok()?;
    match residence {
        DEVICE => Some(Factor::Device(scalar as u64)),
        HOST => {
            let mut bits = [0u8; 8];
            // SAFETY: stock NCCL has read an element from there.
            unsafe { std::ptr::copy_nonoverlapping(scalar.cast::<u8>(), bits.as_mut_ptr(), size.min(bits.len())) };
            Some(Factor::Value(u64::from_le_bytes(bits)))
        }
        _ => None,
    }
}

fn create(op: *mut c_int, scalar: *mut c_void, dtype: c_int, residence: c_int, comm: Comm) -> Code {
    guard(|| {
        let stock = match stock() {
            Ok(stock) => stock,
            Err(code) => return code,
        };
        if let Some(refused) = refused_by_handle(comm) {
            return refused;
        }
        // SAFETY: the caller's own arguments.
        let result = unsafe { (stock.nccl.red_op_create_pre_mul_sum)(op, scalar, dtype, residence, comm) };
        if result != code::SUCCESS || comm.is_null() || op.is_null() || scalar.is_null() || transparent() {
            return result;
        }
        let dtype = DataType(dtype);
        // SAFETY: stock NCCL has just accepted them, and written the handle.
        let (made, factor) = unsafe { (ReduceOp(*op), factor(scalar, dtype, residence)) };
        let communicator = comm::find(comm as usize);
        match factor {
            Some(factor) => communicator.operations.made(made, dtype, factor),
            None => communicator.operations.destroyed(made),
        }
        result
    })
}

/// Destroys an operation at once.
pub(super) fn destroy_now(stock: &Stock, op: c_int, comm: Comm) -> Code {
    // Forgotten first: behind stock's destroy another thread may get the same handle.
    if let Some(communicator) = (!comm.is_null() && !transparent()).then(|| comm::known(comm as usize)).flatten() {
        communicator.operations.destroyed(ReduceOp(op));
    }
    // SAFETY: the caller's own arguments.
    unsafe { (stock.nccl.red_op_destroy)(op, comm) }
}

/// Whether a first call that is under way may need it.
fn laid_aside(op: c_int, comm: Comm) -> bool {
    let ours = (!comm.is_null() && !transparent()).then(|| comm::known(comm as usize)).flatten();
    ours.is_some_and(|communicator| communicator.deferral.lay_aside(ReduceOp(op)))
}

fn destroy(op: c_int, comm: Comm) -> Code {
    guard(|| match stock() {
        Ok(_) if group::destroys_later(op, comm) || laid_aside(op, comm) => code::SUCCESS,
        Ok(stock) => destroy_now(stock, op, comm),
        Err(code) => code,
    })
}

macro_rules! both_names {
    ($($name:ident, $second:ident = $body:ident($($arg:ident: $type:ty),*);)*) => {
        $(
            /// # Safety
            /// As for this function in NCCL.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> Code {
                $body($($arg),*)
            }

            /// # Safety
            /// As for this function in NCCL.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $second($($arg: $type),*) -> Code {
                $body($($arg),*)
            }
        )*
    };
}

both_names! {
    ncclRedOpCreatePreMulSum, pncclRedOpCreatePreMulSum =
        create(op: *mut c_int, scalar: *mut c_void, dtype: c_int, residence: c_int, comm: Comm);
    ncclRedOpDestroy, pncclRedOpDestroy = destroy(op: c_int, comm: Comm);
}

/// Names and addresses for the call slots.
pub(super) fn targets() -> Vec<(&'static CStr, *const c_void)> {
    vec![
        (c"ncclRedOpCreatePreMulSum", ncclRedOpCreatePreMulSum as *const c_void),
        (c"pncclRedOpCreatePreMulSum", pncclRedOpCreatePreMulSum as *const c_void),
        (c"ncclRedOpDestroy", ncclRedOpDestroy as *const c_void),
        (c"pncclRedOpDestroy", pncclRedOpDestroy as *const c_void),
    ]
}
