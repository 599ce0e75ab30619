//! The environment, parsed once. Nothing else in the library reads environment variables.
//!
//! A malformed value turns the library off out loud ([`Config::invalid`]): a guess made on one rank alone would
//! be a difference between ranks.
#![forbid(unsafe_code)]

mod parse;
mod variables;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::layout::Algorithm;
use crate::tuning::{self, Tuning};
use parse::{bytes, choice, integer, switch, text};
pub use variables::{VARIABLES, Variable};

/// Which door into NCCL is opened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// Relocation slots, preload and by-path: `ncclAllReduce` itself is ours.
    #[default]
    Direct,
    /// NCCL's own plugin interface: nothing is bound, NCCL hands its work to our networks.
    CollNet,
    /// None: every call is stock's and nothing is bound.
    Off,
}

/// Everything the environment decides. See `docs/environment.md`, which is generated from [`VARIABLES`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// `TWOSHOT_MODE`.
    pub mode: Mode,
    /// `TWOSHOT_ENABLE`.
    pub enable: bool,
    /// `TWOSHOT_NCCL_LIBRARY`.
    pub nccl_library: Option<PathBuf>,
    /// `TWOSHOT_ALGO`: only this algorithm.
    pub algorithm: Option<Algorithm>,
    /// `TWOSHOT_MIN_BYTES`.
    pub min_bytes: u64,
    /// `TWOSHOT_MAX_BYTES`: replaces the table's upper limit.
    pub max_bytes: Option<u64>,
    /// `TWOSHOT_ONESHOT_MAX_BYTES`: replaces the table's switch from one-shot to two-shot.
    pub oneshot_max_bytes: Option<u64>,
    /// `TWOSHOT_MAX_BLOCKS`.
    pub max_blocks: Option<u32>,
    /// `TWOSHOT_MEMORY`: bytes of windows per device.
    pub memory: Option<u64>,
    /// `TWOSHOT_MULTICAST`, off too where `NCCL_NVLS_ENABLE=0` or where `NCCL_ALGO` excludes NVLS.
    pub multicast: bool,
    /// `TWOSHOT_SWITCH_REDUCE`: sums may be made by the switch, with other roundings.
    pub switch_reduce: bool,
    /// `TWOSHOT_TIMEOUT_MS`: deadline of a kernel's wait; 0 waits like stock NCCL.
    pub timeout_ms: u64,
    /// `TWOSHOT_SETUP_TIMEOUT_MS`: deadline of one step of a communicator's set-up.
    pub setup_timeout_ms: u64,
    /// `TWOSHOT_HOST_ID`: replaces the kernel's boot id as the identity of this host.
    pub host_id: Option<String>,
    /// `TWOSHOT_SHARED_GPU`: lets several ranks share one GPU, for tests.
    pub shared_gpu: bool,
    /// `TWOSHOT_NET`: the plugin whose network stands in for ours, in mode `collnet`.
    pub net: Option<PathBuf>,
    /// `TWOSHOT_NET_DIRECT`: our network copies straight into registered memory where it can.
    pub net_direct: bool,
    /// `NCCL_SOCKET_IFNAME`: which interfaces connections between ranks may use.
    pub interfaces: Option<String>,
    /// `TWOSHOT_PDL`: the program's kernels keep the rules of programmatic dependent launch.
    pub pdl: bool,
    /// `TWOSHOT_SAMPLE`: every how many-th call is timed; 0: none.
    pub sample: u32,
    /// `TWOSHOT_STATS`: where the counters are written.
    pub stats: Option<PathBuf>,
    /// `NVTX_INJECTION64_PATH`: the library of a profiler that wants to know of ranges.
    pub nvtx: Option<PathBuf>,
    /// `TWOSHOT_TUNING_FILE`.
    pub tuning_file: Option<PathBuf>,
    /// What it says, or in one line why it cannot be used; nothing where there is none or it was not read yet.
    pub tuning: Option<Result<Tuning, String>>,
    /// What the user's NCCL variables forbid, in the user's own words.
    pub forbidden: Option<&'static str>,
    /// `NCCL_MNNVL_ENABLE` is not 0: host-spanning communicators may use the fabric.
    pub mnnvl: bool,
    /// `NCCL_MNNVL_UUID`: replaces the cluster UUID that NVML reports.
    pub mnnvl_uuid: Option<u64>,
    /// `NCCL_MNNVL_CLIQUE_ID`: replaces the clique that NVML reports.
    pub mnnvl_clique: Option<u32>,
    /// `NCCL_MIN_NCHANNELS`: channels that every communicator of NCCL has; 0: not known.
    pub channels: u32,
    /// A value that could not be understood: variable and reason.
    pub invalid: Option<String>,
}

