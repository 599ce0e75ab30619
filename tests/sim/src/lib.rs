//! A software NVLink domain between real processes, for tests without a GPU.
//!
//! The build compiles stand-ins for `libcuda.so.1`, `libnvidia-ml.so.1` and
//! `libnccl.so.2`; this crate starts processes that load them. A [`Session`] is
//! one machine room described by a [`Topology`]; a [`Rank`] is one process on one
//! of its hosts; [`Stats`] is what a process did to the driver and what it left
//! behind.
//!
//! ```no_run
//! use std::time::Duration;
//! use twoshot_sim::{Rank, Session, Topology, worker};
//!
//! let session = Session::new(&Topology::one_host(4))?;
//! let ranks = (0..4).map(|r| Rank::new(worker()).host(0).gpu(r));
//! for outcome in session.run_all(ranks, Duration::from_secs(30))? {
//!     outcome.expect_success();
//!     session.stats(outcome.pid)?.assert_nothing_live();
//! }
//! # Ok::<(), std::io::Error>(())
//! ```

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod elf;
mod netns;
mod rank;
mod session;
mod stats;
mod topology;

pub use netns::Netns;
pub use rank::{End, Outcome, Rank};
pub use session::Session;
pub use stats::Stats;
pub use topology::{Fabric, Host, Link, Topology};

use std::path::{Path, PathBuf};

/// The directory of the simulated libraries.
pub fn lib_dir() -> &'static Path {
    Path::new(concat!(env!("OUT_DIR"), "/lib"))
}

/// The simulated stock NCCL.
pub fn nccl() -> PathBuf {
    lib_dir().join("libnccl.so.2")
}

/// The directory of a simulated NCCL that lacks what came after 2.20.
pub fn old_nccl_dir() -> PathBuf {
    lib_dir().join("old")
}

/// A network plugin with a collective network, as another vendor's.
pub fn collnet_plugin() -> PathBuf {
    lib_dir().join("libsim_collnet.so")
}

/// An object that a program may open late, with a call of NCCL in it.
pub fn late_object() -> PathBuf {
    lib_dir().join("libsim_late.so")
}

/// The program that calls NCCL as any program would and knows nothing of twoshot.
pub fn worker() -> &'static Path {
    Path::new(concat!(env!("OUT_DIR"), "/bin/sim_worker"))
}

/// The program that calls a network plugin's tables as NCCL's proxy does.
pub fn plugin_driver() -> &'static Path {
    Path::new(concat!(env!("OUT_DIR"), "/bin/sim_plugin"))
}

/// The program behind this crate's own tests.
pub fn selftest() -> &'static Path {
    Path::new(concat!(env!("OUT_DIR"), "/bin/sim_selftest"))
}

/// The kernels' own test: ranks as threads over plain memory, no driver and no library.
pub fn executor_selftest() -> &'static Path {
    Path::new(concat!(env!("OUT_DIR"), "/bin/exec_selftest"))
}

/// The shipped `libtwoshot.so`: `TWOSHOT_LIBRARY` if it is set, else the newest
/// one beside, above or below the running test's executable.
///
/// # Panics
/// When there is none: a test of the library cannot go on without it.
pub fn twoshot_library() -> PathBuf {
    if let Some(path) = std::env::var_os("TWOSHOT_LIBRARY") {
        return PathBuf::from(path);
    }
    let executable = std::env::current_exe().expect("the running executable has a path");
    let near = executable
        .ancestors()
        .skip(1)
        .take(3)
        .flat_map(|dir| [dir.join("libtwoshot.so"), dir.join("deps/libtwoshot.so")]);
    let dated = near.filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)));
    match dated.max() {
        Some((_, path)) => path,
        None => panic!("no libtwoshot.so near {}; set TWOSHOT_LIBRARY", executable.display()),
    }
}
