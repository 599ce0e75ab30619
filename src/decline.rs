//! Why a communicator stays with stock NCCL, and what an operator can do about it.
#![forbid(unsafe_code)]

macro_rules! declines {
    ($($variant:ident = $code:literal, $name:literal, $hint:literal;)*) => {
        /// The reason a communicator was declined. Travels between ranks as a number.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Decline {
            $(#[doc = $hint] $variant = $code,)*
        }

        impl Decline {
            /// All reasons.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The word in log lines.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it means and what to do.
            pub fn hint(self) -> &'static str {
                match self { $(Self::$variant => $hint,)* }
            }

            /// The reason with this number.
            pub fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

declines! {
    Disabled = 1, "disabled", "TWOSHOT_ENABLE=0 on this rank";
    InvalidConfig = 2, "invalid-config", "an environment variable of this rank could not be understood";
    Forbidden = 3, "forbidden", "an NCCL variable of this rank asks for something else: NCCL_ALGO or NCCL_PROTO naming AllReduce, NCCL_P2P_DISABLE, NCCL_P2P_LEVEL=LOC or NCCL_CUMEM_ENABLE=0";
    ConfigDiffers = 4, "config-differs", "this rank's TWOSHOT_* limits differ from rank 0's; set the same values on all ranks";
    VersionDiffers = 5, "version-differs", "this rank runs another version of twoshot than rank 0";
    OneRank = 6, "one-rank", "nothing to reduce in a communicator of one rank";
    Probe = 8, "probe", "this rank's device or driver could not be examined";
    Architecture = 9, "architecture", "kernels exist for compute capability 9.0 and newer";
    NoVirtualMemory = 10, "no-virtual-memory", "this rank's driver cannot share memory through the virtual memory management API";
    SharedGpu = 11, "shared-gpu", "two ranks use one GPU (TWOSHOT_SHARED_GPU=1 allows it for tests)";
    NoNvlink = 12, "no-nvlink", "not all GPUs of the host are connected by NVLink (see nvidia-smi topo -p2p n)";
    FabricDisabled = 13, "fabric-disabled", "the ranks span hosts and NCCL_MNNVL_ENABLE=0 on this rank";
    NoFabric = 14, "no-fabric", "the ranks span hosts and this rank's GPU belongs to no completed multi-node NVLink fabric";
    OtherCluster = 15, "other-cluster", "the ranks span hosts and this rank's GPU is in another NVLink cluster than rank 0's";
    OtherClique = 16, "other-clique", "the ranks span hosts and this rank's GPU is in another clique of the NVLink cluster than rank 0's";
    FabricHandle = 17, "fabric-handle", "a fabric handle could not be created, exported and imported on this rank: check the IMEX daemon and the IMEX channel device in the container";
    TooManyRanks = 18, "too-many-ranks", "the payload limits do not leave room for so many ranks";
    Module = 19, "module", "this rank could not load the kernels";
    Allocate = 20, "allocate", "this rank could not allocate the shared memory";
    Export = 21, "export", "this rank could not export the shared memory";
    Handoff = 22, "handoff", "this rank could not pass file descriptors to its peers: separate network namespaces on one host?";
    Import = 23, "import", "this rank could not open a peer's memory";
    Map = 24, "map", "this rank could not map the shared memory";
    Prepare = 25, "prepare", "this rank could not fill the shared memory";
    KnownAnswer = 26, "known-answer", "an AllReduce of known data did not give the known result on this rank";
    Deadline = 27, "deadline", "a step of this rank did not end within TWOSHOT_SETUP_TIMEOUT_MS";
    Memory = 29, "memory", "the windows of this process's communicators on this rank's device take all of TWOSHOT_MEMORY";
    BindingDiffers = 30, "binding-differs", "not the same calls lead to twoshot on this rank as on rank 0: load libraries that use NCCL before the first communicator is made, on all ranks, or preload twoshot";
    BindingIncomplete = 31, "binding-incomplete", "calls of this rank to NCCL could not be led to twoshot (a page of call slots that the kernel does not let be changed): preload twoshot";
    Foreign = 28, "foreign", "this rank sent data that is not twoshot's";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_number_and_name() {
        for (i, a) in Decline::ALL.iter().enumerate() {
            assert_eq!(Decline::from_code(*a as u8), Some(*a));
            for b in &Decline::ALL[i + 1..] {
                assert!(a.name() != b.name() && *a as u8 != *b as u8);
            }
        }
        assert_eq!(Decline::from_code(0), None);
    }

    #[test]
    fn the_troubleshooting_page_explains_every_reason() {
        let page = include_str!("../docs/troubleshooting.md");
        for reason in Decline::ALL {
            let row = format!("| `{}` | {} |", reason.name(), reason.hint());
            assert!(page.contains(&row), "docs/troubleshooting.md lacks: {row}");
        }
    }
}