impl Config {
    /// The process's configuration. The first use reads the environment; later changes have no effect.
    pub fn get() -> &'static Self {
        static CONFIG: OnceLock<Config> = OnceLock::new();
        CONFIG.get_or_init(|| Self::of(|name| std::env::var_os(name)).with_tuning(tuning::read))
    }

    /// What holds in an environment, malformed or not. The mode and the network that stands in for ours have their effect
    /// before any vote: they are kept whatever else cannot be understood. A malformed mode is none: nothing is bound.
    pub fn of(var: impl Fn(&str) -> Option<OsString>) -> Self {
        Self::parse(&var).unwrap_or_else(|error| Self {
            mode: mode(&var).unwrap_or(Mode::Off),
            net: network(&var),
            invalid: Some(error.to_string()),
            ..Self::default()
        })
    }

    /// Pure: tests pass a closure and leave the process's environment alone.
    pub fn parse(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, parse::Invalid> {
        let var = &var;
        let default = Self::default();
        let mode = mode(var)?;
        // In this mode NCCL itself decides what its variables mean; and it only asks where it sees the hosts of one
        // fabric as separate ones, which is what `NCCL_MNNVL_ENABLE=0` is for.
        let asked = mode == Mode::CollNet;
        let algorithm = choice(
            var,
            "TWOSHOT_ALGO",
            &[
                ("auto", None),
                ("oneshot", Some(Algorithm::OneShot)),
                ("twoshot", Some(Algorithm::TwoShot)),
                ("switch", Some(Algorithm::Switch)),
                ("bulk", Some(Algorithm::Bulk)),
            ],
        )?;
        let nvls = nccl_switch(var, "NCCL_NVLS_ENABLE").unwrap_or(true)
            && !string(var, "NCCL_ALGO").is_some_and(|value| excludes_nvls(&value));
        Ok(Self {
            mode,
            enable: switch(var, "TWOSHOT_ENABLE")?.unwrap_or(default.enable),
            nccl_library: text(var, "TWOSHOT_NCCL_LIBRARY").map(PathBuf::from),
            algorithm: algorithm.flatten(),
            min_bytes: bytes(var, "TWOSHOT_MIN_BYTES")?.unwrap_or(default.min_bytes),
            max_bytes: bytes(var, "TWOSHOT_MAX_BYTES")?,
            oneshot_max_bytes: bytes(var, "TWOSHOT_ONESHOT_MAX_BYTES")?,
            max_blocks: integer(var, "TWOSHOT_MAX_BLOCKS", 1, 256)?.map(|n| u32::try_from(n).unwrap_or(256)),
            memory: bytes(var, "TWOSHOT_MEMORY")?,
            multicast: switch(var, "TWOSHOT_MULTICAST")?.unwrap_or(true) && nvls,
            switch_reduce: switch(var, "TWOSHOT_SWITCH_REDUCE")?.unwrap_or(default.switch_reduce),
            timeout_ms: integer(var, "TWOSHOT_TIMEOUT_MS", 0, 86_400_000)?.unwrap_or(0),
            setup_timeout_ms: integer(var, "TWOSHOT_SETUP_TIMEOUT_MS", 100, 3_600_000)?
                .unwrap_or(default.setup_timeout_ms),
            host_id: string(var, "TWOSHOT_HOST_ID"),
            shared_gpu: switch(var, "TWOSHOT_SHARED_GPU")?.unwrap_or(false),
            pdl: switch(var, "TWOSHOT_PDL")?.unwrap_or(false),
            sample: integer(var, "TWOSHOT_SAMPLE", 0, 1 << 30)?.map_or(0, |n| u32::try_from(n).unwrap_or(0)),
            net: network(var),
            net_direct: switch(var, "TWOSHOT_NET_DIRECT")?.unwrap_or(default.net_direct),
            interfaces: string(var, "NCCL_SOCKET_IFNAME"),
            stats: text(var, "TWOSHOT_STATS").map(PathBuf::from),
            nvtx: text(var, "NVTX_INJECTION64_PATH").map(PathBuf::from),
            tuning_file: text(var, "TWOSHOT_TUNING_FILE").map(PathBuf::from),
            tuning: None,
            forbidden: forbidden(var, !asked),
            mnnvl: asked || nccl_switch(var, "NCCL_MNNVL_ENABLE").unwrap_or(true),
            mnnvl_uuid: nccl_number(var, "NCCL_MNNVL_UUID"),
            mnnvl_clique: nccl_number(var, "NCCL_MNNVL_CLIQUE_ID").map(|n| n as u32),
            channels: channels(var, "NCCL_MIN_NCHANNELS"),
            invalid: None,
        })
    }

    /// Reads the tuning file, if there is one.
    #[must_use]
    pub fn with_tuning(mut self, read: impl Fn(&Path) -> io::Result<Vec<u8>>) -> Self {
        self.tuning = self.tuning_file.as_ref().map(|path| {
            let bytes = read(path).map_err(|error| error.to_string());
            bytes.and_then(|bytes| Tuning::parse(&bytes)).map_err(|why| {
                // A message can quote the file, which may be anything.
                let why: String = why.chars().filter(|c| !c.is_control()).take(200).collect();
                format!("TWOSHOT_TUNING_FILE={}: {why}", path.display())
            })
        });
        self
    }

    /// A number that is the same on two ranks exactly when the settings that must agree are the same.
    /// What merges (block budget, multicast, sums in the switch, time-outs, identity of the host) is left out, and so is the tuning file,
    /// which has a vote of its own.
    pub fn digest(&self) -> u64 {
        let algorithm = match self.algorithm {
            None => 0,
            Some(Algorithm::OneShot) => 1,
            Some(Algorithm::TwoShot) => 2,
            Some(Algorithm::Switch) => 3,
            Some(Algorithm::Bulk) => 4,
        };
        let words = [
            algorithm,
            self.min_bytes,
            self.max_bytes.map_or(u64::MAX, |n| n),
            self.oneshot_max_bytes.map_or(u64::MAX, |n| n),
            u64::from(self.shared_gpu),
        ];
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Direct,
            enable: true,
            nccl_library: None,
            algorithm: None,
            min_bytes: 0,
            max_bytes: None,
            oneshot_max_bytes: None,
            max_blocks: None,
            memory: None,
            multicast: true,
            switch_reduce: false,
            timeout_ms: 0,
            setup_timeout_ms: 20_000,
            host_id: None,
            shared_gpu: false,
            pdl: false,
            sample: 0,
            net: None,
            net_direct: true,
            interfaces: None,
            stats: None,
            nvtx: None,
            tuning_file: None,
            tuning: None,
            forbidden: None,
            mnnvl: true,
            mnnvl_uuid: None,
            mnnvl_clique: None,
            channels: 0,
            invalid: None,
        }
    }
}

