//! Errors: the call that failed, its code, and what an operator can do about it.
#![forbid(unsafe_code)]

/// Everything that can go wrong below the doors.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A driver call returned an error.
    #[error("{call} failed with CUDA driver error {code}{}", hint(*code))]
    Driver {
        /// The function.
        call: &'static str,
        /// `CUresult`.
        code: i32,
    },
    /// The driver library could not be loaded or lacks a function.
    #[error("the CUDA driver library cannot be used: {0}")]
    DriverLibrary(String),
    /// An NVML call returned an error.
    #[error("{call} failed with NVML error {code}")]
    Nvml {
        /// The function.
        call: &'static str,
        /// `nvmlReturn_t`.
        code: i32,
    },
    /// The NVML library could not be loaded.
    #[error("the NVML library cannot be used: {0}")]
    NvmlLibrary(String),
    /// A stock NCCL call returned an error.
    #[error("stock {call} returned {code}")]
    Stock {
        /// The function.
        call: &'static str,
        /// `ncclResult_t`.
        code: i32,
    },
    /// Something a peer had to do did not happen in time.
    #[error("rank {rank} did not answer in time: {step}")]
    Peer {
        /// The rank waited for.
        rank: u32,
        /// What it had to do.
        step: &'static str,
    },
    /// A step of this rank did not end in time.
    #[error("{0} did not return in time")]
    Deadline(&'static str),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A peer sent something that is not ours.
    #[error("unexpected data from a peer: {0}")]
    Protocol(&'static str),
    /// The kernels' result of a known input was wrong.
    #[error("the known-answer AllReduce gave a wrong result ({0})")]
    WrongAnswer(String),
    /// A kernel reported a fault.
    #[error("a kernel reported {0}")]
    Kernel(String),
    /// Memory that a peer cannot be given.
    #[error("the memory cannot be shared: {0}")]
    Unshared(&'static str),
    /// Our own mistake.
    #[error("bug in twoshot, please report: {0}")]
    Bug(&'static str),
}

impl Error {
    /// A number for the vote: the driver's or NVML's code, or 0.
    pub fn code(&self) -> i32 {
        match self {
            Self::Driver { code, .. } | Self::Nvml { code, .. } | Self::Stock { code, .. } => *code,
            Self::DriverLibrary(_)
            | Self::NvmlLibrary(_)
            | Self::Peer { .. }
            | Self::Deadline(_)
            | Self::System { .. }
            | Self::Protocol(_)
            | Self::WrongAnswer(_)
            | Self::Kernel(_)
            | Self::Unshared(_)
            | Self::Bug(_) => 0,
        }
    }
}

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

/// What to look at for the codes that real installations meet.
fn hint(code: i32) -> &'static str {
    match code {
        2 => " (out of memory, or no multicast slot left in the NVSwitch)",
        101 => " (invalid device: check CUDA_VISIBLE_DEVICES)",
        401 => " (illegal state: is the fabric manager running?)",
        800 => " (not permitted: on multi-node NVLink this is a missing IMEX channel, /dev/nvidia-caps-imex-channels)",
        801 => " (not supported by this device or driver)",
        802 => " (system not ready: the fabric manager is still starting)",
        803 => " (driver and kernel module do not match)",
        _ => "",
    }
}
