//! The driver, the GPUs, their links, their fabric, and which memory handles really work.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use twoshot::config::Config;
use twoshot::decline::Decline;
use twoshot::domain::MIN_ARCH;
use twoshot::driver::{
    Allocation, Context, Device, DeviceFacts, FabricFacts, FabricState, HandleType, Imported, Module, Shareable,
    fabric_state, granularity, nvlink_between,
};
use twoshot::error::{Error, Result};
use twoshot::setup::{build, overridden};
use twoshot::steps::bounded;
use twoshot::wire::Facts;

use super::{Doctor, Findings, Mark, multicast};
use crate::{cuda, rank, report};

/// How long one question may take: drivers and fabric managers can block.
const PATIENCE: Duration = Duration::from_secs(20);
/// A kernel driver makes one file per channel.
const IMEX: &str = "dev/nvidia-caps-imex-channels";
/// The newest function that the library cannot do without is `cuLaunchKernelEx`.
const OLDEST_DRIVER: i32 = 11_080;

/// What the ranks of a communicator over all visible GPUs would say of themselves.
pub struct Gpus {
    pub facts: Vec<Facts>,
    /// What the probes found that the facts cannot say.
    pub refusal: Option<(Decline, String)>,
    /// The same for communicators that span hosts.
    pub refusal_across: Option<(Decline, String)>,
}

struct Seen {
    device: DeviceFacts,
    fabric: FabricFacts,
    state: FabricState,
}

/// Looks at everything that hangs on the driver.
pub fn examine(findings: &mut Findings, doctor: &Doctor, config: &Config) -> std::result::Result<Gpus, String> {
    let (version, path) = cuda::driver().inspect_err(|error| findings.add(Mark::Fail, "driver", error))?;
    let module = rank::driver_version();
    let module = if module.is_empty() { module } else { format!("kernel module {module}, ") };
    let text = format!("{module}CUDA {} from {path}", report::cuda_version(version));
    if version < OLDEST_DRIVER {
        let text =
            format!("{text}: too old, install driver 520 (CUDA {}) or newer", report::cuda_version(OLDEST_DRIVER));
        findings.add(Mark::Fail, "driver", &text);
        return Err(format!("the driver is too old: CUDA {}", report::cuda_version(version)));
    }
    findings.add(Mark::Ok, "driver", text);
    let count = cuda::device_count()?;
    if count == 0 {
        findings.add(Mark::Fail, "GPU", "none visible; check CUDA_VISIBLE_DEVICES");
        return Err("no GPU is visible".to_owned());
    }
    let mut gpus = Gpus { facts: Vec::new(), refusal: None, refusal_across: None };
    let mut seen = Vec::new();
    for ordinal in 0..count {
        let device = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let name = cuda::device_name(device)?;
        let asked = bounded("examining the device", PATIENCE, move || {
            let facts = Device::new(device)?.facts()?;
            Ok((facts, fabric_state(&facts.bus_id)))
        });
        let (device, fabric) = asked.map_err(|error| {
            findings.add(Mark::Fail, "GPU", format!("{ordinal} {name}: {error}"));
            error.to_string()
        })?;
        show(findings, ordinal, &name, &device);
        if let Err(error) = &fabric {
            findings.add(Mark::Warn, "NVML", error.to_string());
        }
        let (fabric, state) = fabric.unwrap_or_default();
        let fabric = overridden(fabric, config);
        gpus.facts.push(facts(config, (ordinal, count), &device, fabric));
        seen.push(Seen { device, fabric, state });
    }
    kernels(findings, &mut gpus);
    links(findings, &seen, &mut gpus);
    fabric(findings, &seen, (doctor, config));
    handles(findings, &seen, &mut gpus);
    let all = seen.iter().all(|one| one.device.multicast);
    let ready = seen.iter().all(|one| one.fabric.completed);
    multicast::examine(findings, (count, all, ready), doctor, config);
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
        build: build(),
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

/// The image has code for the architectures it was built for, and a driver may be older than the compiler.
fn kernels(findings: &mut Findings, gpus: &mut Gpus) {
    let fit = |(_, facts): &(i32, &Facts)| facts.arch >= MIN_ARCH;
    let which: Vec<i32> = (0..).zip(&gpus.facts).filter(fit).map(|(ordinal, _)| ordinal).collect();
    let load = |ordinal: i32| {
        bounded("loading the kernels", PATIENCE, move || {
            Module::load(&Context::retain(Device::new(ordinal)?)?)?.kernels(2, false, false).map(drop)
        })
    };
    match which.iter().find_map(|ordinal| load(*ordinal).err().map(|error| (*ordinal, error))) {
        None if which.is_empty() => {}
        None => findings.add(Mark::Ok, "kernels", format!("load on {} GPU(s)", which.len())),
        Some((ordinal, error)) => {
            let text = format!("GPU {ordinal}: {error}; is the driver too old for this build?");
            findings.add(Mark::Fail, "kernels", &text);
            gpus.refusal.get_or_insert((Decline::Module, text));
        }
    }
}

fn links(findings: &mut Findings, seen: &[Seen], gpus: &mut Gpus) {
    if seen.len() < 2 {
        return;
    }
    let buses: Vec<_> = seen.iter().map(|one| one.device.bus_id).collect();
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
            gpus.refusal.get_or_insert((Decline::NoNvlink, text));
        }
        Err(error) => {
            findings.add(Mark::Fail, "NVLink", error.to_string());
            gpus.refusal.get_or_insert((Decline::NoNvlink, error.to_string()));
        }
    }
}