fn mode(var: &impl Fn(&str) -> Option<OsString>) -> Result<Mode, parse::Invalid> {
    let modes = [("direct", Mode::Direct), ("collnet", Mode::CollNet), ("off", Mode::Off)];
    Ok(choice(var, "TWOSHOT_MODE", &modes)?.unwrap_or_default())
}

fn network(var: &impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    text(var, "TWOSHOT_NET").map(PathBuf::from)
}

/// `TWOSHOT_NCCL_LIBRARY`, readable before the rest: the stock library is looked for at the program's first call.
pub(crate) fn nccl_library() -> Option<PathBuf> {
    text(&|name: &str| std::env::var_os(name), "TWOSHOT_NCCL_LIBRARY").map(PathBuf::from)
}

/// The dynamic linker's search path.
pub(crate) fn library_path() -> OsString {
    std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default()
}

/// NCCL's variables that govern the log, read apart from [`Config`] because reading the rest may already log.
pub(crate) fn log_variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()).filter(|value| !value.is_empty())
}

/// NCCL reads its switches as integers and takes nonsense as unset; so do we, for NCCL's variables only.
fn nccl_switch(var: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<bool> {
    nccl_number(var, name).map(|n| n != 0)
}

fn nccl_number(var: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<u64> {
    let value = string(var, name)?;
    let value = value.trim();
    let parsed = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => value.parse::<i64>().ok().map(|n| n as u64),
    };
    // NCCL's own "undefined" for most parameters is -2; -1 means "auto" where it is accepted.
    parsed.filter(|n| *n != u64::MAX && *n != u64::MAX - 1)
}

/// A number of channels that NCCL understands as we do: what begins with a zero is another number there, or none.
fn channels(var: &impl Fn(&str) -> Option<OsString>, name: &str) -> u32 {
    let plain = |value: &String| !value.starts_with('0') && value.bytes().all(|byte| byte.is_ascii_digit());
    string(var, name).filter(plain).and_then(|value| value.parse().ok()).unwrap_or(0)
}

fn string(var: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<String> {
    text(var, name).map(|value| value.to_string_lossy().into_owned())
}

/// The variable by which the user told NCCL not to use peer memory at all or, where we choose, how to run AllReduce.
fn forbidden(var: &impl Fn(&str) -> Option<OsString>, choosing: bool) -> Option<&'static str> {
    if nccl_switch(var, "NCCL_P2P_DISABLE") == Some(true) {
        return Some("NCCL_P2P_DISABLE=1");
    }
    if nccl_switch(var, "NCCL_CUMEM_ENABLE") == Some(false) {
        return Some("NCCL_CUMEM_ENABLE=0");
    }
    let level = string(var, "NCCL_P2P_LEVEL").map(|level| level.trim().to_ascii_uppercase());
    if level.is_some_and(|level| level == "LOC" || level == "0") {
        return Some("NCCL_P2P_LEVEL=LOC");
    }
    for (name, words) in [("NCCL_ALGO", "NCCL_ALGO names AllReduce"), ("NCCL_PROTO", "NCCL_PROTO names AllReduce")] {
        if choosing && string(var, name).is_some_and(|value| names_allreduce(&value)) {
            return Some(words);
        }
    }
    None
}

/// What `NCCL_ALGO` or `NCCL_PROTO` says of AllReduce. The value is a list separated by `;`, each entry
/// `function:choice,...` or, without a colon, a choice for every function.
fn choices_for_allreduce(value: &str) -> impl Iterator<Item = &str> {
    let entries = value.split(';').map(str::trim).filter(|entry| !entry.is_empty());
    entries.filter_map(|entry| match entry.split_once(':') {
        Some((function, choice)) => function.trim().eq_ignore_ascii_case("allreduce").then(|| choice.trim()),
        None => Some(entry),
    })
}

/// Whether it chooses. A choice that begins with `^` only excludes, and our kernels are none of NCCL's algorithms:
/// PyTorch's deterministic mode sets `^NVLS`, and nothing is more deterministic than what the user would lose.
fn names_allreduce(value: &str) -> bool {
    choices_for_allreduce(value).any(|choice| !choice.starts_with('^'))
}

/// Whether it excludes NVLS: then no multicast here either.
fn excludes_nvls(value: &str) -> bool {
    let mut excluded = choices_for_allreduce(value).filter_map(|choice| choice.strip_prefix('^'));
    excluded.any(|names| names.split(',').any(|name| name.trim().to_ascii_lowercase().starts_with("nvls")))
}

#[cfg(test)]
mod tests;
