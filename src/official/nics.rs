//! The network devices that NCCL is offered: one per GPU of the host, so that every GPU has a rail of its own.
//!
//! They are NVML's GPUs in NVML's order, because every rank of a host has to count them alike, whatever it sees through
//! `CUDA_VISIBLE_DEVICES`. A device is a name and a number only: the memory that NCCL's calls work on is that of the GPU
//! which is current when NCCL connects.
//!
//! They have no PCI path. NCCL (2.20 to 2.30) loses a GPU that shares its PCI node with a network card, and what hangs
//! below a node with one, so neither the GPU's own path nor its bridge's will do; without a path they hang off the first
//! CPU, one for each GPU.
#![forbid(unsafe_code)]

use std::ffi::{CStr, CString};
use std::sync::OnceLock;

use crate::config::{Config, Mode};
use crate::domain::MIN_ARCH;
use crate::driver::{Device, current_ordinal, gpus, ordinal_at};
use crate::error::{Error, Result};
use crate::info;

/// Bandwidth that NCCL is told, in Mbit/s: 18 links of NVLink 4, one direction.
pub const SPEED_MBPS: i32 = 3_600_000;
/// Latency that NCCL is told, in microseconds.
pub const LATENCY_US: f32 = 10.0;
/// Connections of a device. More than NCCL ever makes.
pub const MAX_COMMS: i32 = 65_536;
/// Largest single transfer, and largest slice of a collective: sizes come back through an `int`.
pub const MAX_BYTES: usize = 1 << 30;

/// One device.
#[derive(Debug)]
pub struct Nic {
    name: CString,
    bus_id: [u8; 16],
    /// A number that no other device of any host should have.
    pub guid: u64,
}

impl Nic {
    /// Its name, which lives as long as the program.
    pub fn name(&self) -> &CStr {
        &self.name
    }
}

/// All devices; none where nothing can be offered.
pub fn nics() -> &'static [Nic] {
    static NICS: OnceLock<Vec<Nic>> = OnceLock::new();
    NICS.get_or_init(|| match find() {
        Ok(nics) => nics,
        Err(why) => {
            info!(-1, "collnet: no network is offered, NCCL uses its own: {why}");
            Vec::new()
        }
    })
}

fn find() -> std::result::Result<Vec<Nic>, String> {
    let config = Config::get();
    if let Some(message) = &config.invalid {
        return Err(message.clone());
    }
    if config.mode != Mode::CollNet || !config.enable {
        return Err("it is switched off".to_owned());
    }
    if let Some(words) = config.forbidden {
        return Err(format!("{words} is set"));
    }
    let text = |error: Error| error.to_string();
    let facts = Device::new(0).and_then(|device| device.facts()).map_err(text)?;
    if facts.arch < MIN_ARCH {
        return Err(format!("kernels exist for compute capability 9.0 and newer, this is {}", facts.arch));
    }
    if !(facts.vmm && facts.fd_handles) {
        return Err("the driver cannot share memory through the virtual memory management API".to_owned());
    }
    let found = gpus().map_err(text)?;
    let nic = |(index, bus_id): (usize, [u8; 16])| {
        let name = CString::new(format!("twoshot{index}")).map_err(|error| error.to_string())?;
        Ok(Nic { name, bus_id, guid: guid(&bus_id) })
    };
    found.into_iter().enumerate().map(nic).collect()
}

/// NCCL takes devices with one number for ports of one card.
fn guid(bus_id: &[u8; 16]) -> u64 {
    let seed = 0xcbf2_9ce4_8422_2325_u64;
    bus_id.iter().fold(seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)) | 1
}

/// The GPU behind a call of NCCL's: the one that is current on its thread, else the one that the device stands for.
pub fn ordinal(nic: i32) -> Result<i32> {
    let named =
        || usize::try_from(nic).ok().and_then(|index| nics().get(index)).and_then(|nic| ordinal_at(&nic.bus_id));
    current_ordinal().or_else(named).ok_or(Error::Protocol("no CUDA device is current, and none is behind the network"))
}
