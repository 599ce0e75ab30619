//! The driver, the GPUs, their links, their fabric, and which memory handles really work.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use twoshot::config::Config;
use twoshot::decline::Decline;
use twoshot::domain::MIN_ARCH;
use twoshot::driver::{
    Allocation, Context, Device, DeviceFacts, FabricFacts, HandleType, Imported, Shareable, fabric_facts, granularity,
    nvlink_between,
};
use twoshot::error::{Error, Result};
use twoshot::steps::bounded;
use twoshot::wire::Facts;

use super::{Findings, Mark};
use crate::{cuda, rank, report};

/// How long one question may take: drivers and fabric managers can block.
const PATIENCE: Duration = Duration::from_secs(20);
/// A kernel driver makes one file per channel.
const IMEX: &str = "/dev/nvidia-caps-imex-channels";

/// What the ranks of a communicator over all visible GPUs would say of themselves.
pub struct Gpus {
    pub facts: Vec<Facts>,
    /// What the probes found that the facts cannot say.
    pub refusal: Option<(Decline, String)>,
}

/// Looks at everything that hangs on the driver.
pub fn examine(findings: &mut Findings, config: &Config) -> std::result::Result<Gpus, String> {
    let (version, path) = cuda::driver().inspect_err(|error| findings.add(Mark::Fail, "driver", error))?;
    let module = rank::driver_version();
    let module = if module.is_empty() { module } else { format!("kernel module {module}, ") };
    findings.add(Mark::Ok, "driver", format!("{module}CUDA {} from {path}", report::cuda_version(version)));
    let count = cuda::device_count()?;
    if count == 0 {
        findings.add(Mark::Fail, "GPU", "none visible; check CUDA_VISIBLE_DEVICES");
        return Err("no GPU is visible".to_owned());
    }
    let mut gpus = Gpus { facts: Vec::new(), refusal: None };
    let mut seen = Vec::new();
    for ordinal in 0..count {
        let device = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let name = cuda::device_name(device)?;
        let asked = bounded("examining the device", PATIENCE, move || {
            let facts = Device::new(device)?.facts()?;
            Ok((facts, fabric_facts(&facts.bus_id)))
        });
        let (device, fabric) = asked.map_err(|error| {
            findings.add(Mark::Fail, "GPU", format!("{ordinal} {name}: {error}"));
            error.to_string()
        })?;
        show(findings, ordinal, &name, &device);
        if let Err(error) = &fabric {
            findings.add(Mark::Warn, "NVML", error.to_string());
        }
        let fabric = fabric.unwrap_or_default();
        gpus.facts.push(facts(config, (ordinal, count), &device, fabric));
        seen.push((device, fabric));
    }
    links(findings, &seen, &mut gpus);
    fabric(findings, &seen, config);
    handles(findings, &seen, &mut gpus);
    let multicast = seen.iter().all(|(device, _)| device.multicast);
    let wanted = if config.multicast { "" } else { "; switched off by the environment" };
    let text = if multicast { "the GPUs have it (attribute; not tried here)" } else { "not on all GPUs" };
    findings.add(Mark::Info, "multicast", format!("{text}{wanted}"));
    Ok(gpus)
}

fn show(findings: &mut Findings, ordinal: u32, name: &str, device: &DeviceFacts) {
    let mark = if device.arch >= MIN_ARCH { Mark::Ok } else { Mark::Fail };
    let bus = String::from_utf8_lossy(&device.bus_id).trim_end_matches('\0').to_owned();
    let uuid = report::uuid(&device.uuid);
    findings.add(mark, "GPU", format!("{ordinal} {name}, sm_{}, {} SMs, {bus}, {uuid}", device.arch, device.sms));
}

/// As `setup` would collect them, for a communicator of one process or thread per visible GPU.
fn facts(config: &Config, (rank, ranks): (u32, u32), device: &DeviceFacts, fabric: FabricFacts) -> Facts {
    Facts {
        ranks,
        rank,
        config: config.digest(),
        gpu: device.uuid,
        bus_id: device.bus_id,
        arch: device.arch,
        blocks: device.sms,
        vmm: device.vmm,
        fd_handles: device.fd_handles,
        fabric_handles: device.fabric_handles,
        multicast: device.multicast && config.multicast && fabric.completed,
        mnnvl: config.mnnvl,
        shared_gpu: config.shared_gpu,
        fabric,
        ..Facts::default()
    }
}

fn links(findings: &mut Findings, seen: &[(DeviceFacts, FabricFacts)], gpus: &mut Gpus) {
    if seen.len() < 2 {
        return;
    }
    let buses: Vec<_> = seen.iter().map(|(device, _)| device.bus_id).collect();
    let asked = bounded("asking for NVLink", PATIENCE, move || {
        let mut missing = Vec::new();
        for (a, own) in buses.iter().enumerate() {
            let linked = nvlink_between(own, &buses[a + 1..])?;
            missing.extend(linked.iter().enumerate().filter(|(_, linked)| !**linked).map(|(i, _)| (a, a + 1 + i)));
        }
        Ok(missing)
    });
    let pairs = seen.len() * (seen.len() - 1) / 2;
    match asked {
        Ok(missing) if missing.is_empty() => findings.add(Mark::Ok, "NVLink", format!("between all {pairs} pairs")),
        Ok(missing) => {
            let names: Vec<_> = missing.iter().take(8).map(|(a, b)| format!("{a}-{b}")).collect();
            let more = if missing.len() > names.len() { ", ..." } else { "" };
            let text = format!("{} of {pairs} pairs have none: {}{more}", missing.len(), names.join(", "));
            findings.add(Mark::Fail, "NVLink", &text);
            gpus.refusal = Some((Decline::NoNvlink, text));
        }
        Err(error) => {
            findings.add(Mark::Fail, "NVLink", error.to_string());
            gpus.refusal = Some((Decline::NoNvlink, error.to_string()));
        }
    }
}

