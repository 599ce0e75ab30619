//! The table of variables: `docs/environment.md` and `twoshot doctor` print it, and a test compares the three.
#![forbid(unsafe_code)]

/// One environment variable the library reads.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What an unset variable means.
    pub default: &'static str,
    /// What it does, and how ranks agree on it.
    pub meaning: &'static str,
}

const fn variable(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default, meaning }
}

/// All of them.
pub const VARIABLES: &[Variable] = &[
    variable(
        "TWOSHOT_MODE",
        "direct",
        "`direct` binds `ncclAllReduce`; `collnet` offers NCCL a collective network, a network and a tuner (`docs/official-door.md`); `off` leaves NCCL as if the library were not there, and so does a word that is none of these. Must be the same on all ranks.",
    ),
    variable(
        "TWOSHOT_ENABLE",
        "1",
        "`0` leaves every AllReduce to stock NCCL. One rank with `0` is enough: the ranks vote.",
    ),
    variable(
        "TWOSHOT_NCCL_LIBRARY",
        "(found)",
        "Path of the stock NCCL, where the library is opened by path or stands in for `libnccl.so.2`.",
    ),
    variable(
        "TWOSHOT_NET",
        "(own)",
        "With `TWOSHOT_MODE=collnet`: path of a network plugin whose network NCCL uses in place of the one over NVLink.",
    ),
    variable(
        "TWOSHOT_NET_DIRECT",
        "1",
        "With `TWOSHOT_MODE=collnet`: `0` lets the network over NVLink copy through its windows only, never straight into memory that NCCL has registered. Each rank for what it receives.",
    ),
    variable(
        "TWOSHOT_ALGO",
        "auto",
        "`oneshot` or `twoshot` uses only that algorithm, for the sizes it can hold; `bulk` sends everything through the ring of large payloads, where the ranks have one; `switch` is `twoshot` whose sums of f32, f16 and bf16 of any size are made in the switch, where the ranks agreed on that (`TWOSHOT_SWITCH_REDUCE`). Must be the same on all ranks.",
    ),
    variable("TWOSHOT_MIN_BYTES", "0", "Payloads below go to stock NCCL. Must be the same on all ranks."),
    variable(
        "TWOSHOT_MAX_BYTES",
        "(table)",
        "Largest payload taken; larger ones go to stock NCCL. Suffixes K, M, G. Sets the memory of a communicator. Must be the same on all ranks.",
    ),
    variable("TWOSHOT_ONESHOT_MAX_BYTES", "(table)", "Largest payload of one-shot. Must be the same on all ranks."),
    variable(
        "TWOSHOT_MAX_BLOCKS",
        "(table)",
        "Most thread blocks of a launch, 1 to 256. The ranks use the smallest value of all; set on all of them it replaces the table, up or down.",
    ),
    variable(
        "TWOSHOT_MEMORY",
        "512M",
        "Most memory that the windows of all communicators of a process take on one device. Later communicators get smaller windows, so their large payloads stay with stock NCCL; the ranks of one use the smallest. The default is 16 windows where that is more.",
    ),
    variable(
        "TWOSHOT_TUNING_FILE",
        "(none)",
        "Cross-over rows that `twoshot tune` wrote; they replace the built-in table, the limits above replace them. Used where all ranks have the same rows; a file that cannot be used is named and ignored by all.",
    ),
    variable("TWOSHOT_MULTICAST", "1", "`0` keeps every multicast call away. One rank with `0` is enough."),
    variable(
        "TWOSHOT_SWITCH_REDUCE",
        "0",
        "`1` lets the NVLink switch add up sums of f32, f16 and bf16, at the sizes where a model sees it win over two-shot and stock NCCL (`docs/scaling.md`). Results then differ in rounding from all others, though not between ranks (`docs/numerics.md`). Used where every rank has `1` and the ranks have multicast. Has never run on hardware.",
    ),
    variable(
        "TWOSHOT_TIMEOUT_MS",
        "0",
        "Deadline of a kernel's wait for its peers in milliseconds; 0 waits for ever, as stock NCCL does.",
    ),
    variable(
        "TWOSHOT_SETUP_TIMEOUT_MS",
        "20000",
        "Deadline of one step of a communicator's set-up in milliseconds; the ranks use the longest of all.",
    ),
    variable(
        "TWOSHOT_HOST_ID",
        "(boot id)",
        "Identity of this host, where the kernel's boot id is not unique (cloned virtual machines) or not readable.",
    ),
    variable(
        "TWOSHOT_SHARED_GPU",
        "0",
        "`1` lets several ranks share one GPU. For tests: ranks that share a GPU take turns and are slow. Must be the same on all ranks.",
    ),
    variable(
        "TWOSHOT_PDL",
        "0",
        "`1` lets the kernel behind a routed call start before the call has ended, by programmatic dependent launch. Only for programs in which every kernel that is launched with that attribute waits for its predecessor (`griddepcontrol.wait`); behind stock NCCL's kernels it need not. Each rank's own matter.",
    ),
    variable(
        "TWOSHOT_SAMPLE",
        "0",
        "Every how many-th AllReduce is timed on the device, by two events around it; `twoshot stats` and `TWOSHOT_STATS` show the mean by route and size. 0: none. Captured calls are not timed, nor calls that stock NCCL runs in a group.",
    ),
    variable(
        "TWOSHOT_STATS",
        "(none)",
        "File that gets the counters as JSON, at the end of every communicator and of the process; `%h` and `%p` become host and process.",
    ),
    variable(
        "NCCL_ALGO",
        "(unset)",
        "Obeyed: where it names AllReduce (or every function), AllReduce stays with stock NCCL. A list that only excludes (`^NVLS`, set by PyTorch's deterministic mode) does not; where it excludes NVLS, no multicast. With `TWOSHOT_MODE=collnet` NCCL obeys it by itself.",
    ),
    variable("NCCL_PROTO", "(unset)", "Obeyed like `NCCL_ALGO`."),
    variable("NCCL_P2P_DISABLE", "0", "Obeyed: `1` means no peer memory, so stock NCCL."),
    variable("NCCL_P2P_LEVEL", "(unset)", "Obeyed: `LOC` means no peer memory, so stock NCCL."),
    variable("NCCL_CUMEM_ENABLE", "(unset)", "Obeyed: `0` means no driver-API memory, so stock NCCL."),
    variable("NCCL_NVLS_ENABLE", "1", "Obeyed: `0` keeps every multicast call away."),
    variable(
        "NCCL_MNNVL_ENABLE",
        "(auto)",
        "Obeyed: `0` leaves host-spanning communicators to stock NCCL, except with `TWOSHOT_MODE=collnet`.",
    ),
    variable("NCCL_MNNVL_UUID", "(NVML)", "Replaces the cluster UUID, as for NCCL."),
    variable("NCCL_MNNVL_CLIQUE_ID", "(NVML)", "Replaces the clique id, as for NCCL."),
    variable(
        "NVTX_INJECTION64_PATH",
        "(unset)",
        "Set by profilers: set-ups and routed calls are shown as NVTX ranges. Unset, nothing is opened.",
    ),
    variable(
        "NCCL_MIN_NCHANNELS",
        "(unset)",
        "Read with `TWOSHOT_MODE=collnet`: where NCCL has as many channels, the tuner asks for up to 8 of them, with which it hands over an AllReduce in fewer requests. All ranks need the same, as NCCL wants it anyway.",
    ),
    variable(
        "NCCL_SOCKET_IFNAME",
        "(first)",
        "Obeyed with `TWOSHOT_MODE=collnet`: the interfaces over which the ranks find each other.",
    ),
    variable("NCCL_DEBUG", "(unset)", "`INFO` prints one line per communicator, `WARN` what went wrong."),
    variable("NCCL_DEBUG_SUBSYS", "(unset)", "Obeyed where it excludes the subsystems INIT and COLL."),
    variable("NCCL_DEBUG_FILE", "(stdout)", "Where log lines go; `%h` and `%p` become host and process, as for NCCL."),
];
