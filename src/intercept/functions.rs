//! The stock library's functions that twoshot calls itself, by type.
//!
//! Handles are opaque and enumerations are open integers here, so this table depends on no generated binding. Every
//! function of [`Functions`] is called the way `include/nccl_api.h` declares it.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// `ncclResult_t`.
pub type Code = c_int;
/// `ncclComm_t`.
pub type Comm = *mut c_void;
/// `cudaStream_t`.
pub type Stream = *mut c_void;
/// `ncclConfig_t *`, passed on unseen.
pub type Config = *mut c_void;
/// `const ncclCollConfig_t *`, passed on unseen.
pub type CallConfig = *const c_void;

/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId {
    /// The bytes that NCCL made.
    pub internal: [c_char; 128],
}

/// `ncclWaitSignalDesc_t`: signals that a rank waits for.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SignalWait {
    /// How many.
    pub operations: c_int,
    /// From whom.
    pub peer: c_int,
    /// Which one.
    pub signal: c_int,
    /// Of which context.
    pub context: c_int,
}

macro_rules! functions {
    (
        required { $($name:ident = $symbol:literal: ($($argument:ty),*) -> $result:ty;)* }
        optional { $($later:ident = $later_symbol:literal: ($($later_argument:ty),*) -> $later_result:ty;)* }
    ) => {
        /// Addresses of the stock library's functions, read by a plain load.
        pub struct Functions {
            $(
                #[doc = concat!("`", $symbol, "`.")]
                pub $name: unsafe extern "C" fn($($argument),*) -> $result,
            )*
            $(
                #[doc = concat!("`", $later_symbol, "`; newer than NCCL 2.20, so it may be missing.")]
                pub $later: Option<unsafe extern "C" fn($($later_argument),*) -> $later_result>,
            )*
        }

        impl Functions {
            /// Looks all names up. The error is the name of a function that every supported NCCL has and this one lacks.
            pub(super) fn load(
                find: impl Fn(&CStr) -> Option<*const c_void>,
            ) -> Result<Self, &'static CStr> {
                const fn c(text: &'static str) -> &'static CStr {
                    match CStr::from_bytes_with_nul(text.as_bytes()) {
                        Ok(text) => text,
                        Err(_) => panic!("a name without its end"),
                    }
                }
                Ok(Self {
                    $($name: {
                        const NAME: &CStr = c(concat!($symbol, "\0"));
                        let address = find(NAME).ok_or(NAME)?;
                        // SAFETY: the stock library defines this name with this signature, see `nccl_api.h`.
                        unsafe {
                            std::mem::transmute::<
                                *const c_void,
                                unsafe extern "C" fn($($argument),*) -> $result,
                            >(address)
                        }
                    },)*
                    $($later: find(const { c(concat!($later_symbol, "\0")) }).map(|address| {
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<
                                *const c_void,
                                unsafe extern "C" fn($($later_argument),*) -> $later_result,
                            >(address)
                        }
                    }),)*
                })
            }
        }
    };
}

type In = *const c_void;
type Out = *mut c_void;

