//! The tuner: tables of versions 3 to 6 over `official::tuner`. It answers in mode `collnet`; in the others NCCL does not
//! find it, or is told nothing.
#![allow(non_upper_case_globals)]

use std::ffi::{CStr, c_int, c_void};
use std::sync::Once;

use super::table::{Table, put};
use super::{Code, code, collnet_mode, guard};
use crate::config::Config;
use crate::official::tuner::{Advice, Limits, advise};
use crate::warning;
use bindings::*;

#[allow(
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/tuner_abi.rs"));
}

/// Hands NCCL the limits of a communicator, to be given back at every question.
///
/// # Safety
/// `context` is null or NCCL's own variable.
unsafe fn limits(ranks: usize, nodes: usize, context: *mut *mut c_void) -> Code {
    guard(|| {
        if context.is_null() {
            return code::SUCCESS;
        }
        let tuning = Config::get().tuning.as_ref().filter(|_| collnet_mode());
        if let Some(Err(why)) = tuning {
            static SAID: Once = Once::new();
            SAID.call_once(|| warning!(-1, "{why}: the tuner goes by its rule"));
        }
        let tuning = tuning.and_then(|tuning| tuning.as_ref().ok());
        let limits = Limits::of(tuning, ranks, nodes, Config::get().channels);
        // SAFETY: the caller's promise. The box is taken back by `end`.
        unsafe { put(context, Box::into_raw(Box::new(limits)).cast()) };
        code::SUCCESS
    })
}

/// # Safety
/// `context` is null or NCCL's own variable.
unsafe extern "C" fn begin(ranks: usize, nodes: usize, _: ncclDebugLogger_t, context: *mut *mut c_void) -> Code {
    // SAFETY: the caller's promise.
    unsafe { limits(ranks, nodes, context) }
}

/// # Safety
/// As for [`begin`].
unsafe extern "C" fn begin_named<D, C>(
    context: *mut *mut c_void,
    _: u64,
    ranks: usize,
    nodes: usize,
    _: ncclDebugLogger_t,
    _: *mut D,
    _: *mut C,
) -> Code {
    // SAFETY: as above.
    unsafe { limits(ranks, nodes, context) }
}

/// # Safety
/// `context` is null or what `begin` handed out, and is not used again.
unsafe extern "C" fn end(context: *mut c_void) -> Code {
    guard(|| {
        if !context.is_null() {
            // SAFETY: the caller's promise: the box that `begin` gave away.
            drop(unsafe { Box::from_raw(context.cast::<Limits>()) });
        }
        code::SUCCESS
    })
}

/// # Safety
/// `context` is null or what `begin` handed out; `costs` is null or a table of `algorithms` by `protocols` numbers, which
/// the type of the pointer does not say; `channels` is null or NCCL's own variable.
unsafe fn price(
    context: *mut c_void,
    function: ncclFunc_t,
    bytes: usize,
    costs: *mut *mut f32,
    algorithms: c_int,
    protocols: c_int,
    channels: *mut c_int,
) -> Code {
    guard(|| {
        let (Ok(algorithms), Ok(protocols)) = (usize::try_from(algorithms), usize::try_from(protocols)) else {
            return code::SUCCESS;
        };
        if collnet_mode() && !costs.is_null() && algorithms <= 64 && protocols <= 64 {
            // SAFETY: the caller's promise.
            let limits = unsafe { context.cast::<Limits>().as_ref() }.copied();
            let limits = limits.unwrap_or_else(|| Limits::of(None, 0, 0, 0));
            // SAFETY: as above.
            let costs = unsafe { std::slice::from_raw_parts_mut(costs.cast::<f32>(), algorithms * protocols) };
            let advice = advise(limits, function, bytes as u64, costs, protocols);
            if let Some(number) = limits.channels(bytes as u64).filter(|_| advice == Advice::CollNet) {
                // SAFETY: as above.
                unsafe { put(channels, number) };
            }
        }
        code::SUCCESS
    })
}

/// # Safety
/// As for [`price`].
unsafe extern "C" fn price_v3(
    context: *mut c_void,
    function: ncclFunc_t,
    bytes: usize,
    _: c_int,
    costs: *mut *mut f32,
    algorithms: c_int,
    protocols: c_int,
    channels: *mut c_int,
) -> Code {
    // SAFETY: as above.
    unsafe { price(context, function, bytes, costs, algorithms, protocols, channels) }
}

/// # Safety
/// As for [`price`].
unsafe extern "C" fn price_v4(
    context: *mut c_void,
    function: ncclFunc_t,
    bytes: usize,
    _: c_int,
    costs: *mut *mut f32,
    algorithms: c_int,
    protocols: c_int,
    _: c_int,
    channels: *mut c_int,
) -> Code {
    // SAFETY: as above.
    unsafe { price(context, function, bytes, costs, algorithms, protocols, channels) }
}

const NAME: *const std::ffi::c_char = c"twoshot".as_ptr();

/// See the head of this file.
#[unsafe(no_mangle)]
pub static ncclTunerPlugin_v3: Table<ncclTuner_v3_t> =
    Table::new(ncclTuner_v3_t { name: NAME, init: Some(begin), getCollInfo: Some(price_v3), destroy: Some(end) });

/// See the head of this file.
#[unsafe(no_mangle)]
pub static ncclTunerPlugin_v4: Table<ncclTuner_v4_t> =
    Table::new(ncclTuner_v4_t { name: NAME, init: Some(begin), getCollInfo: Some(price_v4), destroy: Some(end) });

/// See the head of this file.
#[unsafe(no_mangle)]
pub static ncclTunerPlugin_v5: Table<ncclTuner_v5_t> = Table::new(ncclTuner_v5_t {
    name: NAME,
    init: Some(begin_named),
    getCollInfo: Some(price_v4),
    finalize: Some(end),
});

/// See the head of this file.
#[unsafe(no_mangle)]
pub static ncclTunerPlugin_v6: Table<ncclTuner_v6_t> = Table::new(ncclTuner_v6_t {
    name: NAME,
    init: Some(begin_named),
    getCollInfo: Some(price_v4),
    finalize: Some(end),
    getChunkSize: None,
});

/// Names and addresses of the tables.
pub(super) fn tables() -> [(&'static CStr, *const c_void); 4] {
    [
        (c"ncclTunerPlugin_v3", (&raw const ncclTunerPlugin_v3).cast()),
        (c"ncclTunerPlugin_v4", (&raw const ncclTunerPlugin_v4).cast()),
        (c"ncclTunerPlugin_v5", (&raw const ncclTunerPlugin_v5).cast()),
        (c"ncclTunerPlugin_v6", (&raw const ncclTunerPlugin_v6).cast()),
    ]
}
