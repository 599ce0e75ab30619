//! The libraries, the environment and the container around them.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::time::Duration;

use twoshot::config::{Config, VARIABLES};
use twoshot::decline::Decline;
use twoshot::handoff::{Desk, Peer};
use twoshot::setup::HostIdentity;

use super::{Findings, Mark};
use crate::nccl::Nccl;
use crate::{library, report};

/// What stock NCCL wants in /dev/shm per GPU, roughly; containers often have 64 MiB in all.
const SMALL_SHM: u64 = 256 << 20;

/// libtwoshot.so and the NCCLs that a program could bind.
pub fn libraries(findings: &mut Findings) {
    match library::twoshot(None) {
        Ok(path) => findings.add(Mark::Ok, "twoshot", path.display().to_string()),
        Err(error) => findings.add(Mark::Warn, "twoshot", error),
    }
    let mut known = Vec::new();
    let mut failures = Vec::new();
    for candidate in library::nccl_candidates(None) {
        match Nccl::open(&candidate) {
            Ok(nccl) if known.contains(&nccl.path()) => {}
            Ok(nccl) => {
                known.push(nccl.path());
                let version = nccl.version().map_or_else(|error| error, report::nccl_version);
                let (mark, text) = if nccl.twoshot_version().is_some() {
                    (
                        Mark::Warn,
                        format!(
                            "{} is twoshot itself: TWOSHOT_NCCL_LIBRARY must name stock NCCL",
                            nccl.path().display()
                        ),
                    )
                } else {
                    (Mark::Ok, format!("{version}, {}", nccl.path().display()))
                };
                findings.add(mark, "NCCL", text);
            }
            Err(error) => failures.push(error),
        }
    }
    if known.is_empty() {
        // A program can still bring its own, by its run path or linked into it.
        let text = format!("none found from here ({}); a program's own is found by the program", failures.join("; "));
        findings.add(Mark::Info, "NCCL", text);
    } else if known.len() > 1 {
        let text =
            "the first is what the dynamic linker finds; a program with its own run path (PyTorch) binds its own";
        findings.add(Mark::Info, "NCCL", text);
    }
}

/// Every variable that is set and bears on the matter.
pub fn variables(findings: &mut Findings, config: &Config, invalid: Option<&str>) {
    if let Some(message) = invalid {
        findings.add(Mark::Fail, "environment", message);
    }
    let value =
        |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()).filter(|v| !v.is_empty());
    let mut any = false;
    for variable in VARIABLES {
        if let Some(value) = value(variable.name) {
            any = true;
            findings.add(Mark::Info, "environment", format!("{}={value}: {}", variable.name, variable.meaning));
        }
    }
    if let Some(words) = config.forbidden {
        findings.add(Mark::Fail, "environment", format!("{words}: AllReduce stays with stock NCCL"));
    }
    for name in ["NCCL_NET_PLUGIN", "LD_PRELOAD", "VLLM_NCCL_SO_PATH"] {
        if let Some(value) = value(name) {
            any = true;
            let door = if value.contains("twoshot") { "a door for twoshot" } else { "no door for twoshot" };
            findings.add(Mark::Info, "environment", format!("{name}={value}: {door}"));
        }
    }
    if !any {
        findings.add(
            Mark::Info,
            "environment",
            "no variable is set; `twoshot run -- COMMAND` sets what switches it on",
        );
    }
}

/// What containers take away.
pub fn container(findings: &mut Findings, config: &Config) -> Result<(), (Decline, String)> {
    match HostIdentity::read(config) {
        Ok(_) => findings.add(
            Mark::Ok,
            "host",
            if config.host_id.is_some() { "identity from TWOSHOT_HOST_ID" } else { "boot id readable" },
        ),
        Err(error) => {
            findings.add(Mark::Fail, "host", format!("{error}; set TWOSHOT_HOST_ID"));
            return Err((Decline::Probe, error.to_string()));
        }
    }
    shared_memory(findings);
    match sockets() {
        Ok(()) => {
            let text = "abstract Unix sockets pass descriptors. Ranks of one host must share a network namespace (one container, \
                        or host networking), which cannot be seen from one process";
            findings.add(Mark::Ok, "sockets", text);
            Ok(())
        }
        Err(error) => {
            findings.add(Mark::Fail, "sockets", &error);
            Err((Decline::Handoff, error))
        }
    }
}

/// twoshot does not use it; the stock NCCL that carries its set-up does.
fn shared_memory(findings: &mut Findings) {
    match rustix::fs::statvfs("/dev/shm") {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let (mark, hint) = if free < SMALL_SHM {
                (Mark::Warn, ": stock NCCL may fail; enlarge it (--shm-size)")
            } else {
                (Mark::Ok, "")
            };
            findings.add(mark, "/dev/shm", format!("{} MiB free{hint}", free >> 20));
        }
        Err(error) => findings.add(Mark::Warn, "/dev/shm", format!("{error}: stock NCCL needs it")),
    }
}

/// Passes a descriptor to ourselves the way ranks pass theirs to each other.
fn sockets() -> Result<(), String> {
    let words = |error: twoshot::error::Error| error.to_string();
    let desk = Desk::open(1).map_err(words)?;
    let file = std::fs::File::open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
    let peer = Peer { rank: 0, name: desk.name, token: desk.token };
    let taken = desk.trade(0, 0, Some((file.as_fd(), 1)), &[peer], Duration::from_secs(5)).map_err(words)?;
    if taken.len() == 1 { Ok(()) } else { Err("a descriptor got lost".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_passes_through_a_socket_of_this_process() {
        assert_eq!(sockets(), Ok(()));
    }
}
