//! The driver library, opened at run time: one table of function pointers, resolved once.
//!
//! `libcuda.so.1` is opened by that name only: `libcuda.so` may be a link-time stub. Functions that older drivers
//! lack are optional; their absence switches off what needs them.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// Types and constants of `include/cuda_abi.h`.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    clippy::all,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]
pub mod sys {
    include!(concat!(env!("OUT_DIR"), "/cuda_abi.rs"));
}
use sys::*;

macro_rules! api {
    (
        required { $($name:ident ( $($arg:ty),* $(,)? );)* }
        optional { $($oname:ident ( $($oarg:ty),* $(,)? );)* }
    ) => {
        /// The driver's functions. All return `CUresult`.
        #[allow(non_snake_case, missing_docs)]
        pub struct Api {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> CUresult,)*
            $(pub $oname: Option<unsafe extern "C" fn($($oarg),*) -> CUresult>,)*
            _library: libloading::Library,
        }

        #[allow(non_snake_case)]
        impl Api {
            fn load() -> std::result::Result<Self, String> {
                // SAFETY: libcuda's initialisers have no preconditions; every CUDA program runs them.
                let library = unsafe { libloading::Library::new("libcuda.so.1") }.map_err(|e| e.to_string())?;
                $(
                    // SAFETY: the signature is the one `include/cuda_abi.h` states for this exported name.
                    let $name = *unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) -> CUresult>(concat!(stringify!($name), "\0").as_bytes())
                    }.map_err(|e| e.to_string())?;
                )*
                $(
                    // SAFETY: as above.
                    let $oname = unsafe {
                        library.get::<unsafe extern "C" fn($($oarg),*) -> CUresult>(concat!(stringify!($oname), "\0").as_bytes())
                    }.ok().map(|symbol| *symbol);
                )*
                Ok(Self { $($name,)* $($oname,)* _library: library })
            }
        }
    };
}