fn multi_node(fabric: &FabricFacts) -> bool {
    fabric.completed && fabric.uuid != [0; 16]
}

fn fabric(findings: &mut Findings, seen: &[Seen], (doctor, config): (&Doctor, &Config)) {
    let mut kinds: Vec<(FabricFacts, FabricState)> = Vec::new();
    for one in seen {
        if !kinds.contains(&(one.fabric, one.state)) {
            kinds.push((one.fabric, one.state));
        }
    }
    for (fabric, state) in &kinds {
        let uuid: String = fabric.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = match (fabric.completed, multi_node(fabric)) {
            (true, true) => format!("completed, cluster {uuid}, clique {}: can span hosts", fabric.clique),
            (true, false) => "completed, cluster UUID zero: NVLink ends at this host".to_owned(),
            (false, _) => format!("{state}: no multi-node NVLink, no multicast"),
        };
        findings.add(Mark::Info, "fabric", text);
    }
    if kinds.len() > 1 {
        findings.add(Mark::Warn, "fabric", "the GPUs of this host are not all in the same cluster and clique");
    }
    if !kinds.iter().any(|(fabric, _)| multi_node(fabric)) {
        return;
    }
    if !config.mnnvl {
        findings.add(Mark::Warn, "fabric", "NCCL_MNNVL_ENABLE=0: communicators that span hosts stay with stock NCCL");
    }
    let channels = std::fs::read_dir(doctor.root.join(IMEX)).map_or(0, |entries| entries.flatten().count());
    if channels > 0 {
        findings.add(Mark::Ok, "IMEX", format!("{channels} channel(s) in /{IMEX}"));
    } else {
        findings.add(
            Mark::Warn,
            "IMEX",
            format!("no channel in /{IMEX} (a container needs its own); whether fabric handles work is probed below"),
        );
    }
}

/// Creates, exports and, across hosts, imports: what the attributes promise is not always so.
fn handles(findings: &mut Findings, seen: &[Seen], gpus: &mut Gpus) {
    for kind in [HandleType::Fd, HandleType::Fabric] {
        let name = if kind == HandleType::Fd { "file descriptors" } else { "fabric handles" };
        let able = |one: &Seen| match kind {
            HandleType::Fd => one.device.vmm && one.device.fd_handles,
            // Without a multi-node fabric nobody asks for one, and some drivers answer late or never.
            HandleType::Fabric => one.device.fabric_handles && multi_node(&one.fabric),
        };
        let which: Vec<i32> = (0..).zip(seen).filter(|(_, one)| able(one)).map(|(ordinal, _)| ordinal).collect();
        if which.is_empty() {
            let (mark, text) = match kind {
                HandleType::Fd => (Mark::Fail, "not supported by any GPU or its driver"),
                HandleType::Fabric if seen.iter().any(|one| multi_node(&one.fabric)) => {
                    (Mark::Warn, "not supported by any GPU or its driver")
                }
                HandleType::Fabric => (Mark::Info, "not tried: no multi-node fabric"),
            };
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
                let text = format!("GPU {ordinal}: {error}");
                let consequence = "communicators that span hosts stay with stock NCCL";
                findings.add(Mark::Warn, "handles", format!("{name}: {text}; {consequence}"));
                gpus.refusal_across.get_or_insert((Decline::FabricHandle, text));
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
