//! The facts of this rank, and its links to the others. Probed under a deadline: NVML and the driver can block.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::time::Duration;

use super::{Local, Request, reason};
use crate::config::Config;
use crate::decline::Decline;
use crate::domain::{Domain, UNUSABLE};
use crate::driver::{Device, FabricFacts, HandleType, fabric_facts, nvlink_between};
use crate::error::{Error, Result};
use crate::handoff::random;
use crate::steps::bounded;
use crate::warning;
use crate::wire::Facts;

/// What tells this host from others: the kernel's boot id, or the user's own name for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HostIdentity([u8; 16]);

impl HostIdentity {
    /// Reads it. Names are not used: containers and clones share them.
    pub fn read(config: &Config) -> Result<Self> {
        let text = match &config.host_id {
            Some(id) => id.clone(),
            None => std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map_err(|source| Error::System { what: "reading the kernel's boot id", source })?,
        };
        Ok(Self(digest128(text.trim().as_bytes())))
    }

    /// As it travels.
    pub fn bytes(&self) -> [u8; 16] {
        self.0
    }
}

/// FNV-1a, 128 bits: identities need to be equal or different, not secret.
fn digest128(bytes: &[u8]) -> [u8; 16] {
    let hash = bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    hash.to_le_bytes()
}

/// What tells this build from others that it must not share memory with: its version, and the kernels' sources, whose
/// headers are the layout of that memory.
pub fn build() -> u64 {
    let words = [env!("CARGO_PKG_VERSION"), env!("CARGO_PKG_NAME"), env!("TWOSHOT_KERNEL_SOURCES")];
    let digest = digest128(words.join("/").as_bytes());
    u64::from_le_bytes([digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7]])
}

/// What tells this process from all others; process ids of two containers can be the same.
fn process() -> Option<[u8; 16]> {
    static PROCESS: OnceLock<Option<[u8; 16]>> = OnceLock::new();
    *PROCESS.get_or_init(|| random().ok())
}

fn refusal_of(error: &Error) -> Decline {
    if matches!(error, Error::Deadline(_)) { Decline::Deadline } else { Decline::Probe }
}

/// Collects this rank's facts. Never fails: what goes wrong is a fact too.
pub fn facts(
    rank: u32,
    ranks: u32,
    request: Request,
    config: &Config,
    identity: std::result::Result<&HostIdentity, &Error>,
    deadline: Duration,
) -> Facts {
    let mut facts = Facts { ranks, rank, config: config.digest(), build: build(), ..Facts::default() };
    facts.nccl = request.nccl;
    facts.deadline_ms = u32::try_from(config.setup_timeout_ms).unwrap_or(u32::MAX);
    facts.bound = request.bound.digest;
    facts.operations = !request.bound.unseen && !request.bound.incomplete;
    facts.tuning = match &config.tuning {
        None => 0,
        Some(Ok(tuning)) => tuning.digest(),
        Some(Err(_)) => UNUSABLE,
    };
    let refusal = if let Some(message) = &config.invalid {
        warning!(request.device, "{message}");
        Some(Decline::InvalidConfig)
    } else if !config.enable {
        Some(Decline::Disabled)
    } else if config.forbidden.is_some() {
        Some(Decline::Forbidden)
    } else if request.bound.incomplete {
        Some(Decline::BindingIncomplete)
    } else if ranks < 2 {
        Some(Decline::OneRank)
    } else {
        None
    };
    if let Some(refusal) = refusal {
        facts.declined = Some((refusal, 0));
        return facts;
    }
    match identity {
        Ok(identity) => facts.host = identity.0,
        Err(error) => {
            crate::trace!(request.device, "{error}");
            facts.declined = Some((refusal_of(error), error.code()));
            return facts;
        }
    }
    let ordinal = request.device;
    let probed = bounded("examining the device", deadline, move || {
        let device = Device::new(ordinal)?.facts()?;
        // A machine without NVML, or a GPU without a fabric, is no error: it just cannot span hosts.
        let fabric = fabric_facts(&device.bus_id).unwrap_or_default();
        Ok((device, fabric))
    });
    match probed {
        Ok((device, fabric)) => {
            facts.gpu = device.uuid;
            facts.bus_id = device.bus_id;
            facts.arch = device.arch;
            let budget = config.max_blocks.into_iter().chain(request.max_blocks).min();
            facts.chosen_blocks = budget.is_some();
            facts.blocks = device.sms.min(budget.unwrap_or(u32::MAX)).max(1);
            facts.vmm = device.vmm;
            facts.fd_handles = device.fd_handles;
            facts.fabric_handles = device.fabric_handles;
            let process = process();
            facts.process = process.unwrap_or_default();
            // A fabric that has not finished must not see a multicast call: it can fail for good or block.
            facts.multicast = device.multicast && config.multicast && fabric.completed && process.is_some();
            facts.switch_reduce = config.switch_reduce;
            facts.mnnvl = config.mnnvl;
            facts.shared_gpu = config.shared_gpu;
            facts.fabric = overridden(fabric, config);
        }
        Err(error) => {
            crate::trace!(ordinal, "examining the device: {error}");
            facts.declined = Some((refusal_of(&error), error.code()));
        }
    }
    facts
}

/// `NCCL_MNNVL_UUID` and `NCCL_MNNVL_CLIQUE_ID` mean what they mean to NCCL: the number replaces the cluster's
/// identity (both halves of the UUID) and the clique.
pub fn overridden(mut fabric: FabricFacts, config: &Config) -> FabricFacts {
    if let Some(uuid) = config.mnnvl_uuid {
        let half = uuid.to_le_bytes();
        fabric.uuid[..8].copy_from_slice(&half);
        fabric.uuid[8..].copy_from_slice(&half);
    }
    if let Some(clique) = config.mnnvl_clique {
        fabric.clique = clique;
    }
    fabric
}

/// On one host: NVLink from this GPU to every other. Across hosts the clique already says it.
pub fn links(domain: &Domain, rank: u32, config: &Config, deadline: Duration) -> Local<()> {
    if domain.handle != HandleType::Fd {
        return Ok(());
    }
    let own = domain.facts[rank as usize];
    let peers: Vec<_> = domain.facts.iter().filter(|peer| peer.gpu != own.gpu).map(|peer| peer.bus_id).collect();
    if peers.is_empty() && config.shared_gpu {
        return Ok(());
    }
    let bus_id = own.bus_id;
    let linked = bounded("asking for NVLink", deadline, move || nvlink_between(&bus_id, &peers))
        .or_else(reason(Decline::NoNvlink))?;
    if linked.iter().all(|linked| *linked) {
        Ok(())
    } else {
        Err((Decline::NoNvlink, Error::Protocol("a GPU of this host is not an NVLink peer")))
    }
}
