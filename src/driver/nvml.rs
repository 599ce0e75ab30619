//! NVML, opened at run time for the length of one question: the fabric a GPU belongs to and its links to peers.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::error::{Error, Result};

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
mod sys {
    include!(concat!(env!("OUT_DIR"), "/nvml_abi.rs"));
}
use sys::{nvmlDevice_t, nvmlGpuFabricInfo_t, nvmlGpuFabricInfo_v2_t, nvmlPciInfo_t};

type InfoV = unsafe extern "C" fn(nvmlDevice_t, *mut c_void) -> c_int;
type InfoV1 = unsafe extern "C" fn(nvmlDevice_t, *mut nvmlGpuFabricInfo_t) -> c_int;
type ByIndex = unsafe extern "C" fn(c_uint, *mut nvmlDevice_t) -> c_int;
type PciInfo = unsafe extern "C" fn(nvmlDevice_t, *mut nvmlPciInfo_t) -> c_int;
type ByBusId = unsafe extern "C" fn(*const c_char, *mut nvmlDevice_t) -> c_int;
type P2pStatus = unsafe extern "C" fn(nvmlDevice_t, nvmlDevice_t, c_uint, *mut c_uint) -> c_int;

/// What NVML says of a GPU's fabric. The default is "none".
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FabricFacts {
    /// The fabric manager has finished with this GPU, without error.
    pub completed: bool,
    /// Cluster UUID; all zero outside a multi-node fabric.
    pub uuid: [u8; 16],
    /// Clique: the GPUs of one cluster that reach each other.
    pub clique: u32,
}

/// How far the fabric manager has come with a GPU: NVML's numbers, as the open integers they are.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FabricState {
    /// `nvmlGpuFabricState_t`.
    pub state: u32,
    /// `nvmlReturn_t` of the registration, once it is completed.
    pub status: i32,
}

impl FabricState {
    fn completed(self) -> bool {
        self.state == sys::NVML_GPU_FABRIC_STATE_COMPLETED && self.status == sys::NVML_SUCCESS as i32
    }
}

impl std::fmt::Display for FabricState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.state {
            0 => f.write_str("not supported by this GPU"),
            1 => f.write_str("registration not started"),
            2 => f.write_str("registration in progress"),
            3 if self.status == 0 => f.write_str("completed"),
            3 => write!(f, "registration failed with NVML error {}", self.status),
            state => write!(f, "unknown state {state}"),
        }
    }
}

struct Nvml {
    library: libloading::Library,
}

impl Nvml {
    fn open() -> Result<Self> {
        // SAFETY: NVML's initialisers have no preconditions.
        let library = unsafe { libloading::Library::new("libnvidia-ml.so.1") }
            .map_err(|error| Error::NvmlLibrary(error.to_string()))?;
        {
            let init = symbol::<unsafe extern "C" fn() -> c_int>(&library, b"nvmlInit_v2\0")?;
            // SAFETY: takes nothing; balanced by `drop`.
            check("nvmlInit_v2", unsafe { init() })?;
        }
        Ok(Self { library })
    }

    fn device(&self, bus_id: &[u8; 16]) -> Result<nvmlDevice_t> {
        if !bus_id.contains(&0) {
            return Err(Error::Protocol("a PCI bus id is not terminated"));
        }
        let find = symbol::<ByBusId>(&self.library, b"nvmlDeviceGetHandleByPciBusId_v2\0")?;
        let mut device = std::ptr::null_mut();
        // SAFETY: terminated text, valid out-pointer.
        check("nvmlDeviceGetHandleByPciBusId_v2", unsafe { find(bus_id.as_ptr().cast(), &mut device) })?;
        Ok(device)
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        if let Ok(shutdown) = symbol::<unsafe extern "C" fn() -> c_int>(&self.library, b"nvmlShutdown\0") {
            // SAFETY: balances `nvmlInit_v2`, which counts its users.
            let _ = unsafe { shutdown() };
        }
    }
}

fn symbol<'a, F>(library: &'a libloading::Library, name: &'static [u8]) -> Result<libloading::Symbol<'a, F>> {
    // SAFETY: callers name the type that `include/nvml_abi.h` states for the function.
    unsafe { library.get(name) }.map_err(|error| Error::NvmlLibrary(error.to_string()))
}

fn check(call: &'static str, code: c_int) -> Result<()> {
    if code == sys::NVML_SUCCESS as c_int { Ok(()) } else { Err(Error::Nvml { call, code }) }
}

