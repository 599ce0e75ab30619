//! The libraries, the environment and the container around them.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;
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
/// 2.20.
const OLDEST_NCCL: i32 = 22_000;
/// Set for this program and for tests, and not variables of the library.
const OTHERS: [&str; 2] = ["TWOSHOT_LIBRARY", "TWOSHOT_SIM_"];

/// libtwoshot.so and the NCCLs that a program could bind. An error is what keeps every call away from twoshot.
pub fn libraries(findings: &mut Findings) -> Result<(), (&'static str, String)> {
    match library::twoshot(None) {
        Ok(path) => findings.add(Mark::Ok, "twoshot", path.display().to_string()),
        Err(error) => findings.add(Mark::Warn, "twoshot", error),
    }
    let named = library::variable("TWOSHOT_NCCL_LIBRARY");
    // Opened before the one that is named: by its name the dynamic linker would find that one again.
    let linked = named.as_ref().and_then(|_| Nccl::open(Path::new(library::NCCL)).ok());
    let mut known = Vec::new();
    let mut failures = Vec::new();
    let mut verdict = Ok(());
    for candidate in library::nccl_candidates(None) {
        let nccl = match Nccl::open(&candidate) {
            Ok(nccl) if known.contains(&nccl.path()) => continue,
            Ok(nccl) => nccl,
            Err(error) => {
                failures.push(error);
                continue;
            }
        };
        known.push(nccl.path());
        let path = nccl.path().display();
        if nccl.twoshot_version().is_some() {
            let text = format!("{path} is twoshot itself: TWOSHOT_NCCL_LIBRARY must name stock NCCL");
            findings.add(Mark::Warn, "NCCL", text);
            continue;
        }
        match nccl.version() {
            Ok(version) if version < OLDEST_NCCL => {
                let text = format!("{}, {path}: too old, install 2.20 or newer", report::nccl_version(version));
                findings.add(Mark::Fail, "NCCL", &text);
                if known.len() == 1 {
                    verdict = Err(("old-nccl", text));
                }
            }
            Ok(version) => findings.add(Mark::Ok, "NCCL", format!("{}, {path}", report::nccl_version(version))),
            Err(error) => findings.add(Mark::Warn, "NCCL", error),
        }
    }
    match (&named, &known[..]) {
        // Every call would end here.
        (Some(named), _) if !failures.is_empty() && !known.iter().any(|path| same(path, named)) => {
            let text = format!("TWOSHOT_NCCL_LIBRARY: {}", failures[0]);
            findings.add(Mark::Fail, "NCCL", &text);
            verdict = Err(("no-nccl", text));
        }
        // A program can still bring its own, by its run path or linked into it.
        (_, []) => {
            let text =
                format!("none found from here ({}); a program's own is found by the program", failures.join("; "));
            findings.add(Mark::Warn, "NCCL", text);
        }
        (Some(_), [own]) if linked.is_some_and(|linked| linked.path() != *own) => {
            let text = format!(
                "a program that is linked with NCCL binds {}: two NCCLs in one process, of which only the calls to the \
                 first are routed; name the same file, or unset TWOSHOT_NCCL_LIBRARY",
                linked.map_or(Path::new("another"), Nccl::path).display()
            );
            findings.add(Mark::Warn, "NCCL", text);
        }
        (None, [_, _, ..]) => {
            let text =
                "the first is what the dynamic linker finds; a program with its own run path (PyTorch) binds its own";
            findings.add(Mark::Info, "NCCL", text);
        }
        _ => {}
    }
    verdict
}

fn same(a: &Path, b: &Path) -> bool {
    std::fs::canonicalize(b).is_ok_and(|b| b == a)
}

/// Every variable that is set and bears on the matter.
pub fn variables(findings: &mut Findings, config: &Config, invalid: Option<&str>, all: bool) {
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
        } else if all {
            let text = format!("{} is unset ({}): {}", variable.name, variable.default, variable.meaning);
            findings.add(Mark::Info, "environment", text);
        }
    }
    for name in unknown(std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned())) {
        findings.add(Mark::Warn, "environment", format!("{name} is set, and is no variable of this version"));
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

/// Misspelled, or of another version.
fn unknown(names: impl Iterator<Item = String>) -> Vec<String> {
    let known = |name: &String| {
        VARIABLES.iter().any(|variable| variable.name == *name) || OTHERS.iter().any(|other| name.starts_with(other))
    };
    let mut found: Vec<_> = names.filter(|name| name.starts_with("TWOSHOT_") && !known(name)).collect();
    found.sort();
    found
}

/// What containers take away.
pub fn container(findings: &mut Findings, config: &Config, root: &Path) -> Result<(), (Decline, String)> {
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
    shared_memory(findings, root);
    namespaces(findings);
    match sockets() {
        Ok(()) => {
            let text = "abstract Unix sockets pass descriptors. Ranks of one host must share a network namespace (one container, \
                        or host networking)";
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
fn shared_memory(findings: &mut Findings, root: &Path) {
    let folder = root.join("dev/shm");
    match rustix::fs::statvfs(&folder) {
        Ok(stat) => {
            let (mark, text) = room(stat.f_bavail.saturating_mul(stat.f_frsize));
            findings.add(mark, "/dev/shm", text);
        }
        Err(error) => {
            let text = format!("{error}: stock NCCL needs it; give the container one (--shm-size, --ipc=host)");
            findings.add(Mark::Warn, "/dev/shm", text);
        }
    }
}

fn room(free: u64) -> (Mark, String) {
    let text = format!("{} MiB free", free >> 20);
    if free < SMALL_SHM {
        (Mark::Warn, format!("{text}: stock NCCL may fail; enlarge it (--shm-size)"))
    } else {
        (Mark::Ok, text)
    }
}

/// Shown so that the ranks of a host can be compared.
fn namespaces(findings: &mut Findings) {
    let link = |name: &str| {
        let target = std::fs::read_link(format!("/proc/self/ns/{name}"));
        target.map_or_else(|error| format!("{name}: {error}"), |target| target.display().to_string())
    };
    let (net, pid, ipc) = (link("net"), link("pid"), link("ipc"));
    let text =
        format!("{net} must be the same for all ranks of a host; {pid}, {ipc} and the ptrace scope have no effect");
    findings.add(Mark::Info, "namespaces", text);
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
    fn little_shared_memory_is_a_warning() {
        assert_eq!(
            room(64 << 20),
            (Mark::Warn, "64 MiB free: stock NCCL may fail; enlarge it (--shm-size)".to_owned())
        );
        assert_eq!(room(1 << 30), (Mark::Ok, "1024 MiB free".to_owned()));
    }

    #[test]
    fn a_misspelled_variable_is_found_and_no_other() {
        let names = ["TWOSHOT_MAXBYTES", "TWOSHOT_MAX_BYTES", "TWOSHOT_SIM_DIR", "TWOSHOT_LIBRARY", "HOME"];
        assert_eq!(unknown(names.iter().map(|name| (*name).to_owned())), ["TWOSHOT_MAXBYTES"]);
    }

    #[test]
    fn a_descriptor_passes_through_a_socket_of_this_process() {
        assert_eq!(sockets(), Ok(()));
    }
}