fn multi_node(fabric: &FabricFacts) -> bool {
    fabric.completed && fabric.uuid != [0; 16]
}

fn fabric(findings: &mut Findings, seen: &[(DeviceFacts, FabricFacts)], config: &Config) {
    let mut kinds: Vec<FabricFacts> = Vec::new();
    for (_, fabric) in seen {
        if !kinds.contains(fabric) {
            kinds.push(*fabric);
        }
    }
    for fabric in &kinds {
        let uuid: String = fabric.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = match (fabric.completed, multi_node(fabric)) {
            (_, true) => format!("completed, cluster {uuid}, clique {}: can span hosts", fabric.clique),
            (true, false) => "completed, cluster UUID zero: NVLink ends at this host".to_owned(),
            (false, _) => "not completed: no multi-node NVLink, no multicast".to_owned(),
        };
        findings.add(Mark::Info, "fabric", text);
    }
    if kinds.len() > 1 {
        findings.add(Mark::Warn, "fabric", "the GPUs of this host are not all in the same cluster and clique");
    }
    if !kinds.iter().any(multi_node) {
        return;
    }
    if !config.mnnvl {
        findings.add(Mark::Warn, "fabric", "NCCL_MNNVL_ENABLE=0: communicators that span hosts stay with stock NCCL");
    }
    let channels = std::fs::read_dir(IMEX).map_or(0, |entries| entries.flatten().count());
    if channels > 0 {
        findings.add(Mark::Ok, "IMEX", format!("{channels} channel(s) in {IMEX}"));
    } else {
        findings.add(
            Mark::Warn,
            "IMEX",
            format!("no channel in {IMEX} (a container needs its own); whether fabric handles work is probed below"),
        );
    }
}

/// Creates, exports and, across hosts, imports: what the attributes promise is not always so.
fn handles(findings: &mut Findings, seen: &[(DeviceFacts, FabricFacts)], gpus: &mut Gpus) {
    for kind in [HandleType::Fd, HandleType::Fabric] {
        let name = if kind == HandleType::Fd { "file descriptors" } else { "fabric handles" };
        let able = |(device, fabric): &(DeviceFacts, FabricFacts)| match kind {
            HandleType::Fd => device.vmm && device.fd_handles,
            // Without a multi-node fabric nobody asks for one, and some drivers answer late or never.
            HandleType::Fabric => device.fabric_handles && multi_node(fabric),
        };
        let which: Vec<i32> = (0..).zip(seen).filter(|(_, one)| able(one)).map(|(ordinal, _)| ordinal).collect();
        if which.is_empty() {
            let text = if kind == HandleType::Fd { "not supported" } else { "not tried: no multi-node fabric" };
            let mark = if kind == HandleType::Fd { Mark::Fail } else { Mark::Info };
            findings.add(mark, "handles", format!("{name}: {text}"));
            continue;
        }
        let failed = which.iter().find_map(|ordinal| probe(*ordinal, kind).err().map(|error| (*ordinal, error)));
        match failed {
            None => findings.add(
                Mark::Ok,
                "handles",
                format!("{name}: created, exported and imported on {} GPU(s)", which.len()),
            ),
            Some((ordinal, error)) if kind == HandleType::Fd => {
                let text = format!("GPU {ordinal}: {error}");
                findings.add(Mark::Fail, "handles", format!("{name}: {text}"));
                gpus.refusal.get_or_insert((Decline::Export, text));
            }
            Some((ordinal, error)) => {
                let text =
                    format!("{name}: GPU {ordinal}: {error}; communicators that span hosts stay with stock NCCL");
                findings.add(Mark::Warn, "handles", text);
            }
        }
    }
}

fn probe(ordinal: i32, kind: HandleType) -> Result<()> {
    bounded("probing memory handles", PATIENCE, move || {
        use std::os::fd::AsFd;
        let context = Context::retain(Device::new(ordinal)?)?;
        let bytes = granularity(&context, kind)?;
        let own = Allocation::create(&context, bytes, kind)?;
        let imported: Arc<Allocation> = match own.export(kind)? {
            Shareable::Fd(fd) => Allocation::import(&context, bytes, Imported::Fd(fd.as_fd()))?,
            Shareable::Fabric(handle) => Allocation::import(&context, bytes, Imported::Fabric(&handle))?,
        };
        if imported.bytes() == bytes { Ok(()) } else { Err(Error::Protocol("the imported memory has another size")) }
    })
}
