//! A network namespace for each simulated host, so that hosts share neither
//! loopback nor abstract sockets.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Network namespaces of a session's hosts, joined by a bridge. They go when
/// this is dropped.
#[derive(Debug)]
pub struct Netns {
    prefix: String,
    hosts: u32,
}

fn ip(args: &str) -> Result<(), String> {
    let output = Command::new("ip").args(args.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {args}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Netns {
    /// Makes the namespaces; `None`, with the reason on standard error, where
    /// the system does not permit it.
    pub fn try_new(hosts: u32) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("tws{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let netns = Self { prefix, hosts };
        match netns.set_up() {
            Ok(()) => Some(netns),
            Err(why) => {
                eprintln!("no network namespaces here: {why}");
                None
            }
        }
    }

    /// The name of a host's namespace.
    pub fn name(&self, host: u32) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// The address of a host in it.
    pub fn address(&self, host: u32) -> String {
        format!("10.77.{}.{}", host / 250, host % 250 + 1)
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.prefix)
    }

    fn set_up(&self) -> Result<(), String> {
        let switch = self.switch();
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add br0 type bridge"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for host in 0..self.hosts {
            let (name, address) = (self.name(host), self.address(host));
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {switch} link add port{host} type veth peer name eth0 netns {name}"))?;
            ip(&format!("-n {switch} link set port{host} master br0 up"))?;
            ip(&format!("-n {name} addr add {address}/16 dev eth0"))?;
            ip(&format!("-n {name} link set eth0 up"))?;
        }
        Ok(())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = ip(&format!("netns del {}", self.name(host)));
        }
        let _ = ip(&format!("netns del {}", self.switch()));
    }
}