api! {
    required {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
        cuDeviceGetUuid_v2(*mut CUuuid, CUdevice);
        cuDeviceGetPCIBusId(*mut c_char, c_int, CUdevice);
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        cuDevicePrimaryCtxRelease_v2(CUdevice);
        cuCtxGetCurrent(*mut CUcontext);
        cuCtxGetDevice(*mut CUdevice);
        cuCtxPushCurrent_v2(CUcontext);
        cuCtxPopCurrent_v2(*mut CUcontext);
        cuMemAlloc_v2(*mut CUdeviceptr, usize);
        cuMemFree_v2(CUdeviceptr);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuMemHostGetDevicePointer_v2(*mut CUdeviceptr, *mut c_void, c_uint);
        cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
        cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
        cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
        cuMemsetD32Async(CUdeviceptr, c_uint, usize, CUstream);
        cuPointerGetAttribute(*mut c_void, CUpointer_attribute, CUdeviceptr);
        cuMemGetAllocationGranularity(*mut usize, *const CUmemAllocationProp, CUmemAllocationGranularity_flags);
        cuMemCreate(*mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, c_ulonglong);
        cuMemRelease(CUmemGenericAllocationHandle);
        cuMemAddressReserve(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
        cuMemAddressFree(CUdeviceptr, usize);
        cuMemMap(CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong);
        cuMemUnmap(CUdeviceptr, usize);
        cuMemSetAccess(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
        cuMemExportToShareableHandle(*mut c_void, CUmemGenericAllocationHandle, CUmemAllocationHandleType, c_ulonglong);
        cuMemImportFromShareableHandle(*mut CUmemGenericAllocationHandle, *mut c_void, CUmemAllocationHandleType);
        cuStreamCreate(*mut CUstream, c_uint);
        cuStreamCreateWithPriority(*mut CUstream, c_uint, c_int);
        cuStreamDestroy_v2(CUstream);
        cuStreamQuery(CUstream);
        cuStreamSynchronize(CUstream);
        cuStreamWaitEvent(CUstream, CUevent, c_uint);
        cuThreadExchangeStreamCaptureMode(*mut CUstreamCaptureMode);
        cuEventCreate(*mut CUevent, c_uint);
        cuEventRecord(CUevent, CUstream);
        cuEventQuery(CUevent);
        cuEventDestroy_v2(CUevent);
        cuEventElapsedTime(*mut f32, CUevent, CUevent);
        cuModuleLoadData(*mut CUmodule, *const c_void);
        cuModuleUnload(CUmodule);
        cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        cuOccupancyMaxActiveBlocksPerMultiprocessor(*mut c_int, CUfunction, c_int, usize);
        cuLaunchKernelEx(*const CUlaunchConfig, CUfunction, *mut *mut c_void, *mut *mut c_void);
        cuUserObjectCreate(*mut CUuserObject, *mut c_void, CUhostFn, c_uint, c_uint);
        cuGraphRetainUserObject(CUgraph, CUuserObject, c_uint, c_uint);
    }
    optional {
        cuFuncLoad(CUfunction);
        cuCtxGetId(CUcontext, *mut c_ulonglong);
        cuStreamGetId(CUstream, *mut c_ulonglong);
        cuMemRetainAllocationHandle(*mut CUmemGenericAllocationHandle, *mut c_void);
        cuMemGetAllocationPropertiesFromHandle(*mut CUmemAllocationProp, CUmemGenericAllocationHandle);
        cuMemGetAddressRange_v2(*mut CUdeviceptr, *mut usize, CUdeviceptr);
        cuStreamGetCaptureInfo_v2(CUstream, *mut CUstreamCaptureStatus, *mut cuuint64_t, *mut CUgraph, *mut *const CUgraphNode, *mut usize);
        cuStreamUpdateCaptureDependencies(CUstream, *mut CUgraphNode, usize, c_uint);
        cuStreamGetCaptureInfo_v3(CUstream, *mut CUstreamCaptureStatus, *mut cuuint64_t, *mut CUgraph, *mut *const CUgraphNode, *mut *const c_void, *mut usize);
        cuStreamUpdateCaptureDependencies_v2(CUstream, *mut CUgraphNode, *const c_void, usize, c_uint);
        cuDeviceGetP2PAttribute(*mut c_int, CUdevice_P2PAttribute, CUdevice, CUdevice);
        cuMulticastCreate(*mut CUmemGenericAllocationHandle, *const CUmulticastObjectProp);
        cuMulticastAddDevice(CUmemGenericAllocationHandle, CUdevice);
        cuMulticastBindMem(CUmemGenericAllocationHandle, usize, CUmemGenericAllocationHandle, usize, usize, c_ulonglong);
        cuMulticastUnbind(CUmemGenericAllocationHandle, CUdevice, usize, usize);
        cuMulticastGetGranularity(*mut usize, *const CUmulticastObjectProp, CUmulticastGranularity_flags);
    }
}

/// The driver's table, loaded and initialised at the first use; a failure is remembered.
pub fn api() -> Result<&'static Api> {
    static API: OnceLock<std::result::Result<Api, String>> = OnceLock::new();
    let loaded = API.get_or_init(|| {
        let api = Api::load()?;
        // SAFETY: takes a flags word that must be zero.
        let init = || unsafe { (api.cuInit)(0) };
        // Asked twice: the answer is remembered, and a rank without a driver cannot even tell its peers.
        match if init() == 0 { 0 } else { init() } {
            0 => Ok(api),
            code => Err(format!("cuInit failed with {code}")),
        }
    });
    loaded.as_ref().map_err(|message| Error::DriverLibrary(message.clone()))
}

/// Turns a `CUresult` into a [`Result`] that names the call.
pub fn check(call: &'static str, code: CUresult) -> Result<()> {
    if code == CUDA_SUCCESS as i32 { Ok(()) } else { Err(Error::Driver { call, code }) }
}

/// Calls a function of the table and checks its result: `call!(api, cuMemRelease(handle))?`.
macro_rules! call {
    ($api:expr, $name:ident ( $($arg:expr),* $(,)? )) => {
        $crate::driver::api::check(stringify!($name), ($api.$name)($($arg),*))
    };
}
pub(crate) use call;