functions! {
    required {
        get_version = "ncclGetVersion": (*mut c_int) -> Code;
        get_unique_id = "ncclGetUniqueId": (*mut UniqueId) -> Code;
        get_error_string = "ncclGetErrorString": (Code) -> *const c_char;
        get_last_error = "ncclGetLastError": (Comm) -> *const c_char;
        comm_init_rank = "ncclCommInitRank": (*mut Comm, c_int, UniqueId, c_int) -> Code;
        comm_init_rank_config = "ncclCommInitRankConfig": (*mut Comm, c_int, UniqueId, c_int, Config) -> Code;
        comm_init_all = "ncclCommInitAll": (*mut Comm, c_int, *const c_int) -> Code;
        comm_split = "ncclCommSplit": (Comm, c_int, c_int, *mut Comm, Config) -> Code;
        comm_finalize = "ncclCommFinalize": (Comm) -> Code;
        comm_destroy = "ncclCommDestroy": (Comm) -> Code;
        comm_abort = "ncclCommAbort": (Comm) -> Code;
        comm_get_async_error = "ncclCommGetAsyncError": (Comm, *mut Code) -> Code;
        comm_count = "ncclCommCount": (Comm, *mut c_int) -> Code;
        comm_cu_device = "ncclCommCuDevice": (Comm, *mut c_int) -> Code;
        comm_user_rank = "ncclCommUserRank": (Comm, *mut c_int) -> Code;
        red_op_create_pre_mul_sum = "ncclRedOpCreatePreMulSum": (*mut c_int, *mut c_void, c_int, c_int, Comm) -> Code;
        red_op_destroy = "ncclRedOpDestroy": (c_int, Comm) -> Code;
        all_reduce = "ncclAllReduce": (In, Out, usize, c_int, c_int, Comm, Stream) -> Code;
        reduce = "ncclReduce": (In, Out, usize, c_int, c_int, c_int, Comm, Stream) -> Code;
        bcast = "ncclBcast": (Out, usize, c_int, c_int, Comm, Stream) -> Code;
        broadcast = "ncclBroadcast": (In, Out, usize, c_int, c_int, Comm, Stream) -> Code;
        reduce_scatter = "ncclReduceScatter": (In, Out, usize, c_int, c_int, Comm, Stream) -> Code;
        all_gather = "ncclAllGather": (In, Out, usize, c_int, Comm, Stream) -> Code;
        send = "ncclSend": (In, usize, c_int, c_int, Comm, Stream) -> Code;
        recv = "ncclRecv": (Out, usize, c_int, c_int, Comm, Stream) -> Code;
        group_start = "ncclGroupStart": () -> Code;
        group_end = "ncclGroupEnd": () -> Code;
    }
    optional {
        group_simulate_end = "ncclGroupSimulateEnd": (*mut c_void) -> Code;
        comm_init_rank_scalable = "ncclCommInitRankScalable": (*mut Comm, c_int, c_int, c_int, *mut UniqueId, Config) -> Code;
        comm_shrink = "ncclCommShrink": (Comm, *mut c_int, c_int, *mut Comm, Config, c_int) -> Code;
        comm_grow = "ncclCommGrow": (Comm, c_int, *const UniqueId, c_int, *mut Comm, Config) -> Code;
        comm_revoke = "ncclCommRevoke": (Comm, c_int) -> Code;
        comm_suspend = "ncclCommSuspend": (Comm, c_int) -> Code;
        comm_resume = "ncclCommResume": (Comm) -> Code;
        all_to_all = "ncclAlltoAll": (In, Out, usize, c_int, Comm, Stream) -> Code;
        gather = "ncclGather": (In, Out, usize, c_int, c_int, Comm, Stream) -> Code;
        scatter = "ncclScatter": (In, Out, usize, c_int, c_int, Comm, Stream) -> Code;
        put_signal = "ncclPutSignal": (In, usize, c_int, c_int, Out, usize, c_int, c_int, c_uint, Comm, Stream) -> Code;
        signal = "ncclSignal": (c_int, c_int, c_int, c_uint, Comm, Stream) -> Code;
        wait_signal = "ncclWaitSignal": (c_int, *mut SignalWait, Comm, Stream) -> Code;
        all_reduce_config = "ncclAllReduceConfig": (In, Out, usize, c_int, c_int, Comm, Stream, CallConfig) -> Code;
        reduce_config = "ncclReduceConfig": (In, Out, usize, c_int, c_int, c_int, Comm, Stream, CallConfig) -> Code;
        broadcast_config = "ncclBroadcastConfig": (In, Out, usize, c_int, c_int, Comm, Stream, CallConfig) -> Code;
        reduce_scatter_config = "ncclReduceScatterConfig": (In, Out, usize, c_int, c_int, Comm, Stream, CallConfig) -> Code;
        all_gather_config = "ncclAllGatherConfig": (In, Out, usize, c_int, Comm, Stream, CallConfig) -> Code;
        all_to_all_config = "ncclAlltoAllConfig": (In, Out, usize, c_int, Comm, Stream, CallConfig) -> Code;
        gather_config = "ncclGatherConfig": (In, Out, usize, c_int, c_int, Comm, Stream, CallConfig) -> Code;
        scatter_config = "ncclScatterConfig": (In, Out, usize, c_int, c_int, Comm, Stream, CallConfig) -> Code;
    }
}