/// The fabric of the GPU at a PCI bus id. A library or GPU without fabric support has none; that is no error.
pub fn fabric_facts(bus_id: &[u8; 16]) -> Result<FabricFacts> {
    fabric_state(bus_id).map(|(facts, _)| facts)
}

/// The same, and how far its registration has come.
pub fn fabric_state(bus_id: &[u8; 16]) -> Result<(FabricFacts, FabricState)> {
    let nvml = Nvml::open()?;
    let device = nvml.device(bus_id)?;
    if let Ok(query) = symbol::<InfoV>(&nvml.library, b"nvmlDeviceGetGpuFabricInfoV\0") {
        // SAFETY: plain integers, for which zero is a value.
        let mut info: nvmlGpuFabricInfo_v2_t = unsafe { std::mem::zeroed() };
        info.version = sys::TWOSHOT_NVML_FABRIC_INFO_V2;
        // SAFETY: the structure that the version word announces.
        if unsafe { query(device, (&raw mut info).cast()) } == 0 {
            let state = FabricState { state: u32::from(info.state), status: info.status as i32 };
            return Ok((
                FabricFacts { completed: state.completed(), uuid: info.clusterUuid, clique: info.cliqueId },
                state,
            ));
        }
    }
    if let Ok(query) = symbol::<InfoV1>(&nvml.library, b"nvmlDeviceGetGpuFabricInfo\0") {
        // SAFETY: as above.
        let mut info: nvmlGpuFabricInfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: valid out-pointer.
        if unsafe { query(device, &mut info) } == 0 {
            let state = FabricState { state: u32::from(info.state), status: info.status as i32 };
            return Ok((
                FabricFacts { completed: state.completed(), uuid: info.clusterUuid, clique: info.cliqueId },
                state,
            ));
        }
    }
    Ok((FabricFacts::default(), FabricState::default()))
}

/// PCI bus ids of all GPUs of this host, in NVML's order: the same on every rank, whatever each of them sees through
/// `CUDA_VISIBLE_DEVICES`.
pub fn gpus() -> Result<Vec<[u8; 16]>> {
    let nvml = Nvml::open()?;
    let count_of = symbol::<unsafe extern "C" fn(*mut c_uint) -> c_int>(&nvml.library, b"nvmlDeviceGetCount_v2\0")?;
    let find = symbol::<ByIndex>(&nvml.library, b"nvmlDeviceGetHandleByIndex_v2\0")?;
    let place = symbol::<PciInfo>(&nvml.library, b"nvmlDeviceGetPciInfo_v3\0")?;
    let mut count = 0;
    // SAFETY: valid out-pointer.
    check("nvmlDeviceGetCount_v2", unsafe { count_of(&mut count) })?;
    (0..count)
        .map(|index| {
            let mut device = std::ptr::null_mut();
            // SAFETY: valid out-pointer; a GPU that is not ours to see is an error code.
            check("nvmlDeviceGetHandleByIndex_v2", unsafe { find(index, &mut device) })?;
            // SAFETY: plain integers and text, for which zero is a value.
            let mut info: nvmlPciInfo_t = unsafe { std::mem::zeroed() };
            // SAFETY: a live device, valid out-pointer.
            check("nvmlDeviceGetPciInfo_v3", unsafe { place(device, &mut info) })?;
            Ok(info.busIdLegacy.map(|byte| byte as u8))
        })
        .collect()
}

/// Whether two GPUs of this host are connected by NVLink (directly or through a switch), both ways for stores.
pub fn nvlink_between(own: &[u8; 16], peers: &[[u8; 16]]) -> Result<Vec<bool>> {
    let nvml = Nvml::open()?;
    let own = nvml.device(own)?;
    let status_of = symbol::<P2pStatus>(&nvml.library, b"nvmlDeviceGetP2PStatus\0")?;
    peers
        .iter()
        .map(|bus_id| {
            let peer = nvml.device(bus_id)?;
            let good = |from, to, index| -> Result<bool> {
                let mut status = sys::NVML_P2P_STATUS_UNKNOWN;
                // SAFETY: live devices, valid out-pointer.
                check("nvmlDeviceGetP2PStatus", unsafe { status_of(from, to, index, &mut status) })?;
                Ok(status == sys::NVML_P2P_STATUS_OK)
            };
            let link = sys::NVML_P2P_CAPS_INDEX_NVLINK;
            let write = sys::NVML_P2P_CAPS_INDEX_WRITE;
            Ok(good(own, peer, link)? && good(own, peer, write)? && good(peer, own, write)?)
        })
        .collect()
}
