//! What hardware a session pretends to have.

use std::fmt;

/// How two GPUs of a host are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Peer access over NVLink.
    Nvlink,
    /// Peer access over PCIe only.
    Pcie,
    /// No peer access.
    None,
}

/// How far a host's registration with the fabric manager has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fabric {
    /// The GPUs know no fabric.
    NotSupported,
    /// Registration has not begun.
    NotStarted,
    /// Registration is under way.
    InProgress,
    /// The host is part of a fabric.
    Completed,
}

/// One simulated host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Number of GPUs.
    pub gpus: u32,
    /// Registration state.
    pub fabric: Fabric,
    /// Cluster UUID; all zero on a host whose NVLink ends at its own switch.
    pub uuid: [u8; 16],
    /// Clique within the cluster.
    pub clique: u32,
    /// True when the process may use an IMEX channel, which fabric handles need.
    pub imex: bool,
    /// How every pair of the host's GPUs is joined.
    pub link: Link,
}

impl Host {
    /// A host with an NVSwitch of its own and no fabric beyond it.
    pub fn alone(gpus: u32) -> Self {
        Self { gpus, fabric: Fabric::Completed, uuid: [0; 16], clique: 0, imex: false, link: Link::Nvlink }
    }

    /// A host of a multi-node NVLink fabric.
    pub fn in_fabric(gpus: u32, uuid: [u8; 16], clique: u32) -> Self {
        Self { gpus, fabric: Fabric::Completed, uuid, clique, imex: true, link: Link::Nvlink }
    }
}

/// The hosts of a session. [`fmt::Display`] gives the text the libraries read.
#[derive(Clone, Debug)]
pub struct Topology {
    hosts: Vec<Host>,
    lines: Vec<String>,
    defaults: Vec<String>,
}

/// The cluster UUID of [`Topology::fabric`].
const UUID: [u8; 16] = *b"twoshot-fabric-1";

impl Topology {
    /// One host with an NVSwitch.
    pub fn one_host(gpus: u32) -> Self {
        Self::of(vec![Host::alone(gpus)])
    }

    /// `hosts` hosts with `gpus` GPUs each, all in one NVLink fabric.
    pub fn fabric(hosts: u32, gpus: u32) -> Self {
        Self::of((0..hosts).map(|_| Host::in_fabric(gpus, UUID, 1)).collect())
    }

    /// These hosts.
    pub fn of(hosts: Vec<Host>) -> Self {
        Self { hosts, lines: Vec::new(), defaults: Vec::new() }
    }

    /// Changes one host.
    #[must_use]
    pub fn with_host(mut self, index: usize, change: impl FnOnce(&mut Host)) -> Self {
        change(&mut self.hosts[index]);
        self
    }

    /// A property of all GPUs, `multicast=0` for example.
    #[must_use]
    pub fn gpus(mut self, setting: &str) -> Self {
        self.defaults.push(setting.to_owned());
        self
    }

    /// A property of one GPU.
    #[must_use]
    pub fn gpu(self, host: u32, gpu: u32, setting: &str) -> Self {
        self.line(format!("gpu {host}:{gpu} {setting}"))
    }

    /// The link between two GPUs of a host.
    #[must_use]
    pub fn pair(self, host: u32, a: u32, b: u32, link: Link) -> Self {
        self.line(format!("pair {host}:{a} {host}:{b} {link}"))
    }

    /// The version the driver reports, 13000 for 13.0.
    #[must_use]
    pub fn driver(self, version: u32) -> Self {
        self.line(format!("driver {version}"))
    }

    /// How many multicast objects a switch domain holds.
    #[must_use]
    pub fn multicast_slots(self, slots: u32) -> Self {
        self.line(format!("mc-slots {slots}"))
    }

    /// Any other line of the topology file.
    #[must_use]
    pub fn line(mut self, line: impl Into<String>) -> Self {
        self.lines.push(line.into());
        self
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Number of GPUs of all hosts.
    pub fn gpu_count(&self) -> u32 {
        self.hosts.iter().map(|h| h.gpus).sum()
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Link::Nvlink => "nvlink",
            Link::Pcie => "pcie",
            Link::None => "none",
        })
    }
}

impl fmt::Display for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fabric::NotSupported => "not-supported",
            Fabric::NotStarted => "not-started",
            Fabric::InProgress => "in-progress",
            Fabric::Completed => "completed",
        })
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.defaults.is_empty() {
            writeln!(f, "gpu-defaults {}", self.defaults.join(" "))?;
        }
        for (index, h) in self.hosts.iter().enumerate() {
            let uuid: String = h.uuid.iter().map(|b| format!("{b:02x}")).collect();
            let Host { gpus, fabric, clique, link, .. } = h;
            let imex = u8::from(h.imex);
            writeln!(
                f,
                "host {index} gpus={gpus} fabric={fabric} uuid={uuid} clique={clique} imex={imex} link={link}"
            )?;
        }
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}
